"""Compare our training results with pyreft's on real data: `python benchmarks/parity.py FOLDER`.

FOLDER is that of `real_data.py`; `benchmarks/peers/setup.sh` makes pyreft's environment. Rows and hyperparameters are
the same; initial weights and order differ, so means over seeds must agree. pyreft edits the last prompt token, our
`l1`. Each side scores itself with its own forward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import real_data
import torch
import workload as w
from peer import run_peer
from train import ALL, BATCH, RANK, plan

from reftserve.interventions import Positions
from reftserve.server.base.model import load_model
from reftserve.server.base.tokenizer import load_tokenizer
from reftserve.server.datasets import EncodedExample, Splits
from reftserve.server.training.activation_cache import ActivationCache, Arena
from reftserve.server.training.trainer import Trainer, advance
from reftserve.server.training.varlen import VarlenModel

POSITIONS, ARENA_BYTES = "l1", 2 << 30


def ours(
    packed: VarlenModel, rows: list[EncodedExample], test: list[EncodedExample], epochs: int, seeds: Sequence[int]
) -> list[dict[str, float]]:
    cache = ActivationCache(packed, min(ALL), {Positions.parse(POSITIONS)}, Arena(ARENA_BYTES))
    cache.fill(rows)
    cache.fill(test)
    found = []
    for seed in seeds:
        trainer = Trainer(cache, Splits(rows, test, test), plan(ALL, POSITIONS, epochs), seed=seed)
        while trainer.step < trainer.total_steps:
            advance([trainer])
        found.append(trainer.evaluate(test, trainer.intervention.lower()))
    return found


def as_rows(examples: Sequence[EncodedExample]) -> list[dict[str, Any]]:
    return [{"ids": list(e.prompt_ids + e.completion_ids), "n_prompt": len(e.prompt_ids)} for e in examples]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--dataset", default="sst2", choices=list(real_data.SOURCES))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--rows", type=int, default=200, help="to train on")
    arguments.add_argument("--test", type=int, default=400, help="rows that score")
    arguments.add_argument("--epochs", type=int, default=3)
    args = arguments.parse_args()
    torch.set_num_threads(2)
    tokenizer = load_tokenizer(w.MODEL)
    packed = VarlenModel(load_model(w.MODEL, torch.float32, torch.device("cpu")))
    rows = real_data.load(args.dataset, args.folder, train=args.rows, validation=0, test=args.test, seed=0)
    training, test = (real_data.encoded(tokenizer, chats) for chats in (rows.train, rows.test))
    job = {
        "model": str(w.MODEL),
        "layers": ALL,
        "positions": POSITIONS,
        "rank": RANK,
        "epochs": args.epochs,
        "batch_size": BATCH,
        "seeds": list(range(args.seeds)),
        "prompts": [tokenizer.decode(e.prompt_ids) for e in training],
        "completions": [tokenizer.decode(e.completion_ids) for e in training],
        "rows": as_rows(training),
        "test": as_rows(test),
    }
    found = {
        "ours": ours(packed, training, test, args.epochs, range(args.seeds)),
        "pyreft": [json.loads(result) for result in run_peer("pyreft", "pyreft_score.py", job)],
    }
    print(
        f"{args.dataset}: {len(training)} rows, {args.epochs} epochs, {len(test)} rows score; rank {RANK}, all layers"
    )
    for name, scores in found.items():
        exact = [100 * each["exact_match"] for each in scores]
        print(
            f"{name:7} {statistics.mean(exact):5.1f} % on average of {args.seeds} seeds, "
            f"loss {statistics.mean(each['loss'] for each in scores):.3f} "
            f"({', '.join(f'{each:.1f} %' for each in exact)})"
        )


if __name__ == "__main__":
    main()
