"""Shares one copy of the base's weights between the engine and the worker: on the CPU, a file that both map. Each
process loads the base, packs its weights, and replaces them by the file's tensors. The first process writes the file,
whose name is the weights' hash. Both copies are compared to the bit, and a damaged or foreign file is written again.
Mapped pages occupy memory once for all processes. `cuda_weights.py` does the same on a GPU.
"""

from __future__ import annotations

import logging
import mmap
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import PreTrainedModel

from reftserve.interventions.checksum import model_checksum
from reftserve.server.base.cuda_weights import open_lent
from reftserve.server.base.kernel_choice import KernelChoice
from reftserve.server.base.lent_tensor import LentTensor
from reftserve.server.base.model import load_model
from reftserve.server.base.panels import pack_linears, takes_kernels

logger = logging.getLogger(__name__)
ALIGNMENT = 64


def load_base(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kernels: KernelChoice,
    shared: Path | None,
    lent: Sequence[LentTensor] = (),
) -> PreTrainedModel:
    """Load the frozen base, with its linear layers packed for the CPU kernels if `kernels` chooses them.

    shared: the folder of the CPU's shared file; None keeps the weights private. lent: the engine's weights on a GPU;
    without them the process makes its own copy. Raises KernelsUnavailable, and the errors of `load_model`.
    """
    if lent and device.type == "cuda":
        model = load_model(folder, dtype, torch.device("cpu"))
        borrow_weights(model, lent)
        return model.to(device)  # moves the buffers, and parameters that were not borrowed
    model = load_model(folder, dtype, device)
    if takes_kernels(model) and kernels.load():
        pack_linears(model, kernels)
    if shared is not None and device.type == "cpu":
        share_weights(model, shared)
    return model


def share_weights(model: nn.Module, folder: Path) -> None:
    """Map the parameters to the weights file in `folder`, or keep them private. Writing to them kills the process."""
    # In this order weights of layers that are later joined into one are adjacent, so joining copies nothing.
    parameters = sorted(model.parameters(), key=lambda parameter: -parameter.dim())
    file = folder / f"{model_checksum(model)}.weights"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            found = _mapped(file, parameters)
            if found is None:
                _write(file, parameters)
                found = _mapped(file, parameters)
        if found is None:
            raise OSError(f"{file} changed after it was written")
    except OSError as cause:
        _stay_private(parameters, cause)
        return
    _exchange(parameters, found)


def borrow_weights(model: nn.Module, lent: Sequence[LentTensor]) -> None:
    """Replace parameters on the CPU by the engine's tensors on the GPU, unless they cannot be opened or differ."""
    parameters = list(model.parameters())
    try:
        found = [open_lent(one) for one in lent]
        if not _are_equal(found, parameters):
            raise RuntimeError("the weights that the engine lends differ from this base's")
    except RuntimeError as cause:
        _stay_private(parameters, cause)
        return
    _exchange(parameters, found)


def _stay_private(parameters: Sequence[Tensor], cause: Exception) -> None:
    size = sum(parameter.nbytes for parameter in parameters)
    logger.warning("the base's weights are private to this process, %d MB of memory: %s", size / 1e6, cause)


def _exchange(parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for parameter, other in zip(parameters, others, strict=True):
        parameter.data = other


def _mapped(file: Path, parameters: Sequence[Tensor]) -> list[Tensor] | None:
    offsets, size = _layout(parameters)
    if not file.is_file() or file.stat().st_size != size:
        return None
    with file.open("rb") as opened:
        mapping = mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
    found = [
        whole[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        for offset, parameter in zip(offsets, parameters, strict=True)
    ]
    if not _are_equal(found, parameters):
        return None
    # Comparing touched every page. An int8 engine does not read these weights, so it must not count as their user.
    mapping.madvise(mmap.MADV_DONTNEED)
    return found


def _write(file: Path, parameters: Sequence[Tensor]) -> None:
    for old in file.parent.glob("*.weights"):
        old.unlink()  # a process that has mapped the file keeps its pages
    partial = file.with_name("partial")
    offsets, size = _layout(parameters)
    try:
        with partial.open("wb") as opened:
            for offset, parameter in zip(offsets, parameters, strict=True):
                opened.seek(offset)
                opened.write(_bytes(parameter).numpy().data)
            opened.truncate(size)
        partial.chmod(0o444)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _layout(parameters: Sequence[Tensor]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = offsets[-1] + parameter.nbytes
    return offsets, end


def _are_equal(found: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    return len(found) == len(parameters) and all(
        (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(_bytes(one.cpu()), _bytes(other))
        for one, other in zip(found, parameters, strict=True)
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
