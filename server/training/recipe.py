"""The recipe turns a request into a plan: a sweep over `candidates.py`, or one run if hyperparameters are given."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

from reftserve.client.schemas import (
    FineTuningJobCreate,
    Method,
    Range,
    ReftHyperparameters,
    ReftMethod,
    ReftSweep,
    SupervisedHyperparameters,
    SupervisedMethod,
)
from reftserve.interventions.families import FAMILIES
from reftserve.interventions.intervention_errors import PositionsError
from reftserve.interventions.manifest import BaseFingerprint
from reftserve.interventions.positions import Positions
from reftserve.server.errors import InvalidRequest
from reftserve.server.training.candidates import DataSize, candidates, epochs, known_good
from reftserve.server.training.plan import Plan, Variant

BATCH_SIZE = 8
MAX_LENGTH = 1024


def requested_method(request: FineTuningJobCreate) -> Method | None:
    """Return a request's method; OpenAI's older `hyperparameters` are those of `supervised` unless it has its own."""
    legacy, method = request.hyperparameters, request.method
    if legacy is None or (method is not None and (method.type == "reft" or method.supervised is not None)):
        return method
    asked = Method(type="supervised") if method is None else method
    return asked.model_copy(update={"supervised": SupervisedMethod(hyperparameters=legacy)})


def token_limit(method: Method | None, max_context: int) -> int:
    """Return the longest allowed example, in tokens. Raises InvalidRequest above the base's context."""
    hyper = _asked(method).hyper
    if hyper.max_length is None:
        return min(max_context, MAX_LENGTH)
    if hyper.max_length > max_context:
        raise _invalid("hyperparameters.max_length", hyper.max_length, f"at most the base's context, {max_context}")
    return hyper.max_length


def make_plan(
    method: Method | None,
    base: BaseFingerprint,
    size: DataSize,
    *,
    max_length: int,
    seed: int = 0,
) -> Plan:
    """Make a job's plan. Raises InvalidRequest with valid values."""
    asked = _asked(method)
    reft, hyper = asked.reft, asked.hyper
    default = known_good(base)[0]
    batch_size = hyper.batch_size or max(1, min(BATCH_SIZE, size.examples // 8))
    family = reft.family or "loreft"
    if family not in FAMILIES:
        raise _invalid("family", family, f"one of {', '.join(FAMILIES)}")
    if reft.rank is not None:
        _check_rank(reft.rank, base, "rank")
    if reft.positions is not None:
        _check_positions(reft.positions, "positions")
    plan = Plan(
        family=family,
        layers=default.layers if reft.layers is None else _layers(reft.layers, base.num_layers, "layers"),
        positions=reft.positions or default.positions,
        rank=reft.rank or default.rank,
        dropout=reft.dropout or 0.0,
        tied=True if reft.tied is None else reft.tied,
        n_epochs=hyper.n_epochs or epochs(size, batch_size),
        batch_size=batch_size,
        learning_rate=(hyper.learning_rate or default.learning_rate) * asked.rate_factor,
        warmup_ratio=0.1 if hyper.warmup_ratio is None else hyper.warmup_ratio,
        weight_decay=hyper.weight_decay or 0.0,
        max_length=max_length,
        early_stopping_epochs=hyper.early_stopping_epochs,
    )
    if reft.sweep is not None:
        return plan.model_copy(update={"sweep": variants(reft.sweep, base, seed=seed)})
    if not asked.searches:
        return plan
    given = [name for name in ("layers", "positions", "rank") if getattr(reft, name) is not None]
    found = candidates(plan, size, base, given=given, rate_factor=asked.rate_factor)
    return plan.model_copy(update={"sweep": found}) if len(found) > 1 else plan.varied(found[0])


@dataclass(frozen=True)
class _Asked:
    """The user's decisions in ReFT's terms. searches: whether candidates are tried for the open decisions."""

    reft: ReftMethod
    hyper: ReftHyperparameters
    rate_factor: float = 1.0
    searches: bool = True


def _asked(method: Method | None) -> _Asked:
    if method is not None and method.type == "reft":
        if method.supervised is not None:
            raise InvalidRequest("method.supervised does not go with type 'reft'", param="method.supervised")
        reft = method.reft or ReftMethod()
        if reft.hyperparameters == "auto":
            return _Asked(reft, ReftHyperparameters())
        return _Asked(reft, reft.hyperparameters, searches=False)
    if method is not None and method.reft is not None:
        raise InvalidRequest("method.reft does not go with type 'supervised'", param="method.reft")
    knobs = method.supervised.hyperparameters if method and method.supervised else SupervisedHyperparameters()
    given: dict[str, Any] = {
        name: value for name in ("n_epochs", "batch_size") if (value := getattr(knobs, name)) != "auto"
    }
    for name, value in given.items():
        if not 1 <= value <= 1000:
            raise InvalidRequest(f"{name} is {value}; expected 1 to 1000", param=f"method.supervised.{name}")
    factor = 1.0 if knobs.learning_rate_multiplier == "auto" else knobs.learning_rate_multiplier
    if not 0 < factor <= 100:
        raise InvalidRequest(
            f"learning_rate_multiplier is {factor}; expected above 0, at most 100",
            param="method.supervised.hyperparameters.learning_rate_multiplier",
        )
    return _Asked(ReftMethod(), ReftHyperparameters(**given), factor)


def variants(sweep: ReftSweep, base: BaseFingerprint, *, seed: int) -> list[Variant]:
    """Return up to `trials` combinations, drawn from a larger grid or from ranges. Raises as `make_plan` does."""
    for rank in sweep.rank or ():
        _check_rank(rank, base, "sweep.rank")
    for positions in sweep.positions or ():
        _check_positions(positions, "sweep.positions")
    for rate in _bounds(sweep.learning_rate):
        if not 0 < rate <= 1:
            raise _invalid("sweep.learning_rate", rate, "above 0, at most 1")
    for dropout in _bounds(sweep.dropout):
        if not 0 <= dropout < 1:
            raise _invalid("sweep.dropout", dropout, "0 or more, below 1")
    layers = [_layers(each, base.num_layers, "sweep.layers") for each in sweep.layers] if sweep.layers else None
    given = {"layers": layers, "positions": sweep.positions, "rank": sweep.rank}
    ranges = {}
    for field in ("learning_rate", "dropout"):
        asked = getattr(sweep, field)
        if isinstance(asked, Range):
            ranges[field] = asked
        else:
            given[field] = asked
    if not ranges and not any(given.values()):
        raise InvalidRequest("the sweep varies nothing; give it at least one field", param="method.reft.sweep")
    draw = random.Random(seed)  # noqa: S311 - a choice of trials, not a secret
    lists = {field: values for field, values in given.items() if values}
    grid = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    draw.shuffle(grid)
    if ranges:  # every trial draws its own numbers, so a combination may repeat
        grid = [grid[number % len(grid)] for number in range(sweep.trials)]
    return [
        Variant(**change, **{field: _drawn(draw, asked) for field, asked in ranges.items()})
        for change in grid[: sweep.trials]
    ]


def _bounds(asked: list[float] | Range | None) -> list[float]:
    return [asked.low, asked.high] if isinstance(asked, Range) else asked or []


def _drawn(draw: random.Random, asked: Range) -> float:
    if asked.log:
        return math.exp(draw.uniform(math.log(asked.low), math.log(asked.high)))
    return draw.uniform(asked.low, asked.high)


def _check_rank(rank: int, base: BaseFingerprint, field: str) -> None:
    if not 1 <= rank <= base.hidden_size:
        raise _invalid(field, rank, f"1 to the base's hidden size, {base.hidden_size}")


def _check_positions(positions: str, field: str) -> None:
    try:
        Positions.parse(positions)
    except PositionsError as cause:
        raise InvalidRequest(str(cause), param=f"method.reft.{field}") from cause


def _layers(asked: list[int] | str, num_layers: int, field: str) -> list[int]:
    if isinstance(asked, str):
        return list(range(num_layers))
    wrong = [layer for layer in asked if not 0 <= layer < num_layers]
    if wrong or not asked or len(set(asked)) != len(asked):
        raise _invalid(field, asked, f"different numbers from 0 to {num_layers - 1}, at least one")
    return sorted(asked)


def _invalid(field: str, value: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"method.reft.{field} is {value!r}; expected {expected}", param=f"method.reft.{field}")
