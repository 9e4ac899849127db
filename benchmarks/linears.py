"""Time a pass through a model's linear layers, in ms for each form: `python benchmarks/linears.py MODEL_FOLDER`.

It visits all layers in turn, so weights come from memory. Forward is y = x W^T; backward is y W, as for gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from reftserve.server.base.cpu_kernels import load_kernels
from reftserve.server.base.int8 import Int8Linear
from reftserve.server.base.panels import PanelLinear


class OneDnnLinear(nn.Module):
    """A linear layer with its weight in oneDNN's layout, as Inductor packs it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in] -> [rows, out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Back(nn.Module):
    """Computes y W from the panels of W."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = PanelLinear([layer]).weight
        self.sizes = [layer.out_features]

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """y: [rows, out] -> [rows, in]."""
        return torch.ops.reftserve.linear_transposed(y, self.weight, self.sizes)


class BackTransposed(nn.Module):
    """Computes y W from panels of W's transpose."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.reftserve.pack_linear(layer.weight.detach().T)
        self.sizes = [layer.in_features]

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """y: [rows, out] -> [rows, in]."""
        return torch.ops.reftserve.linear(y, self.weight, None, self.sizes)


def pass_ms(layers: list[nn.Module], inputs: list[torch.Tensor], runs: int) -> float:
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).model.requires_grad_(False)
    plain = [module for module in model.modules() if isinstance(module, nn.Linear)]
    torch.set_num_threads(2)
    load_kernels()
    forms = {
        "nn.Linear": plain,
        "oneDNN": [OneDnnLinear(layer) for layer in plain],
        "ours": [PanelLinear([layer]) for layer in plain],
        "int8": [Int8Linear([layer]) for layer in plain],
    }
    back = {
        "back": [Back(layer) for layer in plain],
        "back, T": [BackTransposed(layer) for layer in plain],
    }
    print("rows  " + "  ".join(f"{name:>9}" for name in forms | back))
    with torch.inference_mode():
        for rows in (1, 8, 16, 32, 64, 128, 512):
            inputs = [torch.randn(rows, layer.in_features) for layer in plain]
            upstream = [torch.randn(rows, layer.out_features) for layer in plain]
            times = [pass_ms(list(layers), inputs, args.runs) for layers in forms.values()]
            times += [pass_ms(list(layers), upstream, args.runs) for layers in back.values()]
            print(f"{rows:4}  " + "  ".join(f"{time_ms:9.1f}" for time_ms in times))


if __name__ == "__main__":
    main()
