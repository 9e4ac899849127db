"""Ways to interrupt a job at a given step, and counts of the objects that it leaves in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from workspace import Worker

from reftserve.server.training.activation_cache import Arena
from reftserve.server.training.sweep import Sweep


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at_step(worker: Worker, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the worker's next run end in the middle of an optimizer step, without cleanup."""
    advance = Sweep.advance

    def killed(sweep: Sweep) -> Any:
        if sweep.step == step:
            raise Killed
        return advance(sweep)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "advance", killed)
        with pytest.raises(Killed):
            worker.work()


def breaks_off(*_: object, **__: object) -> None:
    raise OperationalError("UPDATE", {}, Exception("connection lost"))


def sweeps() -> int:
    gc.collect()
    return sum(type(found) is Sweep for found in gc.get_objects())


def arenas() -> int:
    gc.collect()
    return sum(type(found) is Arena for found in gc.get_objects())


def on_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    advance = Sweep.advance

    def with_act(sweep: Sweep) -> Any:
        metrics = advance(sweep)
        if metrics.step == step:
            act()
        return metrics

    patch.setattr(Sweep, "advance", with_act)
