"""The trainer trains one intervention on one frozen base. It can stop after any step and resume bit for bit.

The plan, the seed and the step's number determine the order of the examples, the learning rate and the dropout. So a
checkpoint holds only the weights, the optimizer's moments and the best weights so far. The best weights have the lowest
validation loss, or are newer and within their standard error of it: by then the learning rate has fallen. On labels, a
good model's loss rises as it becomes sure of its errors, and the lowest loss came too early (docs/decisions.md).
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
MAX_ROWS = 2048  # per pass: a pass with gradients keeps the activations of every layer

SiteDelta = tuple[int, Positions, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one optimizer step. tokens: the completion tokens that it trained on."""

    step: int
    loss: float
    learning_rate: float
    tokens: int


class Trainer:
    """AdamW on the intervention's parameters, gradients clipped. Raises ValueError if the cache is not valid for it."""

    def __init__(self, cache: ActivationCache, splits: Splits, plan: Plan, *, seed: int) -> None:
        self.cache = cache
        self.splits = splits
        self.plan = plan
        self.seed = seed
        varlen = cache.varlen
        self.intervention = TrainableIntervention(plan.intervention, varlen.hidden_size, seed=seed).to(varlen.device)
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
        self.lowest_losses: list[float] = []  # at lowest_step: per validation example, summed over its tokens
        self._best_state: dict[str, Tensor] = {}

    def advance(self) -> StepMetrics:
        """Do one optimizer step."""
        return advance([self])[0]

    def site_deltas(self) -> list[SiteDelta]:
        """Return the step's edits: layer, positions, and the function from rows to their delta, with gradients."""
        return [
            (layer, positions, self._delta(number, family))
            for number, (layer, positions, family) in enumerate(self.intervention.placed())
        ]

    def batch(self) -> list[EncodedExample]:
        """Return the examples of the next step."""
        epoch, index = divmod(self.step, self.steps_per_epoch)
        return [self.splits.train[i] for i in self._epoch_batches(epoch)[index]]

    def update(self, loss: float, tokens: int) -> StepMetrics:
        """Apply the accumulated gradients and return the step's metrics."""
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
        """The number of steps in which the learning rate rises."""
        return math.ceil(self.plan.warmup_ratio * self.total_steps)

    def validate(self) -> dict[str, float]:
        """Score the validation split, and keep the weights if they are the best. Raises NonFiniteError."""
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
        """Return the edits of the best weights, on the CPU."""
        current = {name: tensor.clone() for name, tensor in self.intervention.state_dict().items()}
        self.intervention.load_state_dict(self._best_state)
        edits = self.intervention.lower()
        self.intervention.load_state_dict(current)
        return tuple(PlacedEdit(e.layer, e.positions, e.edit.to(torch.device("cpu"))) for e in edits)

    def evaluate(self, examples: Sequence[EncodedExample], edits: Sequence[PlacedEdit]) -> dict[str, float]:
        """Return the mean scores of examples with edits; without edits, the base's."""
        return self.score(examples, edits).means()

    @torch.no_grad()
    def score(self, examples: Sequence[EncodedExample], edits: Sequence[PlacedEdit]) -> Score:
        """Score examples with edits, in the order of the examples."""
        deltas: list[SiteDelta] = [(e.layer, e.positions, e.edit.to(self.cache.varlen.device).delta) for e in edits]
        score, order = Score(), list[EncodedExample]()
        for spans in self.cache.passes([Batch(examples, {e.positions for e in edits})], MAX_ROWS):
            rows = VarlenRows(spans, self.cache.varlen.device)
            logits = self.cache.logits(rows, _row_edits(rows, [deltas]))
            score.add(logits, rows.labels, [span.targets for span in rows.scored])
            order += [span.example for span in rows.scored]
        # Passes order the examples differently in each trial; paired losses need one order.
        numbers = {example: number for number, example in enumerate(order)}
        return score.reordered([numbers[example] for example in examples])

    def save(self, folder: Path, name: str = "state") -> None:
        """Write a checkpoint into an existing folder: `name`.safetensors and `name`.json."""
        tensors = {f"intervention.{key}": t for key, t in self.intervention.state_dict().items()}
        tensors |= {f"best.{key}": t for key, t in self._best_state.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": t for key, t in state.items()}
        # save_file raises no OSError on a full disk.
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
        """Resume from a checkpoint of the same plan, seed and data."""
        tensors = load_file(folder / f"{name}.safetensors", device=str(self.cache.varlen.device))
        self.intervention.load_state_dict(_below("intervention.", tensors))
        self._best_state = _below("best.", tensors)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _below("optimizer.", tensors).items():
            index, moment = key.split(".", 1)
            if tensor.dim():  # fused AdamW needs the moments in the parameter's memory layout
                tensor = torch.empty_like(parameters[int(index)]).copy_(tensor)
            state.setdefault(int(index), {})[moment] = tensor
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": state})
        meta: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        self.step, self.trained_tokens, self.best = meta["step"], meta["trained_tokens"], meta["best"]
        self.lowest_loss, self.lowest_step = meta["lowest"]
        # A checkpoint of an older version has no such losses; those of the best weights replace them.
        self.lowest_losses = meta["lowest_losses"] if "lowest_losses" in meta else self._losses_of_best()

    def _losses_of_best(self) -> list[float]:
        return self.score(self.splits.validation, self.best_edits()).losses if self.best is not None else []

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Group parameters by weight decay: 0 for orthonormal matrices, since it would shrink their columns."""
        named = list(self.intervention.named_parameters())
        decayed = [parameter for name, parameter in named if "parametrizations" not in name]
        orthonormal = [parameter for name, parameter in named if "parametrizations" in name]
        groups = [(decayed, self.plan.weight_decay), (orthonormal, 0.0)]
        return [{"params": params, "weight_decay": decay} for params, decay in groups if params]

    def _learning_rate(self, step: int) -> float:
        """Return the rate of a step: linear warm-up from 0, then linear decay to 0, as in transformers and pyreft."""
        warmup = self.warmup_steps
        rising, falling = step / max(1, warmup), (self.total_steps - step) / max(1, self.total_steps - warmup)
        return self.plan.learning_rate * (rising if step < warmup else falling)

    def _delta(self, number: int, family: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def delta(rows: Tensor) -> Tensor:
            hidden = rows.float()
            if not self.plan.dropout:
                return family(hidden) - hidden
            with torch.random.fork_rng(devices=[]):
                # A seed per module makes dropout independent of the pass; hash of ints is equal in every process.
                torch.manual_seed(hash((self.seed, self.step, number)))
                return family(hidden) - hidden

        return delta

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        """Return the epoch's batches, as indices: random, but of examples of similar length, for little padding."""
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
    """Do one step of trainers on one cache, in shared passes. A row has one trainer's edits, so gradients never mix."""
    cache = trainers[0].cache
    batches = [Batch(t.batch(), t.plan.edited, at_random=t.plan.dropout > 0) for t in trainers]
    deltas = [trainer.site_deltas() for trainer in trainers]
    tokens = [sum(len(e.completion_ids) for e in batch.examples) for batch in batches]
    losses = [0.0] * len(trainers)
    for trainer in trainers:
        trainer.intervention.train()
    for spans in cache.passes(batches, MAX_ROWS):
        rows = VarlenRows(spans, cache.varlen.device)
        logits = cache.logits(rows, _row_edits(rows, deltas))
        each = functional.cross_entropy(logits.float(), rows.labels, reduction="none")
        counts = [span.targets for span in rows.scored]
        # A trainer's loss is the mean over all its tokens of the step, however they are split into passes.
        shares = torch.tensor([1 / tokens[span.batch] for span in rows.scored], device=each.device)
        weighted = each * shares.repeat_interleave(torch.tensor(counts, device=each.device))
        if weighted.requires_grad:  # false if all prompts of the pass are too short for the positions
            weighted.sum().backward()  # type: ignore[no-untyped-call]
        sums = torch.stack([part.sum() for part in torch.split(weighted.detach(), counts)]).tolist()
        for span, loss in zip(rows.scored, sums, strict=True):
            losses[span.batch] += loss
    return [t.update(loss, count) for t, loss, count in zip(trainers, losses, tokens, strict=True)]


def _row_edits(rows: VarlenRows, deltas: Sequence[Sequence[SiteDelta]]) -> dict[int, list[RowEdit]]:
    touched: defaultdict[tuple[int, Positions], list[Tensor]] = defaultdict(list)
    for span, offset in zip(rows.spans, rows.offsets, strict=True):
        for positions in {positions for _, positions, _ in deltas[span.batch]}:
            indices = positions.indices(len(span.example.prompt_ids), span.start, span.stop)
            touched[span.batch, positions].append(torch.from_numpy(indices) + (offset - span.start))
    index = {key: torch.cat(parts).to(rows.device) for key, parts in touched.items()}
    edits: defaultdict[int, list[RowEdit]] = defaultdict(list)
    for number, at in enumerate(deltas):
        for layer, positions, delta in at:
            if (number, positions) in index and len(index[number, positions]):
                edits[layer].append(RowEdit(index[number, positions], delta))
    return dict(edits)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
