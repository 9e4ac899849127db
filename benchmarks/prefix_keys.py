"""Measure the keys of a prompt's cached blocks: `python benchmarks/prefix_keys.py`. It needs no model.

Prints milliseconds for a prompt of 1,000 tokens, and the ratio to keys that ask each edit for its tokens in each block.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from reftserve.interventions import (
    BaseFingerprint,
    Intervention,
    LowRankEdit,
    PlacedEdit,
    Positions,
    load_artifact,
    save_artifact,
)
from reftserve.server.engine.prefix_cache import BlockKeys

TOKENS, BLOCK_SIZE, LAYERS, MOST_EDITS = 1000, 16, 30, 4096
BASE = BaseFingerprint(architecture="LlamaForCausalLM", hidden_size=8, num_layers=LAYERS, vocab_size=49152)
CASES = {
    "f7+l7, tied": ["f7+l7"] * LAYERS,
    "f7+l7, untied": ["f7", "l7"] * LAYERS,
    "prompt": ["prompt"] * LAYERS,
    "equal edits, as many as allowed": ["f7+l7"] * MOST_EDITS,
    "different edits, as many as allowed": [f"f{1 + number}" for number in range(MOST_EDITS)],
}


def intervention(folder: Path, positions: list[str]) -> Intervention:
    zeros, linear = torch.zeros(1, BASE.hidden_size), torch.zeros(1, dtype=torch.int8)
    edit = LowRankEdit(zeros, torch.zeros(1), zeros, linear, torch.ones(1))
    edits = [PlacedEdit(number % LAYERS, Positions.parse(each), edit) for number, each in enumerate(positions)]
    save_artifact(folder, edits, family="loreft", positions="f7+l7", rank=1, base=BASE)
    return load_artifact(folder)


def keys_by_edit(intervention: Intervention, token_ids: list[int]) -> bytes:
    """Return the last block's key as if each edit were asked for its tokens in each block."""
    key = b""
    for start in range(0, len(token_ids) // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE):
        stop = start + BLOCK_SIZE
        content = np.asarray(token_ids[start:stop], dtype=np.int64).tobytes()
        for number, site in enumerate(intervention.sites):
            offsets = site.positions.indices(len(token_ids), start, stop) - start
            if len(offsets):
                content += f"{intervention.content_hash} {number}".encode() + offsets.tobytes()
        key = hashlib.blake2b(key + content, digest_size=32).digest()
    return key


def keys_by_run(intervention: Intervention, token_ids: list[int]) -> bytes:
    """Return the last block's key as the engine computes it."""
    keys = BlockKeys("", ((intervention, 1.0),), len(token_ids), BLOCK_SIZE)
    return keys.of(token_ids, len(token_ids) // BLOCK_SIZE)[-1]


def median_ms(measured: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        measured()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=300)
    runs = arguments.parse_args().runs
    token_ids = list(range(TOKENS))
    print(f"keys of {TOKENS} tokens, blocks of {BLOCK_SIZE}: ms a request, once an intervention, by edit / by run")
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, positions) in enumerate(CASES.items()):
            used = intervention(Path(scratch) / str(number), positions)
            once = median_ms(functools.partial(getattr, used, "edited_runs"), 1)
            by_run = median_ms(functools.partial(keys_by_run, used, token_ids), runs)
            by_edit = median_ms(functools.partial(keys_by_edit, used, token_ids), 1 + runs // 100)
            print(f"{name:36} {by_run:6.3f} ms {once:7.2f} ms {by_edit / by_run:8.0f}")


if __name__ == "__main__":
    main()
