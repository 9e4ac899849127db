"""Measure decoded tokens per second by the number of running requests: `python benchmarks/batch_sizes.py`."""

from __future__ import annotations

import argparse
import functools
import time

import torch
import workload as w

from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import SamplingParams, Submit

STEPS = 24


def decode(engine: Engine, prompts: list[list[int]]) -> float:
    name = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.submit(Submit(f"{name}-{index}", prompt, SamplingParams(max_tokens=STEPS + 40)))
    while engine.scheduler.waiting or any(s.n_uncomputed > 1 for s in engine.scheduler.running):
        engine.step()
    began = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    rate = len(prompts) * STEPS / (time.perf_counter() - began)
    for index in range(len(prompts)):
        engine.cancel(f"{name}-{index}")
    engine.step()
    return rate


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    runs = arguments.parse_args().runs
    torch.set_num_threads(2)
    prompts = w.prompts(64, 59, 72)
    sizes = (1, 2, 4, 8, 16, 32, 64)
    print(f"prompts of 59 to 72 tokens; {w.machine()}; median of {runs}")
    for quantization in ("none", "int8"):
        engine = w.make_engine(prefix_cache=False, quantization=quantization)
        figures = w.medians({str(n): functools.partial(decode, engine, prompts[:n]) for n in sizes}, runs)
        for size, figure in figures.items():
            name = "float32" if quantization == "none" else "int8"
            print(f"{name:8} batch {size:>3}  {figure:7.1f} tokens/s  {1000 * int(size) / figure:6.1f} ms a step")
        engine.close()


if __name__ == "__main__":
    main()
