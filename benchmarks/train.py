"""Compare training speed with pyreft and PEFT: `python benchmarks/train.py` (`make bench-train` sets up the peers).

200 film reviews (SST-2) as chats with one-word answers, batches of 10, float32. Our time includes filling the cache.
The peers take the same time for every epoch, so they run one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
import workload as w
from peer import run_peer

from reftserve.interventions import Positions
from reftserve.server.base.model import load_model
from reftserve.server.base.tokenizer import load_tokenizer
from reftserve.server.datasets import EncodedExample, Splits, encode, read_examples
from reftserve.server.training.activation_cache import ActivationCache, Arena
from reftserve.server.training.plan import Plan
from reftserve.server.training.sweep import Sweep
from reftserve.server.training.trainer import Trainer
from reftserve.server.training.varlen import VarlenModel

ROWS, VALIDATION, BATCH, RANK = 200, 20, 10, 4
MIDDLE, ALL = [15], list(range(30))
CASES = {
    "middle layer, l1": (MIDDLE, "l1"),
    "all layers, l1": (ALL, "l1"),
    "all layers, f7+l7": (ALL, "f7+l7"),
}
SWEEP = "sweep"


def plan(layers: list[int], positions: str, epochs: int) -> Plan:
    return Plan(
        family="loreft",
        layers=layers,
        positions=positions,
        rank=RANK,
        dropout=0.0,
        tied=True,
        n_epochs=epochs,
        batch_size=BATCH,
        learning_rate=4e-3,
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_length=1024,
    )


def ours(packed: VarlenModel, data: list[EncodedExample], runs: list[Plan], epochs: list[int]) -> dict[int, float]:
    """Return examples per second after this many epochs; several trials count as the published one alone."""
    began = time.perf_counter()
    lowest = min(min(run.layers) for run in runs)
    cache = ActivationCache(packed, lowest, {Positions.parse(run.positions) for run in runs}, Arena(4 << 30))
    cache.fill(data)
    splits = Splits(data, data[:VALIDATION], data[:VALIDATION])
    sweep = Sweep([Trainer(cache, splits, run, seed=0) for run in runs])
    found = {}
    while not sweep.has_ended:
        sweep.advance()
        if sweep.validates:
            sweep.validate()
        epoch, rest = divmod(sweep.step, sweep.steps_per_epoch)
        if rest == 0 and epoch in epochs:
            found[epoch] = epoch * len(data) / (time.perf_counter() - began)
    return found


def peer(environment: str, script: str, job: dict[str, object]) -> float:
    return float(run_peer(environment, script, job)[0].split()[0])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--no-peers", action="store_true", help="ours alone")
    arguments.add_argument("--cases", nargs="+", choices=[*CASES, SWEEP], default=[*CASES, SWEEP], help="these alone")
    args = arguments.parse_args()
    cases = {name: case for name, case in CASES.items() if name in args.cases}
    torch.set_num_threads(2)
    tokenizer = load_tokenizer(w.MODEL)
    files = [w.ROOT / "examples" / f"sentiment.{part}.jsonl" for part in ("train", "heldout")]
    data = [encode(tokenizer, example) for file in files for example in read_examples(file)][:ROWS]
    packed = VarlenModel(load_model(w.MODEL, torch.float32, torch.device("cpu")))
    tokens = statistics.mean(example.length for example in data)
    print(f"{len(data)} rows of {tokens:.0f} tokens on average, batches of {BATCH}, rank {RANK}; {w.machine()}")
    figures: dict[str, list[float]] = {}

    def took(name: str, figure: float) -> None:
        print(f"  {name}: {figure:.2f}", file=sys.stderr, flush=True)
        figures.setdefault(name, []).append(figure)

    for _ in range(args.runs):
        for name, (layers, positions) in cases.items():
            epochs = [5, 20] if positions == "l1" else [1]
            for count, figure in ours(packed, data, [plan(layers, positions, max(epochs))], epochs).items():
                took(f"ours, {name}, {count} epochs", figure)
        trials = [plan([layer], "l1", 5) for layer in range(8, 24, 2)]
        for label, sweep in (("one trial", trials[4:5]), ("8 trials", trials)) if SWEEP in args.cases else ():
            took(f"ours, {label}", ours(packed, data, sweep, [5])[5])
        if args.no_peers:
            continue
        job = {"model": str(w.MODEL), "batch_size": BATCH, "rank": RANK, "epochs": 1}
        texts = {
            "prompts": [tokenizer.decode(e.prompt_ids) for e in data],
            "completions": [tokenizer.decode(e.completion_ids) for e in data],
        }
        for name, (layers, positions) in cases.items():
            each = {**job, **texts, "layers": layers, "positions": positions}
            took(f"pyreft, {name}", peer("pyreft", "pyreft_train.py", each))
        rows = [{"ids": list(e.prompt_ids + e.completion_ids), "n_prompt": len(e.prompt_ids)} for e in data]
        took("PEFT LoRA r=8", peer("peft", "peft_train.py", {**job, "rows": rows}))
    median = {name: statistics.median(values) for name, values in figures.items()}
    for name, figure in median.items():
        print(f"{name:40} {figure:7.2f} examples/s")
    if SWEEP in args.cases:
        print(f"8-trial sweep / one trial, wall time: {median['ours, one trial'] / median['ours, 8 trials']:.2f}")
    if not args.no_peers:
        for name, (_, positions) in cases.items():
            for count in [5, 20] if positions == "l1" else [1]:
                figure = median[f"ours, {name}, {count} epochs"]
                against = f"{figure / median[f'pyreft, {name}']:6.2f} of pyreft"
                print(f"{name}, {count} epochs: {against}  {figure / median['PEFT LoRA r=8']:6.2f} of PEFT LoRA")


if __name__ == "__main__":
    main()
