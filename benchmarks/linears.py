"""One pass through the linear layers of a model: torch's own, ours, in ms: `python benchmarks/linears.py MODEL_FOLDER`.

Every layer is visited in turn, as in a forward pass, so that the weights come from memory and not from a cache.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from reftserve.server.engine.packed_linear import pack_linears


def pass_ms(layers: list[nn.Module], inputs: list[torch.Tensor], runs: int) -> float:
    """Median milliseconds of one pass."""
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
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).model
    plain = [module for module in model.modules() if isinstance(module, nn.Linear)]
    blocks = nn.ModuleList(copy.deepcopy(plain))
    pack_linears(blocks)
    print(f"{'rows':>5} {'nn.Linear':>10} {'packed':>8} {'ratio':>6}")
    with torch.inference_mode():
        for rows in (1, 8, 32, 64, 256, 512):
            inputs = [torch.randn(rows, layer.in_features) for layer in plain]
            ours, theirs = pass_ms(list(blocks), inputs, args.runs), pass_ms(list(plain), inputs, args.runs)
            print(f"{rows:5} {theirs:10.1f} {ours:8.1f} {theirs / ours:6.2f}")


if __name__ == "__main__":
    main()
