"""Generated tokens a second, ours beside Hugging Face's `generate`: `python benchmarks/throughput.py --runs 5`."""

from __future__ import annotations

import argparse
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
    """One static batch, padded on the left."""
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
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--runs", type=int, default=5)
    runs = arguments.parse_args().runs
    torch.set_num_threads(2)
    prompts = w.prompts(32, 59, 72)
    engine = w.make_engine(prefix_cache=False)  # every run serves the same prompts
    with tempfile.TemporaryDirectory() as scratch:
        mixed = w.interventions(Path(scratch), 32, positions="f7+l7", rank=4, layers=ALL_LAYERS)
        figures = w.medians(
            {
                "Hugging Face generate": hugging_face(prompts),
                "ours, no intervention": lambda: w.serve(engine, prompts, NEW_TOKENS, []),
                "ours, 32 interventions (f7+l7, rank 4, all layers)": lambda: w.serve(
                    engine, prompts, NEW_TOKENS, mixed
                ),
            },
            runs,
        )
    reference = figures["Hugging Face generate"]
    print(f"32 requests of 59 to 72 tokens, {NEW_TOKENS} new ones, greedy, float32; {w.machine()}; median of {runs}")
    for name, figure in figures.items():
        print(f"{name:55} {figure:8.1f} tokens/s  {figure / reference:5.2f} of Hugging Face")


if __name__ == "__main__":
    main()
