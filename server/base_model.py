"""The base model on disk: where it is, its tokenizer, and loading it frozen.

Used by the server (tokenizer, fingerprint), the engine and the training worker (weights). A model named by its
hub id is looked for in `<data>/models/<organisation>--<name>` first, then in the hub's cache, then in the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftserve.server.errors import NotFound

if TYPE_CHECKING:
    import torch
    from reftserve.server.settings import Settings
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_name(settings: Settings) -> str:
    """The base model's id in the API: the configured one, the hub id, or the folder's name."""
    if settings.served_model_name:
        return settings.served_model_name
    folder = Path(settings.model)
    return folder.resolve().name if folder.is_dir() else settings.model


def resolve_model_folder(settings: Settings) -> Path:
    """The folder that holds the base model's config, weights (safetensors) and tokenizer.

    Raises NotFound, saying where was looked and what to do, when there is none.
    """
    as_folder = Path(settings.model)
    kept = settings.data / "models" / settings.model.replace("/", "--")
    for folder in (as_folder, kept):
        if (folder / "config.json").is_file():
            return folder.resolve()
    if as_folder.is_dir():
        raise NotFound(f"{as_folder} holds no config.json: not a Hugging Face model folder", code="model_not_found")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(settings.model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        raise NotFound(
            f"model {settings.model!r} is neither a folder, nor in {kept}, nor could it be had from the hub ({cause}). "
            "Give --model a folder with config.json, *.safetensors and a tokenizer, or a hub id while online.",
            code="model_not_found",
        ) from cause


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer with its chat template; runs no code from the folder."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model in evaluation mode with every parameter frozen; only safetensors weights are read."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    frozen: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return frozen


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device when there is one, else the CPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere."""
    import torch

    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
