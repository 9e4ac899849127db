"""/v1/evals: a data set with criteria, and runs that score models on it. OpenAI's shapes, native criteria."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from reftserve.client.schemas.base import Request, Response
from reftserve.client.schemas.bounds import Count, Identifier, Metadata, Title, at_most
from reftserve.client.schemas.classify import Label, Labels
from reftserve.client.schemas.generation import Composition, InterventionUse


class Criterion(Request):
    """Base of all criteria. name: column in a comparison of runs; the type when absent."""

    name: Title | None = None


class LikelihoodCriterion(Criterion):
    """Loss of the data's answer, end of turn included: nats per token, or perplexity, their exponential."""

    type: Literal["loss", "perplexity"]


class AccuracyCriterion(Criterion):
    """Share of items whose answer is the likeliest label. labels: by default all answers in the data."""

    type: Literal["accuracy"]
    labels: Labels | None = None
    normalize: Literal["none", "tokens"] = "none"


class ExactMatchCriterion(Criterion):
    """Share of items whose greedy answer equals the data's, white space aside. normalize: `squad` ignores case,
    punctuation and English articles, so "15" equals "1.5".
    """

    type: Literal["exact_match"]
    normalize: Literal["none", "squad"] = "none"


class OverlapCriterion(Criterion):
    """SQuAD's F1: word overlap of the greedy answer and the data's, both normalized as by `squad`."""

    type: Literal["f1"]


class ContainsCriterion(Criterion):
    """Share of items whose greedy answer contains a text. text: by default the data's answer, stripped."""

    type: Literal["contains"]
    text: Label | None = None
    ignore_case: bool = False


class RegexCriterion(Criterion):
    """Share of items whose greedy answer matches a pattern in the syntax of Rust's regex crate."""

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

    name: Title | None = None
    data_source_config: FileDataSource
    testing_criteria: Annotated[list[TestingCriterion], at_most(32, at_least=1)]
    metadata: Metadata | None = None


class EvalSampling(Request):
    """Parameters of answers, which are greedy. max_completion_tokens: their greatest length."""

    max_completion_tokens: Count = 128


class CompletionsDataSource(Request):
    """The model that a run evaluates, named as in completions: the base, an intervention or a composition."""

    type: Literal["completions"] = "completions"
    model: Identifier
    interventions: Composition | None = None
    sampling_params: EvalSampling = EvalSampling()


class EvalRunCreate(Request):
    """POST /v1/evals/{id}/runs."""

    name: Title | None = None
    data_source: CompletionsDataSource
    metadata: Metadata | None = None


EvalRunStatus = Literal["queued", "in_progress", "completed", "failed", "canceled"]


class EvalError(Response):
    """Reason why a run or an item failed."""

    code: str
    message: str


class ResultCounts(Response):
    """Counts of a run's items. passed: in every criterion that can be passed; errored: not evaluated."""

    total: int
    passed: int
    failed: int
    errored: int


class CriterionResult(Response):
    """A criterion over the items done so far, without errored ones. passed, failed: null if it only scores."""

    testing_criteria: str
    score: float | None
    passed: int | None
    failed: int | None


class EvalRun(Response):
    """One model's scores. interventions: versions, `name@version`, and scales that the run uses."""

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
        """Return each criterion's score by its name."""
        return {result.testing_criteria: result.score for result in self.per_testing_criteria_results}


class Eval(Response):
    """A data set with criteria, and its runs to compare, oldest first."""

    id: str
    object: Literal["eval"] = "eval"
    name: str
    created_at: int
    data_source_config: dict[str, Any]
    testing_criteria: list[dict[str, Any]]
    metadata: dict[str, str] | None = None
    runs: list[EvalRun] = Field(default_factory=list)


class ItemResult(Response):
    """A criterion on an item. label: the likeliest, for accuracy. tokens: length of the answer, if it was scored."""

    name: str
    score: float
    passed: bool | None = None
    label: str | None = None
    tokens: int | None = None


class ItemSample(Response):
    """The greedy answer, if a criterion needed one, or the reason why there is none."""

    output: str | None = None
    error: EvalError | None = None


class EvalOutputItem(Response):
    """An example of the data set in a run. datasource_item_id: its index in the file, from 0."""

    id: str
    object: Literal["eval.run.output_item"] = "eval.run.output_item"
    created_at: int
    eval_id: str
    run_id: str
    datasource_item_id: int
    status: Literal["pass", "fail", "error"]
    results: list[ItemResult]
    sample: ItemSample
