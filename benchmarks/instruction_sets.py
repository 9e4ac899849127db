"""Compare the engine with and without AVX-512: `python benchmarks/instruction_sets.py --runs 3`. In a process per set,
`generate` and engines with all kernels, with the faster ones and with none take turns on the same prompts.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable

import throughput
import torch
import workload as w

from reftserve.server.base.kernel_choice import AllKernels, FasterKernels, KernelChoice, NoKernels

# GCC's name of a processor, and the variables that restrict torch, oneDNN and MKL to its instructions.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SETS: dict[str, dict[str, str]] = {"native": {}, "x86-64-v3": AVX2}


def measure(march: str, requests: int, runs: int) -> None:
    torch.set_num_threads(2)
    prompts = w.prompts(requests, 59, 72)
    faster = FasterKernels(None, march=march)
    choices: dict[str, KernelChoice] = {
        "all kernels": AllKernels(march),
        "the faster of both": faster,
        "torch's operations": NoKernels(),
    }
    engines = {name: w.make_engine(kernels, prefix_cache=False) for name, kernels in choices.items()}
    variants: dict[str, Callable[[], float]] = {"Hugging Face generate": throughput.hugging_face(prompts)}
    for name, engine in engines.items():
        variants[f"ours, {name}"] = functools.partial(w.serve, engine, prompts, throughput.NEW_TOKENS, [])
    figures = w.medians(variants, runs)
    reference = figures["Hugging Face generate"]
    print(f"\n{march}: {requests} requests, float32; {w.machine()}; median of {runs}")
    print(faster.describe())
    for name, figure in figures.items():
        print(f"{name:28} {figure:8.1f} tokens/s  {figure / reference:5.2f} of Hugging Face", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--requests", type=int, default=8)
    arguments.add_argument("--only", choices=SETS, help="measure one set in this process, as its environment holds it")
    args = arguments.parse_args()
    if args.only:
        measure(args.only, args.requests, args.runs)
        return
    sizes = ["--runs", str(args.runs), "--requests", str(args.requests)]
    for march, held in SETS.items():
        subprocess.run([sys.executable, __file__, "--only", march, *sizes], env={**os.environ, **held}, check=True)


if __name__ == "__main__":
    main()
