"""Between host and device without waiting for either.

A copy out of ordinary memory stops the host until the device has come that far. Out of pinned memory it is queued like
a kernel; torch's allocator of pinned memory hands a buffer out again only once its copy is done, so nobody keeps any.
On the CPU nothing is copied that need not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array's numbers as a tensor. On the CPU it is the array itself: do not write to it afterwards."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def copy_from_host(tensor: Tensor, array: NDArray[Any]) -> None:
    """Overwrite a tensor by an array of its shape and dtype."""
    source = torch.from_numpy(array)
    tensor.copy_(source.pin_memory() if tensor.is_cuda else source, non_blocking=True)


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host as int64."""
    return to_device(np.array(values, dtype=np.int64), device)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers of the host, one a row, [rows, 1], of another tensor's dtype and device."""
    return to_device(np.array(values, dtype=np.float32), like.device).to(like.dtype).unsqueeze(1)


class Uploads:
    """Copies large things to the device on a stream of their own, while steps run.

    Work queued after `upload` on the caller's stream waits for the copies; what was queued before does not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on the device. On the CPU the tensors themselves."""
        if self._stream is None:
            return list(tensors)
        with torch.cuda.stream(self._stream):
            copies = [tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)  # its memory is not handed out again before that stream has read it
        return copies


class ToHost:
    """A tensor on its way to the host. Ask for its numbers late: that waits for it, and for nothing queued after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """Its numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[Any] = self._copy.tolist()
        return values
