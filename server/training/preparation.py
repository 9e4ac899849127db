"""The preparation of a job: read, render and encode its files, report on them, and decide its plan.

The worker prepares a job before its first training step (`job_data.py`). /v1/fine_tuning/validate prepares one and
answers with the report (`data_check.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reftserve.client.schemas import DataReport, Method
from reftserve.server.base.folder import Base
from reftserve.server.datasets import EncodedFile, encode_file, make_report
from reftserve.server.training.candidates import DataSize
from reftserve.server.training.plan import Plan
from reftserve.server.training.recipe import make_plan, token_limit

TRAINING, VALIDATION = "training", "validation"  # the data sets of a job


@dataclass(frozen=True)
class Preparation:
    """A job's encoded data sets by name, the report on them, and its plan."""

    data: dict[str, EncodedFile]
    report: DataReport
    plan: Plan


def prepare(
    base: Base,
    method: Method | None,
    files: dict[str, Path],
    *,
    seed: int,
    poll: Callable[[], object] = lambda: None,
) -> Preparation:
    """Prepare a job. files: its data sets by name. poll: called for each example; may raise.

    Raises InvalidRequest, naming the file, if a row does not render or the data is too little to learn from.
    """
    max_length = token_limit(method, base.max_context)
    data = {
        name: encode_file(base.tokenizer, path, f"{name}_file", max_length=max_length, poll=poll)
        for name, path in files.items()
    }
    report = make_report(data[TRAINING], data.get(VALIDATION), max_length=max_length, seed=seed)
    plan = make_plan(method, base.fingerprint, DataSize.of(report), max_length=max_length, seed=seed)
    return Preparation(data, report, plan)


def require_plan(base: Base, method: Method | None, *, seed: int) -> None:
    """Raise InvalidRequest, naming the field, if no plan can be made whatever the data is."""
    smallest = DataSize(examples=1, prompt_tokens=1, completion_tokens=1)
    make_plan(method, base.fingerprint, smallest, max_length=token_limit(method, base.max_context), seed=seed)
