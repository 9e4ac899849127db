"""Shares one copy of the base's weights on a GPU: the engine lends its copy to the worker through CUDA IPC. The handles
are valid while the engine runs, so a process that opened them must end with the engine (`supervisor.keep_worker`).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from reftserve.server.base.lent_tensor import LentTensor

logger = logging.getLogger(__name__)


def lend_weights(model: nn.Module) -> list[LentTensor]:
    """Return handles of a model's parameters; empty off the GPU, or, with a warning, if memory cannot be shared."""
    parameters = list(model.parameters())
    if any(parameter.device.type != "cuda" for parameter in parameters):
        return []
    try:
        return [_lend(parameter.detach()) for parameter in parameters]
    except RuntimeError as cause:
        logger.warning("the worker will load its own copy of the base's weights: %s", cause)
        return []


def open_lent(lent: LentTensor) -> Tensor:
    """Open a tensor in the other process's memory. Raises RuntimeError when it cannot be opened."""
    tensor: Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        Tensor,
        torch.Size(lent.size),
        lent.stride,
        lent.offset,
        torch.TypedStorage,
        getattr(torch, lent.dtype),
        lent.device,
        lent.storage,
        lent.storage_bytes,
        lent.storage_offset,
        False,  # no gradient
        lent.counter,
        lent.counter_offset,
        lent.event,
        lent.event_sync,
    )
    return tensor


def _lend(tensor: Tensor) -> LentTensor:
    _, arguments = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    _, size, stride, offset, _, dtype, device, storage, storage_bytes, storage_offset, _, *synchronization = arguments
    name = str(dtype).removeprefix("torch.")
    return LentTensor(
        name, tuple(size), tuple(stride), offset, device, storage, storage_bytes, storage_offset, *synchronization
    )
