"""The trainer: one intervention, one frozen base, optimizer steps that can stop and go on exactly where they were.

Everything that a step depends on follows from the plan, the seed and the number of the step (order of the examples,
learning rate, dropout), so a checkpoint is the weights, the optimizer's moments and the best weights so far.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from reftserve.interventions import PlacedEdit, TrainableIntervention, attach
from reftserve.server.training.data import EncodedExample, Splits
from reftserve.server.training.evaluation import Score, TokenBatch, collate, completion_loss, forward
from reftserve.server.training.recipe import Plan

BUCKET_BATCHES = 16
EVALUATION_BATCH = 16


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did. tokens: completion tokens that it learned from."""

    step: int
    loss: float
    learning_rate: float
    tokens: int


class Trainer:
    """AdamW on the intervention's parameters with linear warm-up and decay; the base never changes."""

    def __init__(self, model: PreTrainedModel, splits: Splits, plan: Plan, *, seed: int) -> None:
        self.model = model
        self.splits = splits
        self.plan = plan
        self.seed = seed
        hidden_size = model.config.get_text_config().hidden_size
        self.intervention = TrainableIntervention(plan.intervention, hidden_size, seed=seed).to(model.device)
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=plan.learning_rate)
        self.steps_per_epoch = plan.steps_per_epoch(len(splits.train))
        self.total_steps = plan.n_epochs * self.steps_per_epoch
        self.step = 0
        self.trained_tokens = 0
        self.best: dict[str, float] | None = None
        self._best_state: dict[str, Tensor] = {}

    def advance(self) -> StepMetrics:
        """Do one optimizer step."""
        batch = self._batch(self.step)
        learning_rate = self._learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.intervention.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, self.step)))  # dropout; hash of ints is the same in every process
            with attach(self.model, self.intervention, batch.n_prompt):
                loss = completion_loss(forward(self.model, batch), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        self.trained_tokens += batch.num_targets
        return StepMetrics(self.step, float(loss.detach()), learning_rate, batch.num_targets)

    @property
    def ends_epoch(self) -> bool:
        """Whether the last step was the last of an epoch."""
        return self.step % self.steps_per_epoch == 0

    def validate(self) -> dict[str, float]:
        """Score the validation split, and remember the weights if they are the best so far by loss."""
        score = self.evaluate(self.splits.validation, self.intervention.lower())
        if self.best is None or score["loss"] < self.best["loss"]:
            self.best = {**score, "step": self.step}
            self._best_state = {name: tensor.clone() for name, tensor in self.intervention.state_dict().items()}
        return score

    def best_edits(self) -> tuple[PlacedEdit, ...]:
        """The edits that scored best on validation, on the CPU."""
        current = {name: tensor.clone() for name, tensor in self.intervention.state_dict().items()}
        self.intervention.load_state_dict(self._best_state)
        edits = self.intervention.lower()
        self.intervention.load_state_dict(current)
        return tuple(PlacedEdit(e.layer, e.positions, e.edit.to(torch.device("cpu"))) for e in edits)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[EncodedExample], edits: Sequence[PlacedEdit]) -> dict[str, float]:
        """Score examples with edits; without any, that is the base."""
        score = Score()
        ordered = sorted(examples, key=lambda example: example.length)
        for start in range(0, len(ordered), EVALUATION_BATCH):
            batch = collate(ordered[start : start + EVALUATION_BATCH], self.model.device)
            with attach(self.model, edits, batch.n_prompt):
                score.add(forward(self.model, batch), batch.labels)
        return score.means()

    def save(self, folder: Path) -> None:
        """Write a checkpoint into an existing folder."""
        tensors = {f"intervention.{name}": t for name, t in self.intervention.state_dict().items()}
        tensors |= {f"best.{name}": t for name, t in self._best_state.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items()}
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / "state.safetensors")
        meta = {"step": self.step, "trained_tokens": self.trained_tokens, "best": self.best}
        (folder / "progress.json").write_text(json.dumps(meta))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint of the same plan, seed and data."""
        tensors = load_file(folder / "state.safetensors", device=str(self.model.device))
        self.intervention.load_state_dict(_below("intervention.", tensors))
        self._best_state = _below("best.", tensors)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("optimizer.", tensors).items():
            index, moment = name.split(".", 1)
            state.setdefault(int(index), {})[moment] = tensor
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": state})
        meta: dict[str, Any] = json.loads((folder / "progress.json").read_text())
        self.step, self.trained_tokens, self.best = meta["step"], meta["trained_tokens"], meta["best"]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Weight decay for all but orthonormal matrices.

        For them it has no meaning, and torch's parametrization breaks: it reads its diagonal of ones as integers, so
        that the least decay turns the whole matrix into zeros.
        """
        named = list(self.intervention.named_parameters())
        decayed = [parameter for name, parameter in named if "parametrizations" not in name]
        orthonormal = [parameter for name, parameter in named if "parametrizations" in name]
        groups = [(decayed, self.plan.weight_decay), (orthonormal, 0.0)]
        return [{"params": params, "weight_decay": decay} for params, decay in groups if params]

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up to the plan's rate, then linear decay to 0."""
        warmup = round(self.plan.warmup_ratio * self.total_steps)
        if step < warmup:  # noqa: SIM108 - two phases read better as two branches
            factor = (step + 1) / warmup
        else:
            factor = (self.total_steps - step) / max(1, self.total_steps - warmup)
        return self.plan.learning_rate * factor

    def _batch(self, step: int) -> TokenBatch:
        epoch, index = divmod(step, self.steps_per_epoch)
        chosen = self._epoch_batches(epoch)[index]
        return collate([self.splits.train[i] for i in chosen], self.model.device)

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


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
