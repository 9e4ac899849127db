"""Compare tokens per second with Hugging Face's `generate`: `python benchmarks/throughput.py --runs 5`."""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import workload as w
from transformers import AutoModelForCausalLM

NEW_TOKENS = 64
ALL_LAYERS = tuple(range(30))


def hugging_face(prompts: list[list[int]]) -> Callable[[], float]:
    model = AutoModelForCausalLM.from_pretrained(w.MODEL, dtype=torch.float32).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def run() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
            )
        return len(prompts) * NEW_TOKENS / (time.perf_counter() - began)

    return run


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--requests", type=int, default=32, help="and as many interventions")
    arguments.add_argument("--low", type=int, default=59, help="tokens of the shortest prompt")
    arguments.add_argument("--high", type=int, default=72)
    args = arguments.parse_args()
    torch.set_num_threads(2)
    prompts = w.prompts(args.requests, args.low, args.high)
    # Every run serves the same prompts, so none may be cached.
    engines = {
        name: w.make_engine(prefix_cache=False, quantization=quantization)
        for name, quantization in (("float32", "none"), ("int8", "int8"))
    }
    with tempfile.TemporaryDirectory() as scratch:
        mixed = w.interventions(Path(scratch), args.requests, positions="f7+l7", rank=4, layers=ALL_LAYERS)
        variants: dict[str, Callable[[], float]] = {"Hugging Face generate": hugging_face(prompts)}
        for name, engine in engines.items():
            for label, refs in (("no intervention", []), (f"{args.requests} interventions", mixed)):
                variants[f"ours, {name}, {label}"] = functools.partial(w.serve, engine, prompts, NEW_TOKENS, refs)
        figures = w.medians(variants, args.runs)
    reference = figures["Hugging Face generate"]
    print(f"{args.requests} requests of {args.low} to {args.high} tokens, {NEW_TOKENS} new ones, greedy")
    print(f"interventions: f7+l7, rank 4, all layers; {w.machine()}; median of {args.runs}")
    for name, figure in figures.items():
        print(f"{name:40} {figure:8.1f} tokens/s  {figure / reference:5.2f} of Hugging Face")
    for name, engine in engines.items():
        plain, edited = (figures[f"ours, {name}, {x}"] for x in ("no intervention", f"{args.requests} interventions"))
        print(f"{name}: {args.requests} interventions / none = {edited / plain:.3f}")
        engine.close()


if __name__ == "__main__":
    main()
