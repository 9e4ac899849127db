"""Fingerprints: of a base model's folder, and the checksum of a model in memory.

The hash of the weights is over the checkpoint's tensors as stored, sorted by name: it does not depend on how they are
split into files, nor on the dtype that the model is loaded in.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from reftserve.interventions.intervention_errors import ManifestError
from reftserve.interventions.manifest import BaseFingerprint


def fingerprint(folder: Path) -> BaseFingerprint:
    """Identify the base model in a folder with config.json, *.safetensors and tokenizer.json.

    Reads every weight once. Raises ManifestError when a part is missing.
    """
    config = _text_config(json.loads(_read(folder / "config.json")))
    return BaseFingerprint(
        architecture=config["architectures"][0],
        hidden_size=_first(config, "hidden_size", "n_embd", "d_model"),
        num_layers=_first(config, "num_hidden_layers", "n_layer", "num_layers"),
        vocab_size=config["vocab_size"],
        weights_hash=_weights_hash(folder),
        tokenizer_hash=_tokenizer_hash(folder),
        chat_template_hash=_chat_template_hash(folder),
    )


def model_checksum(model: nn.Module) -> str:
    """SHA-256 over the parameters of a model in memory, to show that nothing has changed them."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(_bytes(parameter.detach()))
    return digest.hexdigest()


def _weights_hash(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ManifestError(f"{folder} holds no *.safetensors: other weight formats are never read")
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as checkpoint:
            where.update(dict.fromkeys(checkpoint.keys(), file))
    digest = hashlib.sha256()
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as checkpoint:
            tensor = checkpoint.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _tokenizer_hash(folder: Path) -> str:
    canonical = json.dumps(json.loads(_read(folder / "tokenizer.json")), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _chat_template_hash(folder: Path) -> str | None:
    """Of the template's text, wherever the format of the day keeps it; None when there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        template: Any = file.read_text("utf-8")
    elif (folder / "tokenizer_config.json").is_file():
        template = json.loads(_read(folder / "tokenizer_config.json")).get("chat_template")
    else:
        template = None
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> str:
    if not path.is_file():
        raise ManifestError(f"{path.parent} holds no {path.name}: not a base model's folder")
    return path.read_text("utf-8")


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config", {})
    return {**config, **nested, "architectures": config["architectures"]}


def _first(config: dict[str, Any], *names: str) -> int:
    for name in names:
        if name in config:
            return int(config[name])
    raise ManifestError(f"config.json has none of {', '.join(names)}")


def _bytes(tensor: torch.Tensor) -> memoryview:
    # A view where it can be, not a copy: the largest tensors are a good part of the model.
    tensor = tensor.to_dense() if tensor.is_mkldnn else tensor
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
