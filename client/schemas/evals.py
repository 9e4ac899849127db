"""/v1/evals: a data set with criteria, and runs of models over it. OpenAI's shapes; the criteria are our own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from reftserve.client.schemas.base import Identifier, Printable, Request, Response
from reftserve.client.schemas.classify import Label, Labels
from reftserve.client.schemas.generation import InterventionUse

Name = Annotated[str, Field(min_length=1, max_length=64), Printable]


class Criterion(Request):
    """What criteria have in common. name: its column when runs are compared; its type when absent."""

    name: Name | None = None


class LikelihoodCriterion(Criterion):
    """How likely the data's answer is, end of turn included: nats a token, or their exponential."""

    type: Literal["loss", "perplexity"]


class AccuracyCriterion(Criterion):
    """How often the data's answer is the likeliest of the labels; by default of all answers in the data."""

    type: Literal["accuracy"]
    labels: Labels | None = None
    normalize: Literal["none", "tokens"] = "none"


class ExactMatchCriterion(Criterion):
    """How often the greedy answer is the data's, but for white space around them.

    normalize: `squad` compares both in lower case, without punctuation and English articles; so "15" is "1.5".
    """

    type: Literal["exact_match"]
    normalize: Literal["none", "squad"] = "none"


class OverlapCriterion(Criterion):
    """How many words the greedy answer and the data's share, normalized as by `squad`: F1 is SQuAD's."""

    type: Literal["f1"]


class ContainsCriterion(Criterion):
    """How often the greedy answer contains a text; by default the data's answer, without the spaces around it."""

    type: Literal["contains"]
    text: Label | None = None
    ignore_case: bool = False


class RegexCriterion(Criterion):
    """How often a pattern, in the syntax of Rust's regex crate, is found in the greedy answer."""

    type: Literal["regex"]
    pattern: str = Field(min_length=1, max_length=4096)


TestingCriterion = Annotated[
    LikelihoodCriterion
    | AccuracyCriterion
    | ExactMatchCriterion
    | OverlapCriterion
    | ContainsCriterion
    | RegexCriterion,
    Field(discriminator="type"),
]


class FileDataSource(Request):
    """An uploaded data set."""

    type: Literal["file"] = "file"
    file_id: Identifier


class EvalCreate(Request):
    """POST /v1/evals."""

    name: Name | None = None
    data_source_config: FileDataSource
    testing_criteria: list[TestingCriterion] = Field(min_length=1, max_length=32)
    metadata: dict[str, str] | None = None


class EvalSampling(Request):
    """How answers are generated: greedily, up to so many tokens."""

    max_completion_tokens: int = Field(128, ge=1)


class CompletionsDataSource(Request):
    """What a run evaluates: the base, an intervention of it, or a composition, named as in completions."""

    type: Literal["completions"] = "completions"
    model: Identifier
    interventions: list[InterventionUse] | None = None
    sampling_params: EvalSampling = EvalSampling()


class EvalRunCreate(Request):
    """POST /v1/evals/{id}/runs."""

    name: Name | None = None
    data_source: CompletionsDataSource
    metadata: dict[str, str] | None = None


EvalRunStatus = Literal["queued", "in_progress", "completed", "failed", "canceled"]


class EvalError(Response):
    """Why a run failed, or what was wrong with an item."""

    code: str
    message: str


class ResultCounts(Response):
    """Items of a run. errored: could not be evaluated; passed: in every criterion that can be passed."""

    total: int
    passed: int
    failed: int
    errored: int


class CriterionResult(Response):
    """A criterion over the items done so far but errored ones. passed, failed: null where nothing can be passed."""

    testing_criteria: str
    score: float | None
    passed: int | None
    failed: int | None


class EvalRun(Response):
    """One model's scores. interventions: the versions that it runs with, `name@version`, and their scales."""

    id: str
    object: Literal["eval.run"] = "eval.run"
    eval_id: str
    name: str
    model: str
    interventions: list[InterventionUse] = Field(default_factory=list)
    status: EvalRunStatus
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    data_source: dict[str, Any]
    result_counts: ResultCounts
    per_testing_criteria_results: list[CriterionResult]
    error: EvalError | None = None
    metadata: dict[str, str] | None = None

    @property
    def scores(self) -> dict[str, float | None]:
        """Each criterion's score, by its name."""
        return {result.testing_criteria: result.score for result in self.per_testing_criteria_results}


class Eval(Response):
    """A data set with criteria, and all its runs, oldest first, to be compared."""

    id: str
    object: Literal["eval"] = "eval"
    name: str
    created_at: int
    data_source_config: dict[str, Any]
    testing_criteria: list[dict[str, Any]]
    metadata: dict[str, str] | None = None
    runs: list[EvalRun] = Field(default_factory=list)


class ItemResult(Response):
    """One criterion on one item. label: the likeliest, for accuracy. tokens: of the answer, where it was scored."""

    name: str
    score: float
    passed: bool | None = None
    label: str | None = None
    tokens: int | None = None


class ItemSample(Response):
    """The greedy answer, where a criterion needed one, or why there is none."""

    output: str | None = None
    error: EvalError | None = None


class EvalOutputItem(Response):
    """One example of the data set in a run. datasource_item_id: its number in the file, from 0."""

    id: str
    object: Literal["eval.run.output_item"] = "eval.run.output_item"
    created_at: int
    eval_id: str
    run_id: str
    datasource_item_id: int
    status: Literal["pass", "fail", "error"]
    results: list[ItemResult]
    sample: ItemSample
