"""Measure the time to first token after a long system prompt: `python benchmarks/time_to_first_token.py`. 32 requests
run one by one, each with another suffix-only intervention and question. Cached: a plain request ran before.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import workload as w

from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import InterventionRef, SamplingParams, Submit

SYSTEM_TOKENS, REQUESTS = 1000, 32


def first_token_s(engine: Engine, prompt: list[int], refs: tuple[InterventionRef, ...], salt: str) -> float:
    began = time.perf_counter()
    engine.submit(Submit(f"{began}", prompt, SamplingParams(max_tokens=1), refs, salt))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    runs = arguments.parse_args().runs
    torch.set_num_threads(2)
    system = w.prompts(1, SYSTEM_TOKENS, SYSTEM_TOKENS)[0]
    questions = w.prompts(REQUESTS, 20, 40, seed=1)
    engine = w.make_engine()
    times: dict[str, list[float]] = {"not cached": [], "cached": []}
    with tempfile.TemporaryDirectory() as scratch:
        refs = w.interventions(Path(scratch), REQUESTS, positions="l7", rank=4, layers=tuple(range(30)))
        w.serve(engine, [questions[0]], 1, refs)  # loads all interventions
        for run in range(runs):
            first_token_s(engine, system + questions[0], (), f"{run}")
            for index, (question, ref) in enumerate(zip(questions, refs, strict=True)):
                times["cached"].append(first_token_s(engine, system + question, (ref,), f"{run}"))
                # A unique salt finds nothing in the cache. Fewer of these, since they take long.
                if index < REQUESTS // 8:
                    own = f"{run}-{index}"
                    times["not cached"].append(first_token_s(engine, system + question, (ref,), own))
    engine.close()
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    print(f"{SYSTEM_TOKENS} shared tokens and 20 to 40 of its own, {REQUESTS} interventions (l7, rank 4, all layers)")
    print(f"{w.machine()}; medians of {runs} runs")
    for name, figure in medians.items():
        print(f"{name:12} {figure:8.1f} ms  {figure / medians['not cached']:5.3f} of not cached")


if __name__ == "__main__":
    main()
