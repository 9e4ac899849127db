"""The figures of a training job, gathered from its metrics events, and their form in one line of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from reftserve.client.schemas import FineTuningEvent

HELD_OUT, STANDARD_ERROR = "valid_", "_stderr"


class TrainingFigures:
    """The figures so far: the newest ones, and losses by step; a step that a resumed job repeats replaces the first."""

    def __init__(self) -> None:
        self.newest: dict[str, Any] = {}
        self.losses: dict[int, float] = {}
        self.held_out_losses: dict[int, float] = {}

    def add(self, event: FineTuningEvent) -> bool:
        """Add an event; return whether it reports training steps."""
        for step in event.steps:
            self.newest |= step
            for losses, name in ((self.losses, "train_loss"), (self.held_out_losses, f"{HELD_OUT}loss")):
                if (loss := step.get(name)) is not None and math.isfinite(loss):
                    losses[step["step"]] = loss
        return bool(event.steps)


def event_lines(event: FineTuningEvent) -> list[str]:
    """Return an event as lines: its message, or the figures of each step that it reports."""
    return [step_line(step) for step in event.steps] or [event.message]


def step_line(step: Mapping[str, Any]) -> str:
    """Return a step's figures as one line."""
    return f"step {step['step']}/{step['total_steps']}: {', '.join([*scores(step), *pace(step)])}"


def scores(data: Mapping[str, Any]) -> list[str]:
    """Return the loss and the held-out scores, each with its standard error if known."""
    names = [name for name in data if name.startswith(HELD_OUT) and not name.endswith(STANDARD_ERROR)]
    return [
        f"{name.replace(HELD_OUT, 'held-out ').replace('train_', '')} {_number(data[name])}{_error(data, name)}"
        for name in ["train_loss", *names]
    ]


def _number(value: float | None) -> str:
    # The server sends NaN as null.
    return "nan" if value is None else f"{value:.4g}"


def _error(data: Mapping[str, Any], name: str) -> str:
    error = data.get(f"{name}{STANDARD_ERROR}")
    return "" if error is None else f" ± {error:.2g}"


def pace(data: Mapping[str, Any]) -> list[str]:
    """Return learning rate, speed and remaining time."""
    return [
        f"learning rate {data['learning_rate']:.2e}",
        f"{data['tokens_per_second']:,.0f} tokens/s",
        f"{timedelta(seconds=round(data['eta_s']))} to go",
    ]
