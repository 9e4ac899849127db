"""The canonical edit that every family lowers to, and its reference implementation.

    h  <-  h + sum_i scale_i * act_i(h · A_i + b_i) * U_i          i runs over the rank columns

    A, U   [rank, hidden]    input and output direction of each column
    b      [rank]            act    [rank] int8, an `Activation`         scale  [rank]

The form act(hW^T + b)U - (hR^T + c)U is two sets of columns: one with `act`, and a linear one with A = -R and b = -c.
If `act` is linear they fold into one set (LoReFT: A = W - R, U = R). Edits are composed by concatenating columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from reftserve.interventions.columns import TENSORS, check_columns
from reftserve.interventions.columns import Activation as Activation
from reftserve.interventions.intervention_errors import ShapeError
from reftserve.interventions.positions import Positions

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: functional.relu,
    Activation.GELU: functional.gelu,
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.SILU: functional.silu,
}


def activate(y: Tensor, act: Tensor) -> Tensor:
    """Apply each column's activation. y: [..., rank]. act: int8, broadcastable to y."""
    for activation, function in FUNCTIONS.items():
        y = torch.where(act == activation, function(y), y)
    return y


@dataclass(frozen=True, eq=False)
class LowRankEdit:
    """An immutable edit in canonical form, without copies. Raises ShapeError, DtypeError or NonFiniteError."""

    A: Tensor
    b: Tensor
    U: Tensor
    act: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        check_columns({name: getattr(self, name) for name in TENSORS})

    @classmethod
    def of_checked(cls, columns: Mapping[str, Tensor]) -> LowRankEdit:
        """Wrap columns that `check_columns` has accepted: a load is checked between two steps, so only once."""
        edit = object.__new__(cls)
        for name in TENSORS:
            object.__setattr__(edit, name, columns[name])
        return edit

    @property
    def rank(self) -> int:
        """Return the number of columns."""
        return self.A.shape[0]

    @property
    def hidden_size(self) -> int:
        """Return the length of the hidden states."""
        return self.A.shape[1]

    @property
    def nbytes(self) -> int:
        """Return the size of the tensors in bytes."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    def delta(self, hidden: Tensor) -> Tensor:
        """Return the numbers that `apply` adds to [rows, hidden_size], in the edit's dtype. Raises ShapeError."""
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
        """Return the edit `scale` times as strong; 0 edits nothing, a negative scale reverses the direction."""
        return replace(self, scale=self.scale * scale)

    def to(self, device: torch.device) -> LowRankEdit:
        """Return the edit on a device."""
        return LowRankEdit(*(getattr(self, name).to(device) for name in TENSORS))

    def split(self, ranks: Sequence[int]) -> list[LowRankEdit]:
        """Undo `compose`: return the columns as edits of these ranks, which sum to `rank`. The edits are views."""
        parts = zip(*(getattr(self, name).split(list(ranks)) for name in TENSORS), strict=True)
        return [LowRankEdit(*tensors) for tensors in parts]

    @cached_property
    def content_hash(self) -> str:
        """Return the SHA-256 over shapes, types and numbers: equal for equal edits only."""
        digest = hashlib.sha256()
        for name in TENSORS:
            tensor: Tensor = getattr(self, name).detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def compose(edits: Sequence[LowRankEdit]) -> LowRankEdit:
    """Concatenate edits' columns: their sum, each computed from the unedited h. Raises ShapeError, also for none."""
    sizes = {edit.hidden_size for edit in edits}
    if len(sizes) != 1:
        raise ShapeError(f"edits of hidden sizes {sorted(sizes)} cannot be composed; they must be equal")
    return LowRankEdit(*(torch.cat([getattr(edit, name) for edit in edits]) for name in TENSORS))


@dataclass(frozen=True, eq=False)
class PlacedEdit:
    """An edit at `positions` of the output of decoder layer `layer`; 0 is the first layer."""

    layer: int
    positions: Positions
    edit: LowRankEdit
