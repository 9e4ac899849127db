"""Measure the cost of loads and swaps for waiting and running requests: `python benchmarks/residency.py`.

Swaps: 16 streams decode while 3 requests of 64 prompt tokens arrive per second, whose interventions are on disk, in
the bank, or none; the prefix cache is on, and no two prompts are equal. Cold: the time to the first token of a request
whose intervention is on disk, or in the bank.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import workload as w

from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import InterventionRef, SamplingParams, Submit

PROMPT_TOKENS = 64  # of arriving requests
HOT = 8
STREAMS, ARRIVALS_PER_S, SECONDS = 16, 3, 20.0  # long enough that p99 is not the longest step


def p99_gap(
    engine: Engine, prompts: list[list[int]], arriving: Iterator[list[int]], refs: list[InterventionRef], *, cold: bool
) -> float:
    """Return the p99 of the time between two tokens of a running stream, in seconds. refs: arrive one by one."""
    if cold:
        _forget(engine)
    else:
        for ref in refs:
            first_token_s(engine, prompts[0], ref)
    streams = {f"stream-{time.perf_counter()}-{i}" for i in range(STREAMS)}
    for name, prompt in zip(sorted(streams), prompts, strict=False):
        engine.submit(Submit(name, prompt, SamplingParams(max_tokens=2000)))
    while engine.scheduler.waiting or any(s.n_uncomputed > 1 for s in engine.scheduler.running):
        engine.step()
    last = dict.fromkeys(streams, time.perf_counter())
    gaps, began, arrived = [], time.perf_counter(), 0
    while (now := time.perf_counter()) - began < SECONDS:
        while arrived < (now - began) * ARRIVALS_PER_S:
            uses = (refs[arrived % len(refs)],) if refs else ()
            engine.submit(Submit(f"{began}-{arrived}", next(arriving), SamplingParams(max_tokens=1), uses))
            arrived += 1
        outputs = engine.step().outputs
        now = time.perf_counter()
        for output in outputs:
            if output.request_id in last:
                gaps.append(now - last[output.request_id])
                last[output.request_id] = now
    for name in streams:
        engine.cancel(name)
    while engine.has_work or engine.is_loading:
        engine.step()
    return statistics.quantiles(gaps, n=100)[98]


def first_token_s(engine: Engine, prompt: list[int], ref: InterventionRef) -> float:
    began = time.perf_counter()
    engine.submit(Submit(f"{began}", prompt, SamplingParams(max_tokens=1), (ref,)))
    while not engine.step().outputs:
        time.sleep(0.001 if engine.is_loading and not engine.has_work else 0)  # like the engine's process
    return time.perf_counter() - began


def _forget(engine: Engine) -> None:
    engine.loader._kept.clear()
    engine.loader._bytes = 0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    runs = arguments.parse_args().runs
    torch.set_num_threads(2)
    prompts = w.prompts(STREAMS, 59, 72)
    arriving = iter(w.prompts(10_000, PROMPT_TOKENS, PROMPT_TOKENS, seed=1))
    # Room for about 12 interventions: each arrival evicts one.
    engine = w.make_engine(bank_bytes=8 << 20)
    with tempfile.TemporaryDirectory() as scratch:
        refs = w.interventions(Path(scratch), 500, positions="f7+l7", rank=4, layers=tuple(range(30)))
        figures = w.medians(
            {
                "none": lambda: p99_gap(engine, prompts, arriving, [], cold=False),
                "hot": lambda: p99_gap(engine, prompts, arriving, refs[:HOT], cold=False),
                "swaps": lambda: p99_gap(engine, prompts, arriving, refs, cold=True),
            },
            runs,
        )
        print(f"{STREAMS} streams, {ARRIVALS_PER_S} requests/s beside them; {w.machine()}; median of {runs}")
        none, hot, swaps = (1000 * figures[name] for name in ("none", "hot", "swaps"))
        print(f"p99 gap: {none:.1f} ms without interventions, {hot:.1f} ms with hot ones, {swaps:.1f} ms from disk")
        print(f"from disk / hot {swaps / hot:.3f}, from disk / none {swaps / none:.3f}")
        extra = []
        for ref in refs[: 10 * runs]:
            _forget(engine)
            cold = first_token_s(engine, next(arriving), ref)
            extra.append(cold - first_token_s(engine, next(arriving), ref))
        print(f"cold first token, extra over hot: median {1000 * statistics.median(extra):.1f} ms")
    engine.close()


if __name__ == "__main__":
    main()
