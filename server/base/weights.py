"""The base's weights as engine and worker hold them: one copy for both, on the CPU in a file that each of them maps.

Each process loads the base by itself, brings its weights into the forms that it computes from, and then exchanges them
for those in the file, which is named by their hash and made by whoever comes first. They are compared to the bit, so
what is damaged, cut off or somebody else's is never used, but made anew. Mapped pages are the page cache's: they are in
memory once, whoever reads them. On a GPU the engine lends its own to the worker (`cuda_weights.py`).

    <hash>.weights   the panels in the order of `named_parameters`, then plain weights, then biases and norms, each
                     from a multiple of 64 bytes on
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
ALIGNMENT = 64  # a cache line, and the widest vector


def load_base(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kernels: KernelChoice,
    shared: Path | None,
    lent: Sequence[LentTensor] = (),
) -> PreTrainedModel:
    """The frozen base, its linear layers packed for the CPU's kernels where `kernels` takes them.

    shared: the folder of the file for all processes, if the device is the CPU; None leaves the weights private.
    lent: the weights of the engine, if the device is a GPU; none makes a copy there.
    Raises KernelsUnavailable when `kernels` demands kernels that cannot be compiled, and what `load_model` raises.
    """
    if lent and device.type == "cuda":
        model = load_model(folder, dtype, torch.device("cpu"))
        borrow_weights(model, lent)
        return model.to(device)  # what is not borrowed
    model = load_model(folder, dtype, device)
    if takes_kernels(model) and kernels.load():
        pack_linears(model, kernels)
    if shared is not None and device.type == "cpu":
        share_weights(model, shared)
    return model


def share_weights(model: nn.Module, folder: Path) -> None:
    """Let a frozen model on the CPU read its parameters from a file in `folder`; whoever writes to them is ended.

    Other files of weights go when one is made: the base of the day alone is worth its room. Where it cannot be made,
    the model keeps its private weights, and the log says so.
    """
    # Panels, then plain weights, then biases: weights of layers that are computed as one lie side by side.
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
            raise OSError(f"{file} does not hold what was written to it")
    except OSError as cause:
        _stay_private(parameters, cause)
        return
    _exchange(parameters, found)


def borrow_weights(model: nn.Module, lent: Sequence[LentTensor]) -> None:
    """Let a frozen model on the CPU read its parameters from the engine's memory on a GPU, and from then on be there.

    Where that cannot be opened, or holds anything else, the model keeps its own, and the log says so.
    """
    parameters = list(model.parameters())
    try:
        found = [open_lent(one) for one in lent]
        if not _are_equal(found, parameters):
            raise RuntimeError("what the engine lends are not the weights of this base")
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
    """The file's tensors, read-only; None where it is not there or holds anything else than these parameters."""
    offsets, size = _layout(parameters)
    if not file.is_file() or file.stat().st_size != size:
        return None
    with file.open("rb") as opened:
        mapping = mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        # That nobody can write to it is what it is for.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
    found = [
        whole[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        for offset, parameter in zip(offsets, parameters, strict=True)
    ]
    if not _are_equal(found, parameters):
        return None
    mapping.madvise(mmap.MADV_DONTNEED)  # who does not compute from them, as an int8 engine, should not count as a user
    return found


def _write(file: Path, parameters: Sequence[Tensor]) -> None:
    for old in file.parent.glob("*.weights"):
        old.unlink()  # whoever has it mapped keeps it
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
    """Where each parameter begins, and where the last one ends."""
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = offsets[-1] + parameter.nbytes
    return offsets, end


def _are_equal(found: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """To the bit; parameters are on the CPU."""
    return len(found) == len(parameters) and all(
        (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(_bytes(one.cpu()), _bytes(other))
        for one, other in zip(found, parameters, strict=True)
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
