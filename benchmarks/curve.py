"""Measure tokens per second by the number of different interventions in the queue: `python benchmarks/curve.py`."""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path

import torch
import workload as w

COUNTS = (0, 1, 8, 64, 256, 1024)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--requests", type=int, default=256, help="queued at once")
    arguments.add_argument("--new-tokens", type=int, default=16)
    arguments.add_argument(
        "--counts", type=int, nargs="*", default=COUNTS, help="different interventions; 0 and 1 first"
    )
    arguments.add_argument("--quantization", choices=["none", "int8"], default="none")
    arguments.add_argument("--positions", nargs="*", default=["l1", "f7+l7", "prompt"])
    args = arguments.parse_args()
    torch.set_num_threads(2)
    prompts = w.prompts(args.requests, 59, 72)
    engine = w.make_engine(prefix_cache=False, bank_bytes=2 << 30, quantization=args.quantization)
    print(f"{args.requests} requests of 59 to 72 tokens, {args.new_tokens} new ones; rank 8, all layers; {w.machine()}")
    print(f"quantization {args.quantization}; medians of {args.runs}")
    with tempfile.TemporaryDirectory() as scratch:
        for positions in args.positions:
            counts = [count for count in args.counts if count <= args.requests]
            refs = w.interventions(Path(scratch), counts[-1], positions=positions, rank=8, layers=tuple(range(30)))
            w.serve(engine, prompts[:64], args.new_tokens, refs[:64])  # warm-up; a full round would take long
            figures = w.medians(
                {
                    str(count): functools.partial(w.serve, engine, prompts, args.new_tokens, refs[:count])
                    for count in counts
                },
                args.runs,
                warm_up=False,
            )
            for count, figure in figures.items():
                ratios = f"{figure / figures['0']:5.3f} of K = 0  {figure / figures['1']:5.3f} of K = 1"
                print(f"{positions:7} K = {count:>4}  {figure:7.1f} tokens/s  {ratios}", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
