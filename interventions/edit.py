"""The canonical edit that every family lowers to, and its reference implementation.

    h  <-  h + sum_i scale_i * act_i(h · A_i + b_i) * U_i          i runs over the rank columns

    A      [rank, hidden]    what a column reads
    b      [rank]
    U      [rank, hidden]    what a column writes
    act    [rank] int8       an `Activation` a column
    scale  [rank]

A family of the form act(hW^T + b)U - (hR^T + c)U needs no other shape: it is two sets of columns, one with `act`, one
linear with A = -R and b = -c; where `act` is linear they fold into one (LoReFT: A = W - R, U = R). Activation and
scale belong to columns, so a composition of edits is their concatenation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from reftserve.interventions.intervention_errors import DtypeError, NonFiniteError, ShapeError
from reftserve.interventions.positions import Positions


class Activation(IntEnum):
    """What a rank column applies to h · A + b. Names are those of transformers' ACT2FN."""

    LINEAR = 0
    RELU = 1
    GELU = 2
    TANH = 3
    SIGMOID = 4
    SILU = 5


FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: functional.relu,
    Activation.GELU: functional.gelu,
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.SILU: functional.silu,
}


TENSORS = ("A", "b", "U", "act", "scale")


def activate(y: Tensor, act: Tensor) -> Tensor:
    """Apply to each column of y its own activation.

    y: [..., rank]. act: int8, broadcastable to y.
    """
    for activation, function in FUNCTIONS.items():
        y = torch.where(act == activation, function(y), y)
    return y


@dataclass(frozen=True, eq=False)
class LowRankEdit:
    """One edit in canonical form; see the module's picture for shapes. Immutable; tensors are not copied.

    Raises ShapeError, DtypeError or NonFiniteError when the tensors do not form an edit.
    """

    A: Tensor
    b: Tensor
    U: Tensor
    act: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or 0 in self.A.shape:
            raise ShapeError(f"A has shape {list(self.A.shape)}; expected [rank, hidden], neither 0")
        rank, hidden = self.A.shape
        expected = {"A": [rank, hidden], "b": [rank], "U": [rank, hidden], "act": [rank], "scale": [rank]}
        for name, shape in expected.items():
            tensor: Tensor = getattr(self, name)
            if list(tensor.shape) != shape:
                raise ShapeError(f"{name} has shape {list(tensor.shape)}; expected {shape}")
            if name == "act":
                if tensor.dtype != torch.int8:
                    raise DtypeError(f"act is {tensor.dtype}; expected torch.int8")
                if not ((tensor >= 0) & (tensor < len(Activation))).all():
                    raise DtypeError(f"act holds {sorted(set(tensor.tolist()))}; known are 0 to {len(Activation) - 1}")
            elif not tensor.is_floating_point() or tensor.dtype != self.A.dtype:
                raise DtypeError(f"{name} is {tensor.dtype}; expected a floating-point type, the same for all of them")
            elif not _is_finite(tensor):
                raise NonFiniteError(f"{name} holds NaN or infinity; every number must be finite")

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.A.shape[0]

    @property
    def hidden_size(self) -> int:
        """Length of the hidden states that it reads and writes."""
        return self.A.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory that its numbers take, bytes."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    def delta(self, hidden: Tensor) -> Tensor:
        """What the edit adds to hidden states [rows, hidden_size]; in the edit's dtype.

        Raises ShapeError if hidden_size differs from the edit's.
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ShapeError(f"hidden states have size {hidden.shape[-1]}; the edit has {self.hidden_size}")
        y = functional.linear(hidden.to(self.A.dtype), self.A, self.b)
        return (activate(y, self.act) * self.scale) @ self.U

    def apply(self, hidden: Tensor) -> Tensor:
        """Edit hidden states: h + sum_i scale_i act_i(h · A_i + b_i) U_i  (Wu et al. 2024, eq. 2, lowered).

        hidden: [rows, hidden_size], any float dtype; computed in the edit's dtype, returned in hidden's.
        Raises ShapeError if hidden_size differs from the edit's.
        """
        return (hidden.to(self.A.dtype) + self.delta(hidden)).to(hidden.dtype)

    def scaled(self, scale: float) -> LowRankEdit:
        """The same edit, `scale` times as strong; 0 changes nothing, negative turns it round."""
        return replace(self, scale=self.scale * scale)

    def to(self, device: torch.device) -> LowRankEdit:
        """The same edit on a device."""
        return LowRankEdit(*(getattr(self, name).to(device) for name in TENSORS))

    def split(self, ranks: Sequence[int]) -> list[LowRankEdit]:
        """Its columns as edits of these ranks, one after another: what `compose` made one, and views of it.

        The ranks are positive and sum to `rank`.
        """
        parts = zip(*(getattr(self, name).split(list(ranks)) for name in TENSORS), strict=True)
        return [LowRankEdit(*tensors) for tensors in parts]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over shapes, types and numbers: equal exactly when the edits are."""
        digest = hashlib.sha256()
        for name in TENSORS:
            tensor: Tensor = getattr(self, name).detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _is_finite(tensor: Tensor) -> bool:
    # On large tensors torch's own test starts threads, beside those of the engine's step when a loader's thread asks.
    if tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        return bool(np.isfinite(tensor.detach().numpy()).all())
    return bool(tensor.isfinite().all())


def compose(edits: Sequence[LowRankEdit]) -> LowRankEdit:
    """The parallel sum of edits on equal rows: each reads the unedited h; their columns in the order given.

    Raises ShapeError when the hidden sizes differ or there is nothing to compose.
    """
    sizes = {edit.hidden_size for edit in edits}
    if len(sizes) != 1:
        raise ShapeError(f"edits of hidden sizes {sorted(sizes)} cannot be composed; they must be equal")
    return LowRankEdit(*(torch.cat([getattr(edit, name) for edit in edits]) for name in TENSORS))


@dataclass(frozen=True, eq=False)
class PlacedEdit:
    """An edit with its place: the output of decoder layer `layer` (0 is the first), at `positions`."""

    layer: int
    positions: Positions
    edit: LowRankEdit
