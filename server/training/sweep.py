"""The trials of one job, side by side: of several the worse half is dropped again and again, the best is published.

Successive halving (Jamieson and Talwalkar 2016): with n trials the halves are dropped after 1/n, 2/n, 4/n ... of the
steps, by validation loss; all n together cost about as much as 1 + log2(n) / 2 of them alone. Trials of one trunk share
their forward passes. A job without a sweep is a sweep of one trial.

Edits on a prompt's first tokens cost more, in training and in serving, where their prompts share no cached prefix with
the base. So a trial with such edits stands behind one without as long as its loss is within its standard error of the
other's: the one-standard-error rule (Breiman et al. 1984), by which of equals the simplest is taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reftserve.interventions import NonFiniteError
from reftserve.server.training.data import Splits
from reftserve.server.training.packed import PackedModel
from reftserve.server.training.plan import Plan
from reftserve.server.training.trainer import StepMetrics, Trainer, advance
from reftserve.server.training.trunk import Arena, Trunk


@dataclass
class Trial:
    """One trainer, by its number in the plan, and how it stood when it was last validated."""

    number: int
    trainer: Trainer
    score: dict[str, float]

    @property
    def best_loss(self) -> float:
        """The validation loss of its best weights; infinite while there are none, or none that is a number."""
        loss = (self.trainer.best or {}).get("loss", math.inf)
        return loss if math.isfinite(loss) else math.inf

    @property
    def bound(self) -> float:
        """What trials are ranked by: the best weights' loss, and where a prefix is edited its standard error on top."""
        if not self.trainer.plan.edits_prefix or math.isinf(self.best_loss):
            return self.best_loss
        # Checkpoints of older versions know of no error.
        return self.best_loss + (self.trainer.best or {}).get("loss_stderr", 0.0)

    @property
    def row(self) -> dict[str, Any]:
        """What the table of the sweep says of it."""
        plan = self.trainer.plan
        varied = {name: getattr(plan, name) for name in ("layers", "positions", "rank", "learning_rate", "dropout")}
        return {"trial": self.number, **varied, "steps": self.trainer.step, **self.score}


class Sweep:
    """Trials that take their steps together.

    patience: epochs without a better validation loss of the leader, after which the job ends; None goes on to the end.
    Raises ValueError when the trials differ in their number of steps.
    """

    def __init__(self, trainers: Sequence[Trainer], *, patience: int | None = None) -> None:
        first = trainers[0]
        self.total_steps, self.steps_per_epoch = first.total_steps, first.steps_per_epoch
        if any((t.total_steps, t.steps_per_epoch) != (self.total_steps, self.steps_per_epoch) for t in trainers):
            raise ValueError("the trials of a sweep have the same batches and epochs")
        self._patience = patience
        self._rungs = rungs(self.total_steps, len(trainers))
        self.running = [Trial(number, trainer, {}) for number, trainer in enumerate(trainers)]
        self.dropped: list[dict[str, Any]] = []

    @property
    def step(self) -> int:
        """Steps that the running trials have done."""
        return self.running[0].trainer.step

    @property
    def leader(self) -> Trainer:
        """The running trial that ranks first so far, or simply the first."""
        return min(self.running, key=lambda trial: trial.bound).trainer

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to do: all steps are done, or the leader has not become better for long."""
        if self.step >= self.total_steps:
            return True
        waited = self.step - self.leader.lowest_step
        return self._patience is not None and waited >= self._patience * self.steps_per_epoch

    @property
    def validates(self) -> bool:
        """Whether the trials are to be validated after the last step."""
        return self.leader.ends_epoch or self.step in self._rungs

    @property
    def table(self) -> list[dict[str, Any]]:
        """All trials, those that ran longest first."""
        return [*(trial.row for trial in self.running), *reversed(self.dropped)]

    def advance(self) -> StepMetrics:
        """One optimizer step of every running trial; what the leader did."""
        leader = self.leader
        found: dict[int, StepMetrics] = {}
        by_trunk = {id(trial.trainer.trunk): trial.trainer.trunk for trial in self.running}
        for trunk in by_trunk.values():
            together = [trial.trainer for trial in self.running if trial.trainer.trunk is trunk]
            found.update(zip(map(id, together), advance(together), strict=True))
        return found[id(leader)]

    def validate(self) -> dict[str, float]:
        """Validate the running trials, and drop the worse half when it is time; the leader's scores.

        Raises NonFiniteError when the weights of the last one are no numbers any more; before that such trials drop.
        """
        for trial in list(self.running):
            try:
                trial.score = {f"valid_{name}": value for name, value in trial.trainer.validate().items()}
            except NonFiniteError:
                if len(self.running) == 1:
                    raise
                self.running.remove(trial)
                self.dropped.append({**trial.row, "diverged": True})
        leader = self.leader
        if self.step in self._rungs and len(self.running) > 1:
            ranked = sorted(self.running, key=lambda trial: trial.bound)
            kept = ranked[: math.ceil(len(ranked) / 2)]
            self.dropped += [trial.row for trial in reversed(ranked[len(kept) :])]
            self.running = sorted(kept, key=lambda trial: trial.number)
        return next((trial.score for trial in self.running if trial.trainer is leader), {})

    def save(self, folder: Path) -> None:
        """Write a checkpoint into an existing folder."""
        for trial in self.running:
            trial.trainer.save(folder, f"trial-{trial.number}")
        running = [{"number": trial.number, "score": trial.score} for trial in self.running]
        (folder / "sweep.json").write_text(json.dumps({"running": running, "dropped": self.dropped}))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint of the same trials."""
        meta: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
        scores = {trial["number"]: trial["score"] for trial in meta["running"]}
        self.running = [trial for trial in self.running if trial.number in scores]
        self.dropped = meta["dropped"]
        for trial in self.running:
            trial.score = scores[trial.number]
            trial.trainer.load(folder, f"trial-{trial.number}")


def make_trainers(
    packed: PackedModel,
    splits: Splits,
    plan: Plan,
    arena: Arena,
    *,
    seed: int,
    poll: Callable[[], object] = lambda: None,
) -> list[Trainer]:
    """One for each trial of the plan; poll: called while their trunks are filled; may raise.

    Trials share a trunk, but those that edit no prefix keep theirs from those that do.
    """
    trunks: dict[bool, Trunk] = {}
    for edits_prefix in sorted({trial.edits_prefix for trial in plan.trials}):  # cheap ones have first choice of room
        alike = [trial for trial in plan.trials if trial.edits_prefix is edits_prefix]
        lowest = min(layer for trial in alike for layer in trial.layers)
        trunk = Trunk(packed, lowest, {positions for trial in alike for positions in trial.edited}, arena)
        trunk.fill([*splits.train, *splits.validation], poll=poll)
        trunks[edits_prefix] = trunk
    return [Trainer(trunks[trial.edits_prefix], splits, trial, seed=seed) for trial in plan.trials]


def rungs(total_steps: int, trials: int) -> list[int]:
    """After which steps the worse half of the trials is dropped."""
    halvings = math.ceil(math.log2(trials))
    return sorted({max(1, total_steps >> (halvings - number)) for number in range(halvings)})
