"""Measure penalties in a decode step of 32 sequences: `python benchmarks/penalties.py`. It needs no model.

Prints milliseconds a step, and the ratio to a step that counts all tokens of prompts and answers anew.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from itertools import chain

import numpy as np
import torch

from reftserve.server.engine.logits import adjust
from reftserve.server.engine.messages import SamplingParams, Submit
from reftserve.server.engine.sequence import Sequence

ROWS, PROMPT, ANSWER, VOCABULARY = 32, 1000, 64, 49152
SAMPLING = SamplingParams(max_tokens=ANSWER, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5)


def penalise_anew(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Count every token of the vocabulary in every sequence, then penalise all logits."""
    answer = counts([s.token_ids[s.n_prompt :] for s in sequences])
    seen = answer + counts([s.token_ids[: s.n_prompt] for s in sequences]) > 0
    penalised = torch.where(logits > 0, logits / SAMPLING.repetition_penalty, logits * SAMPLING.repetition_penalty)
    values = torch.where(seen, penalised, logits)
    values -= SAMPLING.frequency_penalty * answer
    logits.copy_(values - SAMPLING.presence_penalty * (answer > 0))


def counts(token_ids: list[list[int]]) -> torch.Tensor:
    """Return the number of each token in each list, [lists, vocabulary]."""
    rows = np.repeat(np.arange(len(token_ids)), [len(ids) for ids in token_ids])
    tokens = np.fromiter(chain.from_iterable(token_ids), dtype=np.int64, count=len(rows))
    index = (torch.from_numpy(rows), torch.from_numpy(tokens))
    return torch.zeros(len(token_ids), VOCABULARY).index_put_(index, torch.ones(len(rows)), accumulate=True)


def step_ms(penalise: Callable[[torch.Tensor, list[Sequence]], None], logits: torch.Tensor) -> float:
    """Return the median milliseconds of a step that appends a token to each sequence and penalises."""
    draw = random.Random(0)  # noqa: S311 - a workload, not a secret
    prompts = [[draw.randrange(VOCABULARY) for _ in range(PROMPT)] for _ in range(ROWS)]
    sequences = [Sequence.from_submit(Submit(str(row), prompt, SAMPLING)) for row, prompt in enumerate(prompts)]
    times = []
    for _ in range(ANSWER):
        wanted = logits.clone()
        began = time.perf_counter()
        penalise(wanted, sequences)
        times.append(time.perf_counter() - began)
        for sequence in sequences:
            sequence.append(draw.randrange(VOCABULARY))
    return 1000 * statistics.median(times)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    logits = torch.randn(ROWS, VOCABULARY)
    kept, anew = step_ms(adjust, logits), step_ms(penalise_anew, logits)
    print(f"{ROWS} rows, {PROMPT} prompt tokens: {kept:.2f} ms a step, counted anew {anew:.2f} ms: {anew / kept:.0f} x")


if __name__ == "__main__":
    main()
