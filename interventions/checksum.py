"""The checksum of a model in memory, to show that nothing has changed its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def model_checksum(model: nn.Module) -> str:
    """SHA-256 over the parameters of a model in memory, to show that nothing has changed them."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(_bytes(parameter.detach()))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    # A view where it can be, not a copy: the largest tensors are a good part of the model.
    tensor = tensor.to_dense() if tensor.is_mkldnn else tensor
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
