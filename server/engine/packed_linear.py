"""Linear layers in oneDNN's own weight layout, for float32 on the CPU.

torch's `linear` goes to MKL there and brings the weight into its kernel's layout at every call; with a weight that was
brought into oneDNN's once, a pass of the linear layers takes half the time at up to 64 rows, and less at any number
(`benchmarks/linears.py`). The layout is private to the engine and replaces the plain weight, so it costs no memory,
but for a language-model head that shares its weight with the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """y = x W^T + b. weight: the frozen W [out, in] in oneDNN's layout; `to_dense()` gives it back exactly."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers of a frozen model by packed ones, where that is faster: float32 on the CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
                setattr(module, name, PackedLinear(child))
