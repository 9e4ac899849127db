"""Running sums over the evaluated items of a run. They live in the run's row, so scores need no query of the items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel

from reftserve.client.schemas import CriterionResult, EvalError, ResultCounts, TestingCriterion
from reftserve.server.evaluation.criteria import Score, final

ItemStatus = Literal["pass", "fail", "error"]


class Sums(BaseModel):
    """The sums of one criterion. can_pass: whether it passes or fails items at all."""

    value: float = 0.0
    weight: float = 0.0
    passed: int = 0
    failed: int = 0
    can_pass: bool = False

    def add(self, measured: Score) -> None:
        """Add one item."""
        self.value += measured.value * measured.weight
        self.weight += measured.weight
        if measured.passed is not None:
            self.can_pass = True
            self.passed += measured.passed
            self.failed += not measured.passed


class Tally(BaseModel):
    """The counts and sums of a run. criteria: by name."""

    passed: int = 0
    failed: int = 0
    errored: int = 0
    criteria: dict[str, Sums] = {}

    def add(self, measured: Mapping[str, Score] | EvalError) -> ItemStatus:
        """Add an item by its scores by criterion, or by its error; return the item's status."""
        if isinstance(measured, EvalError):
            self.errored += 1
            return "error"
        for name, each in measured.items():
            self.criteria.setdefault(name, Sums()).add(each)
        if all(each.passed is not False for each in measured.values()):
            self.passed += 1
            return "pass"
        self.failed += 1
        return "fail"

    def counts(self, total: int) -> ResultCounts:
        """Return the counts of items. total: the number of items in the data set."""
        return ResultCounts(total=total, passed=self.passed, failed=self.failed, errored=self.errored)

    def results(self, criteria: Sequence[TestingCriterion]) -> list[CriterionResult]:
        """Return the scores so far, in the order of the criteria."""
        return [self._result(criterion) for criterion in criteria]

    def _result(self, criterion: TestingCriterion) -> CriterionResult:
        sums = self.criteria.get(str(criterion.name), Sums())
        return CriterionResult(
            testing_criteria=str(criterion.name),
            score=final(criterion, sums.value / sums.weight) if sums.weight else None,
            passed=sums.passed if sums.can_pass else None,
            failed=sums.failed if sums.can_pass else None,
        )
