"""Compare the recipe for an absent `method` with the best of a grid: `python benchmarks/recipes.py FOLDER`.

FOLDER is that of `real_data.py`. Each data set and seed has 200 training and 50 validation rows. The grid of 24 plans
(layers x positions x rank x learning rate) runs for the recipe's number of epochs, without halving. The best of each
by validation is scored on the test rows: the share of answers that greedy decoding gives word for word.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import real_data
import torch
import workload as w

from reftserve.interventions import NonFiniteError, PlacedEdit, fingerprint
from reftserve.server.base.model import load_model
from reftserve.server.base.tokenizer import load_tokenizer
from reftserve.server.datasets import EncodedExample, Splits
from reftserve.server.training.activation_cache import ActivationCache, ActivationCaches, Arena
from reftserve.server.training.candidates import DataSize
from reftserve.server.training.plan import Plan, Variant
from reftserve.server.training.recipe import make_plan
from reftserve.server.training.sweep import Sweep, make_trainers
from reftserve.server.training.trainer import Trainer, advance
from reftserve.server.training.varlen import VarlenModel

LAYERS = ([10], [15], list(range(30)))
POSITIONS = ("l1", "l4")
RANKS = (4, 16)
LEARNING_RATES = (1e-3, 4e-3)
MAX_LENGTH, ARENA_BYTES, TEST_CHUNK = 1024, 2 << 30, 200


@dataclass(frozen=True)
class Winner:
    """The selected trial. seconds: of the whole search."""

    plan: Plan
    edits: tuple[PlacedEdit, ...]
    validation: dict[str, float]
    seconds: float

    def __str__(self) -> str:
        plan, layers = self.plan, self.plan.layers
        where = f"{len(layers)} layers" if len(layers) > 1 else f"layer {layers[0]}"
        return f"{where} {plan.positions} rank {plan.rank} lr {plan.learning_rate:g}"


def recipe(packed: VarlenModel, splits: Splits, plan: Plan, seed: int) -> tuple[Winner, list[dict[str, object]]]:
    began = time.perf_counter()
    sweep = Sweep(make_trainers(ActivationCaches(packed, Arena(ARENA_BYTES)), splits, plan, seed=seed))
    while not sweep.has_ended:
        sweep.advance()
        if sweep.validates:
            sweep.validate()
    return _winner(sweep.leader, time.perf_counter() - began), sweep.table


def best_of_grid(packed: VarlenModel, splits: Splits, plan: Plan, seed: int) -> tuple[Winner, list[dict[str, object]]]:
    grid = [
        Variant(layers=layers, positions=positions, rank=rank, learning_rate=rate)
        for layers, positions, rank, rate in itertools.product(LAYERS, POSITIONS, RANKS, LEARNING_RATES)
    ]
    began = time.perf_counter()
    swept = plan.model_copy(update={"sweep": grid})
    trainers = make_trainers(ActivationCaches(packed, Arena(ARENA_BYTES)), splits, swept, seed=seed)
    while trainers[0].step < trainers[0].total_steps:
        advance(trainers)
        if trainers[0].step % trainers[0].steps_per_epoch == 0:
            trainers = [trainer for trainer in trainers if _is_finite_and_validated(trainer)]
    ranked = sorted(trainers, key=lambda trainer: (trainer.best or {})["loss"])
    varied = set(Variant.model_fields)
    table = [{**trainer.plan.model_dump(include=varied), **(trainer.best or {})} for trainer in ranked]
    return _winner(ranked[0], time.perf_counter() - began), table


def _is_finite_and_validated(trainer: Trainer) -> bool:
    try:
        trainer.validate()
    except NonFiniteError:
        return False
    return True


def _winner(trainer: Trainer, seconds: float) -> Winner:
    return Winner(trainer.plan, trainer.best_edits(), trainer.best or {}, seconds)


def test_scores(packed: VarlenModel, test: list[EncodedExample], winners: Sequence[Winner]) -> list[float]:
    """Return the exact match of the base and of each winner. Suffix-only winners share the computed prompts."""
    exact = [0.0] * (1 + len(winners))
    for start in range(0, len(test), TEST_CHUNK):
        chunk = test[start : start + TEST_CHUNK]
        for edits_prefix in (False, True):
            numbers = [i for i, each in enumerate(winners) if each.plan.edits_prefix is edits_prefix]
            if not numbers:
                continue
            plans = [winners[i].plan for i in numbers]
            cache = ActivationCache(
                packed,
                min(layer for plan in plans for layer in plan.layers),
                {positions for plan in plans for positions in plan.edited},
                Arena(ARENA_BYTES),
            )
            cache.fill(chunk)
            scorer = Trainer(cache, Splits(chunk, chunk, chunk), plans[0], seed=0)
            for i in numbers:
                exact[i + 1] += scorer.evaluate(chunk, winners[i].edits)["exact_match"] * len(chunk)
            if not edits_prefix:
                exact[0] += scorer.evaluate(chunk, [])["exact_match"] * len(chunk)
    return [each / len(test) for each in exact]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--datasets", nargs="+", default=["sst2", "trec"], choices=list(real_data.SOURCES))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--rows", type=int, default=200, help="to train on")
    arguments.add_argument("--validation", type=int, default=50, help="rows that select")
    arguments.add_argument("--test", type=int, help="rows; all when absent")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--verbose", action="store_true", help="the tables of all trials")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer, base = load_tokenizer(w.MODEL), fingerprint(w.MODEL)
    packed = VarlenModel(load_model(w.MODEL, torch.float32, torch.device("cpu")))
    print(f"{args.rows} rows train, {args.validation} select; {w.machine()}")
    differences = []
    for name in args.datasets:
        winners: list[Winner] = []
        for seed in range(args.seeds):
            rows = real_data.load(
                name, args.folder, train=args.rows, validation=args.validation, test=args.test, seed=seed
            )
            parts = [real_data.encoded(tokenizer, chats) for chats in (rows.train, rows.validation, rows.test)]
            splits, test = Splits(*parts[:2], parts[1]), parts[2]
            prompts, completions = zip(*((len(e.prompt_ids), len(e.completion_ids)) for e in parts[0]), strict=True)
            size = DataSize(len(parts[0]), int(statistics.median(prompts)), int(statistics.median(completions)))
            plan = make_plan(None, base, size, max_length=MAX_LENGTH, seed=seed)
            for search in (recipe, best_of_grid):
                winner, table = search(packed, splits, plan, seed)
                winners.append(winner)
                print(f"  {name}, seed {seed}, {search.__name__}: {winner}", file=sys.stderr, flush=True)
                for row in table if args.verbose else ():
                    print(f"    {row}", file=sys.stderr, flush=True)
        base_score, *scores = test_scores(packed, test, winners)
        print(f"\n{name}: {len(test)} test rows, {plan.n_epochs} epochs; the base {100 * base_score:.1f} %")
        for number, (winner, score) in enumerate(zip(winners, scores, strict=True)):
            seed, is_grid = divmod(number, 2)
            validation = f"loss {winner.validation['loss']:.3f}, {100 * winner.validation['exact_match']:.0f} %"
            print(
                f"  seed {seed}  {'grid  ' if is_grid else 'recipe'}  {100 * score:5.1f} %  (validation {validation})"
                f"  {winner.seconds:5.0f} s  {winner}"
            )
        gaps = [100 * (scores[i] - scores[i + 1]) for i in range(0, len(scores), 2)]
        differences += gaps
        print(f"  recipe - grid: {statistics.mean(gaps):+.1f} points")
    print(f"\nrecipe - grid over all: {statistics.mean(differences):+.1f} points")


if __name__ == "__main__":
    main()
