"""The trainer: one intervention, one frozen base, optimizer steps that can stop and go on exactly where they were.

Everything that a step depends on follows from the plan, the seed and the number of the step (order of the examples,
learning rate, dropout), so a checkpoint is the weights, the optimizer's moments and the best weights so far.

Best by validation loss, but of states whose losses are within the newest one's standard error the newest: by then the
learning rate has fallen. On labels, where the loss of a fine model rises again as it becomes sure of its errors, the
lowest loss alone took early weights with fewer right answers (docs/decisions.md).

`advance` takes several trainers of one cache a step further in the same forward passes: the rows of a pass belong to
different trainers, each one's edits touch only its own, so no gradient reaches another.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional

from reftserve.interventions import NonFiniteError, PlacedEdit, Positions, TrainableIntervention
from reftserve.server.datasets import EncodedExample, Splits
from reftserve.server.training.activation_cache import ActivationCache
from reftserve.server.training.plan import Plan
from reftserve.server.training.scores import Score
from reftserve.server.training.spans import Batch, VarlenRows
from reftserve.server.training.varlen import RowEdit

BUCKET_BATCHES = 16
MAX_ROWS = 2048  # of one pass with gradients, which keeps every layer's activations

Place = tuple[int, Positions, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did. tokens: completion tokens that it learned from."""

    step: int
    loss: float
    learning_rate: float
    tokens: int


class Trainer:
    """AdamW on the intervention's parameters, gradients clipped; the base never changes.

    Raises ValueError when the cache does not hold for the plan's layers and positions.
    """

    def __init__(self, cache: ActivationCache, splits: Splits, plan: Plan, *, seed: int) -> None:
        self.cache = cache
        self.splits = splits
        self.plan = plan
        self.seed = seed
        packed = cache.packed
        self.intervention = TrainableIntervention(plan.intervention, packed.hidden_size, seed=seed).to(packed.device)
        sites = self.intervention.sites
        if not cache.is_valid_for([layer for layer, _ in sites], [positions for _, positions in sites]):
            raise ValueError(f"edits at {sites} change what the cache keeps from layer {cache.lowest} on")
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=plan.learning_rate, fused=True)
        self.steps_per_epoch = plan.steps_per_epoch(len(splits.train))
        self.total_steps = plan.n_epochs * self.steps_per_epoch
        self.step = 0
        self.trained_tokens = 0
        self.best: dict[str, float] | None = None
        self.lowest_loss, self.lowest_step = math.inf, 0
        self.lowest_losses: list[float] = []  # then, of each validation example, summed over its tokens
        self._best_state: dict[str, Tensor] = {}

    def advance(self) -> StepMetrics:
        """Do one optimizer step."""
        return advance([self])[0]

    def places(self) -> list[Place]:
        """What the step edits where: layer, positions, and what is added to the rows there, which has gradients."""
        return [
            (layer, positions, self._delta(number, family))
            for number, (layer, positions, family) in enumerate(self.intervention.placed())
        ]

    def batch(self) -> list[EncodedExample]:
        """The examples of the next step."""
        epoch, index = divmod(self.step, self.steps_per_epoch)
        return [self.splits.train[i] for i in self._epoch_batches(epoch)[index]]

    def update(self, loss: float, tokens: int) -> StepMetrics:
        """Take the optimizer's step with the gradients that are there."""
        learning_rate = self._learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        torch.nn.utils.clip_grad_norm_(self.intervention.parameters(), self.plan.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.trained_tokens += tokens
        return StepMetrics(self.step, loss, learning_rate, tokens)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return math.ceil(self.plan.warmup_ratio * self.total_steps)

    def validate(self) -> dict[str, float]:
        """Score the validation split, and remember the weights unless older ones are clearly better.

        Raises NonFiniteError when weights or loss are no finite numbers.
        """
        found = self.score(self.splits.validation, self.intervention.lower())
        score = found.means()
        if not math.isfinite(score["loss"]):
            raise NonFiniteError(f"the validation loss after step {self.step} is not a finite number")
        if score["loss"] < self.lowest_loss:
            self.lowest_loss, self.lowest_step, self.lowest_losses = score["loss"], self.step, found.losses
        if self.best is None or score["loss"] - score["loss_stderr"] <= self.lowest_loss:
            self.best = {**score, "step": self.step}
            self._best_state = {name: tensor.clone() for name, tensor in self.intervention.state_dict().items()}
        return score

    def best_edits(self) -> tuple[PlacedEdit, ...]:
        """The edits of the best weights, on the CPU."""
        current = {name: tensor.clone() for name, tensor in self.intervention.state_dict().items()}
        self.intervention.load_state_dict(self._best_state)
        edits = self.intervention.lower()
        self.intervention.load_state_dict(current)
        return tuple(PlacedEdit(e.layer, e.positions, e.edit.to(torch.device("cpu"))) for e in edits)

    def evaluate(self, examples: Sequence[EncodedExample], edits: Sequence[PlacedEdit]) -> dict[str, float]:
        """Score examples with edits; without any, that is the base."""
        return self.score(examples, edits).means()

    @torch.no_grad()
    def score(self, examples: Sequence[EncodedExample], edits: Sequence[PlacedEdit]) -> Score:
        """Score examples with edits, in the order of the examples."""
        places: list[Place] = [(e.layer, e.positions, e.edit.to(self.cache.packed.device).delta) for e in edits]
        score, order = Score(), list[EncodedExample]()
        for spans in self.cache.passes([Batch(examples, {e.positions for e in edits})], MAX_ROWS):
            rows = VarlenRows(spans, self.cache.packed.device)
            logits = self.cache.logits(rows, _row_edits(rows, [places]))
            score.add(logits, rows.labels, [span.targets for span in rows.scored])
            order += [span.example for span in rows.scored]
        # Passes put examples in an order of their own, which differs between trials; pairs of losses need one order.
        numbers = {example: number for number, example in enumerate(order)}
        return score.reordered([numbers[example] for example in examples])

    def save(self, folder: Path, name: str = "state") -> None:
        """Write a checkpoint into an existing folder: two files of this name."""
        tensors = {f"intervention.{key}": t for key, t in self.intervention.state_dict().items()}
        tensors |= {f"best.{key}": t for key, t in self._best_state.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": t for key, t in state.items()}
        # Not save_file: to it a full disk is no OSError.
        state_bytes = save({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
        (folder / f"{name}.safetensors").write_bytes(state_bytes)
        meta = {
            "step": self.step,
            "trained_tokens": self.trained_tokens,
            "best": self.best,
            "lowest": [self.lowest_loss, self.lowest_step],
            "lowest_losses": self.lowest_losses,
        }
        (folder / f"{name}.json").write_text(json.dumps(meta))

    def load(self, folder: Path, name: str = "state") -> None:
        """Go on from a checkpoint of the same plan, seed and data."""
        tensors = load_file(folder / f"{name}.safetensors", device=str(self.cache.packed.device))
        self.intervention.load_state_dict(_below("intervention.", tensors))
        self._best_state = _below("best.", tensors)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _below("optimizer.", tensors).items():
            index, moment = key.split(".", 1)
            if tensor.dim():  # fused AdamW walks a parameter and its moments in the order of memory
                tensor = torch.empty_like(parameters[int(index)]).copy_(tensor)
            state.setdefault(int(index), {})[moment] = tensor
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": state})
        meta: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        self.step, self.trained_tokens, self.best = meta["step"], meta["trained_tokens"], meta["best"]
        self.lowest_loss, self.lowest_step = meta["lowest"]
        # A checkpoint of an older version has neither these losses nor their weights: the best weights stand in.
        self.lowest_losses = meta["lowest_losses"] if "lowest_losses" in meta else self._losses_of_best()

    def _losses_of_best(self) -> list[float]:
        return self.score(self.splits.validation, self.best_edits()).losses if self.best is not None else []

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Weight decay for all but orthonormal matrices.

        For them it has no meaning: their parameter's diagonal holds the columns' signs, and decay would shrink
        the columns.
        """
        named = list(self.intervention.named_parameters())
        decayed = [parameter for name, parameter in named if "parametrizations" not in name]
        orthonormal = [parameter for name, parameter in named if "parametrizations" in name]
        groups = [(decayed, self.plan.weight_decay), (orthonormal, 0.0)]
        return [{"params": params, "weight_decay": decay} for params, decay in groups if params]

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up from 0 to the plan's rate, then linear decay to 0, as transformers' and pyreft's trainers."""
        warmup = self.warmup_steps
        rising, falling = step / max(1, warmup), (self.total_steps - step) / max(1, self.total_steps - warmup)
        return self.plan.learning_rate * (rising if step < warmup else falling)

    def _delta(self, number: int, family: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def delta(rows: Tensor) -> Tensor:
            hidden = rows.float()
            if not self.plan.dropout:
                return family(hidden) - hidden
            with torch.random.fork_rng(devices=[]):
                # Seeded for each module: the same in whatever pass; hash of ints is the same in every process.
                torch.manual_seed(hash((self.seed, self.step, number)))
                return family(hidden) - hidden

        return delta

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        """The epoch's batches: random, but of examples of like length, so that little is padding."""
        rng = random.Random(self.seed * 1_000_003 + epoch)  # noqa: S311 - an order, not a secret
        order = list(range(len(self.splits.train)))
        rng.shuffle(order)
        size = self.plan.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), size * BUCKET_BATCHES):
            bucket = sorted(order[start : start + size * BUCKET_BATCHES], key=lambda i: self.splits.train[i].length)
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        rng.shuffle(batches)
        return batches


def advance(trainers: Sequence[Trainer]) -> list[StepMetrics]:
    """One optimizer step of each trainer, all of one cache, in passes that they share."""
    cache = trainers[0].cache
    batches = [Batch(t.batch(), t.plan.edited, at_random=t.plan.dropout > 0) for t in trainers]
    places = [trainer.places() for trainer in trainers]
    tokens = [sum(len(e.completion_ids) for e in batch.examples) for batch in batches]
    losses = [0.0] * len(trainers)
    for trainer in trainers:
        trainer.intervention.train()
    for spans in cache.passes(batches, MAX_ROWS):
        rows = VarlenRows(spans, cache.packed.device)
        logits = cache.logits(rows, _row_edits(rows, places))
        each = functional.cross_entropy(logits.float(), rows.labels, reduction="none")
        counts = [span.targets for span in rows.scored]
        # A trainer's loss is the mean over all its tokens of the step, whatever the passes.
        shares = torch.tensor([1 / tokens[span.batch] for span in rows.scored], device=each.device)
        weighted = each * shares.repeat_interleave(torch.tensor(counts, device=each.device))
        if weighted.requires_grad:  # not where all prompts of the pass are too short for the positions
            weighted.sum().backward()  # type: ignore[no-untyped-call]
        sums = torch.stack([part.sum() for part in torch.split(weighted.detach(), counts)]).tolist()
        for span, loss in zip(rows.scored, sums, strict=True):
            losses[span.batch] += loss
    return [t.update(loss, count) for t, loss, count in zip(trainers, losses, tokens, strict=True)]


def _row_edits(rows: VarlenRows, places: Sequence[Sequence[Place]]) -> dict[int, list[RowEdit]]:
    """What a pass adds where. places: of each batch."""
    touched: defaultdict[tuple[int, Positions], list[Tensor]] = defaultdict(list)
    for span, offset in zip(rows.spans, rows.offsets, strict=True):
        for positions in {positions for _, positions, _ in places[span.batch]}:
            indices = positions.indices(len(span.example.prompt_ids), span.start, span.stop)
            touched[span.batch, positions].append(torch.from_numpy(indices) + (offset - span.start))
    index = {key: torch.cat(parts).to(rows.device) for key, parts in touched.items()}
    edits: defaultdict[int, list[RowEdit]] = defaultdict(list)
    for number, at in enumerate(places):
        for layer, positions, delta in at:
            if (number, positions) in index and len(index[number, positions]):
                edits[layer].append(RowEdit(index[number, positions], delta))
    return dict(edits)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
