"""The checksum of a model in memory, which proves that nothing has changed its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def model_checksum(model: nn.Module) -> str:
    """Return the SHA-256 over the names, types, shapes and numbers of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(_bytes(parameter.detach()))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    # A view where possible: copying the largest tensor would take a good part of the model's memory.
    tensor = tensor.to_dense() if tensor.is_mkldnn else tensor
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
