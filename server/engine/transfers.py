"""From the host to the device without waiting for it.

A copy out of ordinary memory stops the host until the device has come that far. Out of pinned memory it is queued like
a kernel; torch's allocator of pinned memory hands a buffer out again only once its copy is done, so nobody keeps any.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array's numbers as a tensor. On the CPU it is the array itself: do not write to it afterwards."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def column(values: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host, one a row: [rows, 1]."""
    return to_device(np.array(values, dtype=np.float32), device).to(dtype).unsqueeze(1)
