"""One pass through the linear layers of a model, in ms by form: `python benchmarks/linears.py MODEL_FOLDER`.

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

from reftserve.server.engine.linears import replace_linears


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
    forms = {"nn.Linear": plain}
    for name, int8 in (("packed", False), ("int8", True)):
        layers = nn.ModuleList(copy.deepcopy(plain))
        replace_linears(layers, [], int8=int8)
        forms[name] = list(layers)
    print("rows  " + "  ".join(f"{name:>9}" for name in forms))
    with torch.inference_mode():
        for rows in (1, 8, 32, 64, 256, 512):
            inputs = [torch.randn(rows, layer.in_features) for layer in plain]
            times = [pass_ms(list(layers), inputs, args.runs) for layers in forms.values()]
            print(f"{rows:4}  " + "  ".join(f"{time_ms:9.1f}" for time_ms in times))


if __name__ == "__main__":
    main()
