"""The report on a job's data: response of POST /v1/fine_tuning/validate, and a job's `data_report`."""

from __future__ import annotations

from reftserve.client.schemas.base import Response


class TokenLengths(Response):
    """Percentiles and maximum of lengths, in tokens."""

    p50: int
    p90: int
    p99: int
    max: int


class FileReport(Response):
    """Counts of one file. examples: one for each answer to learn. too_long: examples above `max_length`, left out.

    duplicates: examples that repeat an earlier one. conflicts: prompts with different targets. targets: distinct ones.
    """

    rows: int
    examples: int
    too_long: int
    duplicates: int
    conflicts: int
    targets: int
    prompt_tokens: TokenLengths
    completion_tokens: TokenLengths
    total_tokens: TokenLengths


class SplitSizes(Response):
    """Number of examples that train the weights, that select the best weights, and that only score."""

    train: int
    validation: int
    test: int


class DataReport(Response):
    """Report on a job's data. leaked: validation examples whose prompts are in the training file, which are left out.

    labels: the targets, if they look like class labels. warnings: sentences about likely faults in the data.
    """

    training: FileReport
    validation: FileReport | None = None
    max_length: int
    leaked: int = 0
    splits: SplitSizes
    labels: list[str] | None = None
    warnings: list[str]
