"""Train on real data sets through the API, and compare with PEFT's LoRA: `python benchmarks/datasets.py FOLDER`.

FOLDER is that of `real_data.py`; `benchmarks/peers/setup.sh` makes PEFT's environment. For each data set a server runs
a job without `method`. LoRA (rank 8, all linear layers) gets the same parts and number of epochs; its best epoch by
validation loss is scored on the same rows in the same way: half of the held-out rows select, half score.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import real_data
import workload as w
from peer import run_peer

from reftserve.client import Client
from reftserve.server.base.tokenizer import load_tokenizer
from reftserve.server.datasets import EncodedExample, Splits, encode, read_examples, split

sys.path.append(str(w.ROOT / "tests" / "support"))

from running_server import running_server

BATCH, SEED = 8, 0


def through_the_api(client: Client, name: str, files: Sequence[Path]) -> tuple[dict[str, dict[str, Any]], int, str]:
    training, held_out = files
    job = client.train(training, name=name, validation_file=held_out, seed=SEED).wait()
    version = client.interventions.version(name)
    provenance = version.manifest["provenance"]
    figures = {"parameters": version.parameters, "bytes": version.bytes, "seconds": provenance["seconds"]}
    plan = provenance["hyperparameters"]
    shape = f"{len(plan['layers'])} layers, {plan['positions']}, rank {plan['rank']}, lr {plan['learning_rate']:g}"
    scores = provenance["scores"]
    found = {"base": scores["base"], "LoReFT, auto": {**scores["intervention"], **figures}}
    return found, int(job.data.hyperparameters["n_epochs"]), shape


def lora(splits: Splits, epochs: int, learning_rate: float, threads: int) -> dict[str, Any]:
    def rows(examples: Sequence[EncodedExample]) -> list[dict[str, Any]]:
        return [{"ids": e.prompt_ids + e.completion_ids, "n_prompt": len(e.prompt_ids)} for e in examples]

    job = {
        "model": str(w.MODEL),
        "batch_size": BATCH,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "threads": threads,
        "train": rows(splits.train),
        "validation": rows(splits.validation),
        "test": rows(splits.test),
    }
    found: dict[str, Any] = json.loads(run_peer("peft", "peft_score.py", job)[0])
    return found


def show(name: str, found: dict[str, Any]) -> None:
    line = f"  {name:13} {100 * found['exact_match']:6.1f} %  loss {found['loss']:6.3f}"
    if "seconds" in found:
        line += f"  {found['parameters']:>10,} parameters  {found['bytes']:>10,} bytes  {found['seconds']:5.0f} s"
    print(line, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument(
        "--datasets", nargs="+", default=["sst2", "boolq", "equations"], choices=list(real_data.SOURCES)
    )
    arguments.add_argument("--rows", type=int, default=200, help="to train on")
    arguments.add_argument("--held-out", type=int, default=200, help="rows; half select, half score")
    arguments.add_argument("--lora-rate", type=float, default=1e-3, help="LoRA's learning rate")
    arguments.add_argument("--no-lora", action="store_true", help="base and LoReFT alone")
    arguments.add_argument("--threads", type=int, default=2)
    args = arguments.parse_args()
    tokenizer = load_tokenizer(w.MODEL)
    settings = {"REFTSERVE_ENGINE_THREADS": str(args.threads), "REFTSERVE_WORKER_THREADS": str(args.threads)}
    with (
        tempfile.TemporaryDirectory() as data,
        running_server(w.MODEL, Path(data), env=settings) as server,
        Client(server.url) as client,
    ):
        for name in args.datasets:
            rows = real_data.load(name, args.folder, train=args.rows, validation=0, test=args.held_out, seed=SEED)
            files = [Path(data) / f"{name}.{part}.jsonl" for part in ("train", "held-out")]
            for file, chats in zip(files, (rows.train, rows.test), strict=True):
                file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats), "utf-8")
            found, epochs, shape = through_the_api(client, name, files)
            parts = [[encode(tokenizer, example) for example in read_examples(file)] for file in files]
            splits = split(parts[0], parts[1], seed=SEED)
            print(f"\n{name}: {len(splits.train)} rows, {epochs} epochs, {len(splits.test)} rows score; {shape}")
            for label, figures in found.items():
                show(label, figures)
            if not args.no_lora:
                show("LoRA, rank 8", lora(splits, epochs, args.lora_rate, args.threads))


if __name__ == "__main__":
    main()
