"""A sweep trains the trials of one job side by side, drops the worse half several times, and publishes the last one.

Successive halving (Jamieson and Talwalkar 2016): with n trials, the sweep drops half of them after 1/n, 2/n, 4/n ... of
the steps, but not before the warm-up ends. All n together cost about as much as 1 + log2(n) / 2 of them alone. Trials
on one cache share their forward passes. `choice.py` ranks the trials, and `choices` records the reasons. A diverged
trial takes no more steps; its best weights may still win. A job without a sweep is a sweep of one trial.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reftserve.interventions import NonFiniteError, Positions
from reftserve.server.datasets import Splits
from reftserve.server.training.activation_cache import ActivationCaches
from reftserve.server.training.choice import Choice, Contender, Cost, choose, explain, rank
from reftserve.server.training.plan import Plan
from reftserve.server.training.trainer import StepMetrics, Trainer, advance


@dataclass
class Trial:
    """One trainer with its number in the plan. diverged: its newest weights or losses are not finite."""

    number: int
    trainer: Trainer
    diverged: bool = False

    @property
    def best_loss(self) -> float:
        """The validation loss of the best weights; infinite if there are none or their loss is not finite."""
        loss = (self.trainer.best or {}).get("loss", math.inf)
        return loss if math.isfinite(loss) else math.inf

    @property
    def contender(self) -> Contender:
        """The lowest losses and the cost that rank the trial, once it has been validated."""
        plan, parameters = self.trainer.plan, self.trainer.intervention.num_parameters
        return Contender(self.number, np.array(self.trainer.lowest_losses), Cost.of(plan.edited, parameters))

    @property
    def row(self) -> dict[str, Any]:
        """The trial's row in the sweep's table, with the scores of its best weights."""
        plan, best = self.trainer.plan, dict(self.trainer.best or {})
        varied = {name: getattr(plan, name) for name in ("layers", "positions", "rank", "learning_rate", "dropout")}
        row = {"trial": self.number, **varied, "steps": self.trainer.step, "best_step": best.pop("step", None)}
        row |= {f"valid_{name}": value for name, value in best.items()}
        return row | ({"diverged": True} if self.diverged else {})


class Sweep:
    """Trials that step together. patience: epochs without a better loss. Raises ValueError if step counts differ."""

    def __init__(self, trainers: Sequence[Trainer], *, patience: int | None = None) -> None:
        first = trainers[0]
        self.total_steps, self.steps_per_epoch = first.total_steps, first.steps_per_epoch
        if any((t.total_steps, t.steps_per_epoch) != (self.total_steps, self.steps_per_epoch) for t in trainers):
            raise ValueError("the trials of a sweep have the same batches and epochs")
        self._patience = patience
        self._rungs = rungs(self.total_steps, len(trainers), first=max(t.warmup_steps for t in trainers))
        self._trials = [Trial(number, trainer) for number, trainer in enumerate(trainers)]
        self._dropped: list[dict[str, Any]] = []
        self._tokens = np.array([len(example.completion_ids) for example in first.splits.validation])
        self._choices: list[Choice] = []

    @property
    def running(self) -> list[Trial]:
        """The trials that still take steps."""
        return [trial for trial in self._trials if not trial.diverged]

    @property
    def diverged(self) -> bool:
        """Whether the leading trial has diverged."""
        return self._leading.diverged

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return max(trial.trainer.step for trial in self._trials)

    @property
    def leader(self) -> Trainer:
        """The trainer of the trial that ranks first so far; before any validation, of the first trial."""
        return self._leading.trainer

    @property
    def has_ended(self) -> bool:
        """Whether all steps are done, the patience with all trials is spent, or every trial has diverged."""
        if self.step >= self.total_steps or not self.running:
            return True
        waited = self.step - max(trial.trainer.lowest_step for trial in self.running)
        return self._patience is not None and waited >= self._patience * self.steps_per_epoch

    @property
    def remaining_steps(self) -> int:
        """The steps that all trials together still have to take, with the halvings to come."""
        left, trials, step = 0, len(self.running), self.step
        for stop in [*sorted(rung for rung in self._rungs if rung > step), self.total_steps]:
            left += trials * (stop - step)
            trials, step = min(trials, self._rungs.get(stop, trials)), stop
        return left

    @property
    def validates(self) -> bool:
        """Whether a validation is due after the last step."""
        return self.step % self.steps_per_epoch == 0 or self.step in self._rungs

    @property
    def table(self) -> list[dict[str, Any]]:
        """The rows of all trials: the kept ones by rank, then the dropped ones, latest first."""
        return [*(trial.row for trial in self._ranked), *reversed(self._dropped)]

    @property
    def choices(self) -> list[Choice]:
        """The reasons for each ranking: one for each halving, and one for now if several trials are left."""
        left = self._contenders(self._trials)
        now = [explain(left, self._tokens, step=self.step, kept=1)] if len(left) > 1 else []
        return [*self._choices, *now]

    def advance(self) -> StepMetrics:
        """Step the running trials; return the best's metrics. Raises NonFiniteError if none is left to publish."""
        running, leading = self.running, self._first_of(self.running)
        found: dict[int, StepMetrics] = {}
        by_cache = {id(trial.trainer.cache): trial.trainer.cache for trial in running}
        for cache in by_cache.values():
            together = [trial for trial in running if trial.trainer.cache is cache]
            steps = advance([trial.trainer for trial in together])
            found.update(zip((trial.number for trial in together), steps, strict=True))
        for trial in running:
            if not math.isfinite(found[trial.number].loss):
                self._stop(trial, NonFiniteError(f"the training loss of step {self.step} is not a finite number"))
        return found[leading.number]

    def validate(self) -> dict[str, float]:
        """Validate the running trials, drop half if due, and return the best one's scores. Raises as `advance`."""
        scores: dict[int, dict[str, float]] = {}
        for trial in self.running:
            try:
                scores[trial.number] = trial.trainer.validate()
            except NonFiniteError as cause:
                self._stop(trial, cause)
        if self.step in self._rungs:
            self._drop(self._rungs[self.step])
        scored = [trial for trial in self._trials if trial.number in scores]
        newest = scores[self._first_of(scored).number] if scored else {}
        return {f"valid_{name}": value for name, value in newest.items()}

    def save(self, folder: Path) -> None:
        """Write a checkpoint into an existing folder."""
        for trial in self._trials:
            trial.trainer.save(folder, f"trial-{trial.number}")
        trials = [{"number": trial.number, "diverged": trial.diverged} for trial in self._trials]
        choices = [choice.model_dump() for choice in self._choices]
        meta = {"trials": trials, "dropped": self._dropped, "choices": choices}
        (folder / "sweep.json").write_text(json.dumps(meta))

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint of the same trials."""
        meta: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
        diverged = {trial["number"]: trial["diverged"] for trial in meta["trials"]}
        self._trials = [trial for trial in self._trials if trial.number in diverged]
        self._dropped = meta["dropped"]
        self._choices = [Choice.model_validate(choice) for choice in meta.get("choices", [])]
        for trial in self._trials:
            trial.diverged = diverged[trial.number]
            trial.trainer.load(folder, f"trial-{trial.number}")

    @property
    def _ranked(self) -> list[Trial]:
        """The trials by rank; those without validated weights come last."""
        by_number = {trial.number: trial for trial in self._trials}
        ranked = [by_number[each.number] for each in rank(self._contenders(self._trials), self._tokens)]
        return ranked + [trial for trial in self._trials if trial not in ranked]

    @property
    def _leading(self) -> Trial:
        return self._first_of(self._trials)

    def _first_of(self, trials: Sequence[Trial]) -> Trial:
        contenders = self._contenders(trials)
        if not contenders:
            return trials[0]
        number = choose(contenders, self._tokens).number
        return next(trial for trial in trials if trial.number == number)

    def _contenders(self, trials: Sequence[Trial]) -> list[Contender]:
        return [trial.contender for trial in trials if math.isfinite(trial.best_loss)]

    def _drop(self, kept: int) -> None:
        """Keep the first `kept` running trials, and the first diverged one: it costs no steps and may still win."""
        ranked = self._ranked
        self._choices.append(explain(self._contenders(ranked), self._tokens, step=self.step, kept=kept))
        staying = [trial for trial in ranked if not trial.diverged][:kept]
        staying += [trial for trial in ranked if trial.diverged][:1]
        self._dropped += [trial.row for trial in reversed(ranked) if trial not in staying]
        self._trials = sorted(staying, key=lambda trial: trial.number)

    def _stop(self, trial: Trial, cause: NonFiniteError) -> None:
        trial.diverged = True
        if trial.trainer.best is not None:
            return
        if len(self._trials) == 1:
            raise cause
        self._trials.remove(trial)
        self._dropped.append(trial.row)


def make_trainers(
    caches: ActivationCaches, splits: Splits, plan: Plan, *, seed: int, poll: Callable[[], object] = lambda: None
) -> list[Trainer]:
    """Make each trial's trainer. Suffix-only trials share a cache, the others another. poll: called as these fill."""
    shared = {alike: caches.get(*sites) for alike, sites in cache_sites(plan).items()}
    for _, cache in sorted(shared.items()):  # suffix-only trials get room first
        cache.fill([*splits.train, *splits.validation], poll=poll)
    return [Trainer(shared[trial.edits_prefix], splits, trial, seed=seed) for trial in plan.trials]


def cache_sites(plan: Plan) -> dict[bool, tuple[int, frozenset[Positions]]]:
    """Map "edits the prefix" to the lowest edited layer and all positions of the trials of which that is true."""
    found = {}
    for edits_prefix in {trial.edits_prefix for trial in plan.trials}:
        alike = [trial for trial in plan.trials if trial.edits_prefix is edits_prefix]
        lowest = min(layer for trial in alike for layer in trial.layers)
        found[edits_prefix] = (lowest, frozenset(positions for trial in alike for positions in trial.edited))
    return found


def rungs(total_steps: int, trials: int, *, first: int = 0) -> dict[int, int]:
    """Map each halving's step to the number of trials that it keeps. Halvings due before step `first` wait for it."""
    halvings = math.ceil(math.log2(trials))
    steps = (max(1, first, total_steps >> (halvings - number)) for number in range(halvings))
    return {step: math.ceil(trials / 2 ** (number + 1)) for number, step in enumerate(steps)}
