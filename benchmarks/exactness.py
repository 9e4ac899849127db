"""Compare requests in a mixture with the same requests alone, on a real model: `python benchmarks/exactness.py`.

In float32 the reference is `attach()` on the transformers model, in one pass along the engine's tokens. Each token must
be the best, or within twice the tolerance of it: a near-tie, which is counted and listed. In int8 the reference is the
same engine with this request alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import workload as w
from torch import Tensor
from transformers import PreTrainedModel

sys.path.append(str(w.ROOT / "tests" / "support"))

from engine_oracle import (
    RecordingRunner,
    Run,
    oracle_logits,
    random_edit,
    request,
    run_until_done,
    scaled_edits,
)

from reftserve.interventions import (
    BaseFingerprint,
    PlacedEdit,
    Positions,
    fingerprint,
    load_artifact,
    save_artifact,
)
from reftserve.server.base.model import load_model
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import Submit
from reftserve.server.engine.runner import Logits
from reftserve.server.engine.scheduler import Batch

TOLERANCE = 1e-4  # float32: share of the largest logit
INT8_TOLERANCE = 2e-2  # int8: share of the norm of the logits
BLOCK_SIZE, KV_TOKENS, BANK_ROWS = 16, 160, 2000  # small, so that requests are preempted and interventions swapped
ALL_POSITIONS = (["l1"], ["f7+l7"], ["f5", "l5"], ["prompt"], ["generated"], ["all"])


class ForcedRunner(RecordingRunner):
    """A runner that makes each request of `forced` answer with its given tokens, and records the model's logits."""

    def __init__(self, model: PreTrainedModel, **sizes: int) -> None:
        super().__init__(model, **sizes)
        self.forced: dict[str, list[int]] = {}

    @torch.inference_mode()
    def step(self, batch: Batch, token_ids: Tensor | None = None) -> Logits:
        """Compute the batch, then make the given token the only choice."""
        logits = super().step(batch, token_ids)
        for chunk, row in zip((c for c in batch.chunks if c.samples), logits.sampling, strict=True):
            index = chunk.stop - chunk.sequence.n_prompt
            tokens = self.forced.get(chunk.sequence.request_id, [])
            if index < len(tokens):  # the engine runs one step ahead
                row.fill_(-torch.inf)
                row[tokens[index]] = 0
        return logits


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it arrives, and the step before which it is cancelled, if any."""

    submit: Submit
    step: int
    cancelled: int | None


@dataclass(frozen=True)
class Tie:
    """A token with a rival within twice the tolerance. gap: between the two, as a share of the largest logit."""

    request_id: str
    index: int
    gap: float
    differs: bool


@dataclass
class Comparison:
    """largest: difference, as a share of the largest logit (int8: of the norm). unequal: tokens beyond the limit."""

    requests: int
    cancelled: int
    preemptions: int
    cached_tokens: int
    tokens: int = 0
    largest: float = 0.0
    ties: list[Tie] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)

    def add(self, name: str, tokens: list[int], mixed: Tensor, alone: Tensor, *, int8: bool) -> None:
        """Compare one request's answer. mixed, alone: logits after the same tokens, [tokens, vocabulary]."""
        largest = alone.abs().amax(-1)
        difference = (mixed - alone).abs().amax(-1)
        shares = (mixed - alone).norm(dim=-1) / alone.norm(dim=-1) if int8 else difference / largest
        # A rival may win within twice the allowed difference, or in int8 twice the found one.
        reach = 2 * (difference if int8 else TOLERANCE * largest)
        best = alone.topk(2).values
        for index, token in enumerate(tokens):
            behind = float(best[index, 0] - alone[index, token])
            gap = behind if behind > 0 else float(best[index, 0] - best[index, 1])
            if gap <= reach[index]:
                self.ties.append(Tie(name, index, gap / float(largest[index]), behind > 0))
            if shares[index] > (INT8_TOLERANCE if int8 else TOLERANCE) or behind > reach[index]:
                self.unequal.append(f"{name}[{index}]: {float(shares[index]):.1e} off, {behind:.1e} behind the best")
        self.tokens += len(tokens)
        self.largest = max(self.largest, float(shares.max()))


def compare(model: Path, scratch: Path, *, requests: int, int8: bool = False, seed: int = 0) -> Comparison:
    """Serve random requests together, then each alone, and compare. scratch: folder for the interventions."""
    rng = random.Random(seed)  # noqa: S311 - a workload, not a secret
    folders = interventions(scratch, fingerprint(model), rng)
    arrivals = workload(model, folders, requests, rng)
    loaded = load_model(model, torch.float32, torch.device("cpu"))
    text = loaded.config.get_text_config()
    runner = ForcedRunner(
        loaded,
        kv_cache_bytes=KV_TOKENS * text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim * 4,
        block_size=BLOCK_SIZE,
        bank_bytes=BANK_ROWS * 4 * (2 * text.hidden_size + 2),
        int8=int8,
    )
    engine = Engine(runner, max_batch_tokens=96, max_sequences=16)
    run = serve(engine, arrivals)
    stats = engine.stats()
    engine.close()
    cancelled = sum(output.finish_reason == "cancelled" for output in run.finished.values())
    found = Comparison(len(arrivals), cancelled, stats.preemptions, stats.cached_prompt_tokens)
    answered = [a.submit for a in arrivals if run.tokens[a.submit.request_id]]
    # Copied, because the references record in the same runner.
    mixed, runner.logits = runner.logits, {}
    references = alone_in_engine(runner, answered, run) if int8 else alone_attached(model, answered, run)
    for submit, alone in zip(answered, references, strict=True):
        name, n_prompt = submit.request_id, len(submit.prompt_ids)
        tokens = run.tokens[name]
        rows = torch.stack([mixed.pop((name, n_prompt + index)) for index in range(len(tokens))])
        found.add(name, tokens, rows, alone, int8=int8)
    return found


def interventions(folder: Path, base: BaseFingerprint, rng: random.Random) -> list[Path]:
    """Make random edits of rank 1 to 16 at all kinds of positions, in one, some or all layers, linear or not."""
    folders = []
    for seed in range(24):
        rank, positions = rng.choice((1, 2, 4, 8, 16)), ALL_POSITIONS[seed % len(ALL_POSITIONS)]
        layers = sorted(rng.sample(range(base.num_layers), rng.choice((1, 5, base.num_layers))))
        # Scaled so that a column writes about as much as it reads: edits in all layers then keep a language model.
        edits = [
            PlacedEdit(
                layer,
                Positions.parse(where),
                random_edit(rank, base.hidden_size, 10000 * seed + 100 * layer + part, rng.choice((0, 0, 2, 3))).scaled(
                    base.hidden_size**-0.5
                ),
            )
            for layer in layers
            for part, where in enumerate(positions)
        ]
        folders.append(folder / str(seed))
        name = "+".join(positions)
        save_artifact(
            folders[-1], edits, family="loreft", positions=name, rank=rank, base=base, tied=len(positions) == 1
        )
    return folders


def workload(model: Path, folders: list[Path], count: int, rng: random.Random) -> list[Arrival]:
    """Make three arrivals per step; half begin with one of two texts, and one in twelve is cancelled."""
    own = w.prompts(count, 4, 24, seed=1, model=model)
    shared = w.prompts(2, 24, 24, seed=2, model=model)
    arrivals = []
    for index in range(count):
        uses = rng.sample(folders, rng.choice((0, 1, 1, 2)))
        submit = request(
            str(index),
            (rng.choice(shared) if index % 2 else []) + own[index],
            uses=[(folder, rng.choice((0.5, 1.0, -0.7, 1.3))) for folder in uses],
            max_tokens=rng.choice((4, 16, 32)),
        )
        step = index // 3
        arrivals.append(Arrival(submit, step, step + rng.randint(1, 15) if rng.random() < 1 / 12 else None))
    return arrivals


def serve(engine: Engine, arrivals: list[Arrival]) -> Run:
    run = Run()
    for step in range(max(max(a.step, a.cancelled or 0) for a in arrivals) + 1):
        for arrival in arrivals:
            if arrival.step == step:
                engine.submit(arrival.submit)
            if arrival.cancelled == step:
                engine.cancel(arrival.submit.request_id)
        run.take(engine.step().outputs)
    return run_until_done(engine, run)


def alone_attached(model: Path, submits: list[Submit], run: Run) -> Iterator[Tensor]:
    plain = load_model(model, torch.float32, torch.device("cpu"))
    for submit in submits:
        edits = [e for ref in submit.interventions for e in scaled_edits(load_artifact(Path(ref.folder)), ref.scale)]
        tokens = submit.prompt_ids + run.tokens[submit.request_id]
        yield oracle_logits(plain, tokens, len(submit.prompt_ids), edits)


def alone_in_engine(runner: ForcedRunner, submits: list[Submit], run: Run) -> Iterator[Tensor]:
    for submit in submits:
        name, tokens = submit.request_id, run.tokens[submit.request_id]
        runner.forced = {name: tokens}
        engine = Engine(runner, max_batch_tokens=512, max_sequences=1, prefix_cache=False)
        engine.submit(submit)
        assert run_until_done(engine).tokens[name][: len(tokens)] == tokens
        engine.close()
        yield torch.stack([runner.logits.pop((name, len(submit.prompt_ids) + i)) for i in range(len(tokens))])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--requests", type=int, default=200)
    arguments.add_argument("--quantization", choices=["none", "int8"], default="none")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--threads", type=int, default=2)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    int8 = args.quantization == "int8"
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(w.MODEL, Path(scratch), requests=args.requests, int8=int8, seed=args.seed)
    reference, share = ("the request alone", "the norm") if int8 else ("attach()", "the largest logit")
    differing = [tie for tie in found.ties if tie.differs]
    print(f"{'int8' if int8 else 'float32'}, beside {reference}; {w.machine()}")
    print(f"requests                           {found.requests}, {found.cancelled} of them cancelled on the way")
    print(f"preemptions; prompt tokens cached  {found.preemptions}; {found.cached_tokens}")
    print(f"tokens compared                    {found.tokens}")
    print(f"largest difference of logits       {found.largest:.2e} of {share}")
    print(f"near-ties                          {len(found.ties)}, of which {len(differing)} fell the other way")
    for tie in found.ties:
        print(f"  request {tie.request_id}, token {tie.index}: gap {tie.gap:.1e}{', differs' if tie.differs else ''}")
    print(f"tokens that are not equal          {len(found.unequal)}")
    for line in found.unequal:
        print(f"  {line}")
    sys.exit(1 if found.unequal else 0)


if __name__ == "__main__":
    main()
