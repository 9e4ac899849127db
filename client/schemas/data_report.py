"""POST /v1/fine_tuning/validate, and `data_report` of a job."""

from __future__ import annotations

from reftserve.client.schemas.base import Response


class TokenLengths(Response):
    """How long things are: half of them at most p50 tokens, nine of ten at most p90, ..."""

    p50: int
    p90: int
    p99: int
    max: int


class FileReport(Response):
    """What one file holds.

    rows hold examples: a conversation has one for each assistant turn. too_long: examples of more than `max_length`
    tokens, which are left out. duplicates: examples that repeat an earlier one. conflicts: prompts that have different
    targets. targets: how many different ones there are.
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
    """Examples that change the weights, that select the best of them, and that only score."""

    train: int
    validation: int
    test: int


class DataReport(Response):
    """What a job would learn from.

    max_length: tokens. leaked: examples of the validation file whose prompts are in the training file; they are left
    out. labels: the targets, when they look like those of a classification. warnings: what should be looked at, in
    sentences.
    """

    training: FileReport
    validation: FileReport | None = None
    max_length: int
    leaked: int = 0
    splits: SplitSizes
    labels: list[str] | None = None
    warnings: list[str]
