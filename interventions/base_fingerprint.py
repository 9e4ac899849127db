"""Fingerprints a base's folder. The weights' hash depends neither on the split into files nor on the loaded dtype."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from reftserve.interventions.columns import TORCH_NAMES
from reftserve.interventions.intervention_errors import ManifestError
from reftserve.interventions.manifest import BaseFingerprint

CHUNK_BYTES = 4 << 20


def fingerprint(folder: Path) -> BaseFingerprint:
    """Return a folder's fingerprint, reading every weight once. Raises ManifestError when a part is missing."""
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


def _weights_hash(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ManifestError(f"{folder} holds no *.safetensors, the only format of weights that is read")
    tensors: dict[str, tuple[Path, _Stored]] = {}
    for file in files:
        tensors.update({name: (file, stored) for name, stored in _stored(file).items()})
    digest = hashlib.sha256()
    for name in sorted(tensors):
        file, stored = tensors[name]
        digest.update(f"{name} torch.{stored.dtype} {stored.shape}\n".encode())
        with file.open("rb") as opened:
            opened.seek(stored.start)
            left = stored.size
            while left > 0:
                chunk = opened.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise ManifestError(f"{file} ends within tensor {name!r}")
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Stored:
    dtype: str
    shape: list[int]
    start: int
    size: int


def _stored(file: Path) -> dict[str, _Stored]:
    """Return tensors' places by name from the header: 8 bytes of length, then JSON. numpy cannot load bfloat16."""
    with safe_open(file, framework="numpy"):  # refuses a header with offsets outside the file
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in TORCH_NAMES:
            raise ManifestError(f"{file} stores {name!r} as {entry['dtype']}; expected one of {', '.join(TORCH_NAMES)}")
        start, end = entry["data_offsets"]
        found[name] = _Stored(TORCH_NAMES[entry["dtype"]], entry["shape"], 8 + length + start, end - start)
    return found


def _tokenizer_hash(folder: Path) -> str:
    canonical = json.dumps(json.loads(_read(folder / "tokenizer.json")), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _chat_template_hash(folder: Path) -> str | None:
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
