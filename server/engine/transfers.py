"""Copies between host and device that block neither. On the CPU most functions copy nothing.

A copy from ordinary memory blocks the host until the device reaches it; one from pinned memory is queued like a kernel.
torch's pinned allocator reuses a buffer only after its copy, so callers need not keep it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return the array as a tensor. On the CPU it shares the array's memory: do not write to it afterwards."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def copy_from_host(tensor: Tensor, array: NDArray[Any]) -> None:
    """Overwrite a tensor with an array of its shape and dtype."""
    source = torch.from_numpy(array)
    tensor.copy_(source.pin_memory() if tensor.is_cuda else source, non_blocking=True)


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers as an int64 tensor."""
    return to_device(np.array(values, dtype=np.int64), device)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as a column [rows, 1] with another tensor's dtype and device."""
    return to_device(np.array(values, dtype=np.float32), like.device).to(like.dtype).unsqueeze(1)


class Uploads:
    """Copies large tensors to the device on its own stream; work that the caller queues after `upload` waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors on the device; on the CPU the same tensors."""
        if self._stream is None:
            return list(tensors)
        with torch.cuda.stream(self._stream):
            copies = [tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)  # its memory is not reused before that stream has read it
        return copies


class ToHost:
    """A tensor being copied to the host. `tolist` waits for the copy, but not for work queued after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """Wait for the copy and return the numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[Any] = self._copy.tolist()
        return values
