"""Refuses a base model's folder that cannot be served, by its files alone: before torch is imported, within a second.

config.json           a causal language model that the installed transformers knows and whose attention is replaceable
model.safetensors     complete, or model.safetensors.index.json with every shard that it names
tokenizer.json        the form that the library `tokenizers` reads
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rapidfuzz import fuzz, process
from safetensors import SafetensorError, safe_open

from reftserve.server.base.model_errors import UnsupportedModel
from reftserve.server.base.transformers_source import (
    architecture,
    causal_classes,
    model_types,
    transformers_version,
)
from reftserve.server.errors import NotFound

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention"}
# Packages that transformers needs to compute these weights, on a GPU only.
QUANTIZERS = {"gptq": "gptqmodel", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes"}


def check_folder(folder: Path) -> None:
    """Check a folder that has a config.json. Raises NotFound (a part is missing or damaged), UnsupportedModel."""
    config = read_config(folder)
    _check_architecture(folder / "config.json", config)
    _check_format(folder / "config.json", config)
    _check_weights(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json with the fields of its `text_config`, if it describes several parts. Raises NotFound."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    whole = {name: config.get(name) for name in ("architectures", "model_type")}
    return {**config, **(text if isinstance(text, dict) else {}), **whole}


def read_json(file: Path) -> dict[str, Any]:
    """Return a file's JSON object. Raises NotFound, which says where the file is wrong."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as cause:
        raise incomplete(f"{file} cannot be read: {cause.strerror}") from cause
    except (ValueError, RecursionError) as cause:
        reason = "it is empty" if file.stat().st_size == 0 else cause
        raise incomplete(f"{file} is not JSON: {reason}; download it again") from cause
    if not isinstance(found, dict):
        raise incomplete(f"{file} holds a {type(found).__name__}; expected a JSON object")
    return found


def incomplete(message: str) -> NotFound:
    """Return the error of a folder with a missing or damaged part."""
    return NotFound(message, code="model_not_found")


def missing_config(folder: Path) -> NotFound:
    """Return the error of a folder without config.json."""
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return incomplete(f"{folder} holds a PEFT adapter, not a base model; its base is {base!r}")
    return incomplete(f"{folder} has no config.json: not a Hugging Face model folder")


def _check_architecture(file: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    named = _first_text(config.get("architectures"))
    if not isinstance(kind, str):
        raise incomplete(f'{file} names no model_type, such as "llama"; take the config.json of the original model')
    if kind not in model_types():
        raise UnsupportedModel(_unknown(file, config, kind))
    if kind not in causal_classes() or config.get("is_encoder_decoder"):
        raise UnsupportedModel(
            f"{file} describes {named or kind}, which is no decoder: only causal language models are served, such as "
            "Llama, Qwen, Mistral, Gemma and GPT-2"
        )
    if named is None:
        raise incomplete(f'{file} names no architecture; add "architectures": ["{causal_classes()[kind]}"]')
    if named not in causal_classes().values() and not named.endswith(WITH_HEAD):
        raise UnsupportedModel(
            f"{file} describes {named}, which has no language model's head; if the weights are those of a "
            f"{causal_classes()[kind]}, write that name there"
        )
    _check_traits(file, config, kind)


def _first_text(value: Any) -> str | None:
    return value[0] if isinstance(value, list) and value and isinstance(value[0], str) else None


def _check_traits(file: Path, config: Mapping[str, Any], kind: str) -> None:
    found = architecture(kind)
    if found is None:
        return  # its source is in an unusual place; the engine judges the loaded model
    if found.is_encoder and not config.get("is_decoder"):
        raise UnsupportedModel(
            f"{file} describes an encoder ({kind}), whose attention is not causal; only decoders are served"
        )
    layers = config.get("layer_types") or ["unknown"]
    if found.is_stateful and not ATTENTION_LAYERS.issuperset(map(str, layers)):
        raise UnsupportedModel(
            f"{file} describes {found.name}, whose layers keep a state besides keys and values; only models whose "
            "layers all use attention are served"
        )
    if not found.uses_attention_interface:
        raise UnsupportedModel(
            f"{file} describes {found.name}, whose attention transformers {transformers_version()} does not let other "
            "programs replace (AttentionInterface), so it cannot be served; Llama, Qwen, Mistral, Gemma and GPT-2 can"
        )


def _unknown(file: Path, config: Mapping[str, Any], kind: str) -> str:
    if config.get("auto_map"):
        return (
            f"{file} names the model_type {kind!r}, whose code comes with the model (auto_map); such code is never "
            "run. Give a model that transformers knows"
        )
    near = [
        name
        for name, _, _ in process.extract(kind, list(causal_classes()), scorer=fuzz.ratio, limit=2, score_cutoff=75)
    ]
    hint = f"did you mean {' or '.join(near)}?" if near else "a newer one may"
    return f"{file} names the model_type {kind!r}, which transformers {transformers_version()} does not know; {hint}"


def _check_format(file: Path, config: Mapping[str, Any]) -> None:
    quantized = config.get("quantization_config")
    if not quantized:
        return
    method = str(quantized.get("quant_method", "unknown")) if isinstance(quantized, dict) else "unknown"
    needs = f" (transformers computes them with the package {QUANTIZERS[method]})" if method in QUANTIZERS else ""
    raise UnsupportedModel(
        f"{file} says that the weights are quantized by the method {method!r}{needs}; only float32, bfloat16 and "
        "float16 weights are read. Give the folder of the model before quantization; --quantization int8 rounds it"
    )


def _check_weights(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        _tensors(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        _check_shards(folder)
    else:
        raise incomplete(_no_weights(folder))


def _check_shards(folder: Path) -> None:
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise incomplete(f"{index} has no weight_map, which names each tensor's file; download it again")
    expected: dict[str, set[str]] = defaultdict(set)
    for tensor, name in places.items():
        expected[str(name)].add(tensor)
    missing = sorted(name for name in expected if not (folder / name).is_file())
    if missing:
        raise incomplete(f"{folder} lacks {', '.join(missing)} of the {len(expected)} files that {INDEX} names")
    for name, tensors in expected.items():
        absent = sorted(tensors - _tensors(folder / name))
        if absent:
            raise incomplete(f"{folder / name} lacks the tensor {absent[0]!r} that {INDEX} places there")


def _tensors(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="numpy") as opened:
            return set(opened.keys())
    except OSError as cause:
        raise incomplete(f"{file} cannot be read: {cause}") from cause
    except SafetensorError as cause:
        raise incomplete(f"{file} is no complete safetensors file: {_damage(file, cause)}") from cause


def _damage(file: Path, cause: SafetensorError) -> str:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start.startswith(b"version "):
            return "it is a git-lfs pointer; run `git lfs pull` in its folder"
        header = opened.read(min(int.from_bytes(start, "little"), size))
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        whole = 8 + len(header) + max(ends)
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{cause} ({size} bytes); download it again"
    return f"it has {size} of {whole} bytes; download it again"


def _no_weights(folder: Path) -> str:
    def named(*patterns: str) -> str:
        return ", ".join(sorted(file.name for pattern in patterns for file in folder.glob(pattern))[:3])

    convert = 'python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained({})'
    convert += f".save_pretrained('{folder}')\""
    if found := named("*.safetensors"):
        return f"{folder} holds {found}, but neither {WEIGHTS} nor {INDEX}; rename the file, or download the index"
    if found := named("*.gguf"):
        given = f"'{folder}', gguf_file='{found.split(', ')[0]}'"
        return f"{folder} holds weights as GGUF only ({found}); convert them: {convert.format(given)}"
    if found := named(*PICKLES):
        given = f"'{folder}'"
        return (
            f"{folder} holds weights as pickles only ({found}), which can run code and are never read; if you trust "
            f"them, convert them: {convert.format(given)}"
        )
    return f"{folder} holds no weights; expected {WEIGHTS}, or {INDEX} and the files that it names"
