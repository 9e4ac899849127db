"""The base's weights on a GPU, once for engine and worker: the engine lends its own through CUDA IPC.

What is lent is a handle of the engine's memory, plain data that any process of the machine can open. It holds as long
as the engine lives; whoever has opened it must end with the engine (`supervisor.keep_worker` sees to that). As with the
file on the CPU (`weights.py`), what is opened is compared to the bit with what the borrower has read itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from reftserve.server.engine.messages import LentTensor

logger = logging.getLogger(__name__)


def lend_weights(model: nn.Module) -> list[LentTensor]:
    """A model's parameters; none where it is not on a GPU, or memory cannot be shared, which the log says."""
    parameters = list(model.parameters())
    if any(parameter.device.type != "cuda" for parameter in parameters):
        return []
    try:
        return [_lend(parameter.detach()) for parameter in parameters]
    except RuntimeError as cause:
        logger.warning("the worker will hold a copy of the base's weights of its own: %s", cause)
        return []


def borrow_weights(model: nn.Module, lent: Sequence[LentTensor]) -> bool:
    """Let a frozen model on the CPU read its parameters from another process's GPU memory.

    False, and the log says why, where that cannot be opened or holds anything else; the model is as it was.
    """
    parameters = list(model.parameters())
    try:
        found = [_borrow(one) for one in lent]
        if len(found) != len(parameters) or not all(map(_same, found, parameters)):
            raise RuntimeError("the engine's weights are not those of this base")
    except RuntimeError as cause:
        size = sum(parameter.nbytes for parameter in parameters)
        logger.warning("the base's weights are private to this process, %d MB of GPU memory: %s", size / 1e6, cause)
        return False
    for parameter, tensor in zip(parameters, found, strict=True):
        parameter.data = tensor
    return True


def _lend(tensor: Tensor) -> LentTensor:
    _, arguments = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    _, size, stride, offset, _, dtype, device, storage, storage_bytes, storage_offset, _, *synchronization = arguments
    name = str(dtype).removeprefix("torch.")
    return LentTensor(
        name, tuple(size), tuple(stride), offset, device, storage, storage_bytes, storage_offset, *synchronization
    )


def _borrow(lent: LentTensor) -> Tensor:
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


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(_bytes(one.cpu()), _bytes(other.detach()))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
