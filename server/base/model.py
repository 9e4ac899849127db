"""Loads the base model frozen, on the configured device and in the configured dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from reftserve.server.base.model_errors import UnsupportedModel

LONGEST_REASON = 200  # characters


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the base model in evaluation mode with frozen parameters, from safetensors weights only.

    Raises UnsupportedModel when transformers cannot load the folder, or the weights lack a part of the model.
    """
    disable_progress_bar()
    try:
        model, loaded = cast(
            "tuple[Any, dict[str, Any]]",
            AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            ),
        )
    except (ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError, OSError) as cause:
        # Some of its messages list hundreds of classes.
        raise UnsupportedModel(f"transformers cannot load {folder}: {str(cause)[:LONGEST_REASON]}") from cause
    if missing := sorted(loaded["missing_keys"]):
        raise UnsupportedModel(
            f"the weights in {folder} lack {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}; "
            "config.json and weights belong to different models"
        )
    frozen: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return frozen


def resolve_device(name: str) -> torch.device:
    """Return the device; `auto` is the first CUDA device, or the CPU without one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
