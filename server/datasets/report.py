"""Reports on a data set before a job is queued: sizes, token lengths, splits and warnings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reftserve.client.schemas import DataReport, FileReport, SplitSizes, TokenLengths
from reftserve.server.base.tokenizer import Tokenizer
from reftserve.server.datasets.encoding import EncodedExample, encode
from reftserve.server.datasets.examples import Example
from reftserve.server.datasets.label_detection import label_set
from reftserve.server.datasets.reading import read_examples
from reftserve.server.datasets.splits import MIN_EXAMPLES, prompts_of, split
from reftserve.server.errors import InvalidRequest


@dataclass(frozen=True)
class EncodedFile:
    """A data set's examples, all of them encoded, and those that fit: at most `max_length` tokens long."""

    examples: list[Example]
    encoded: list[EncodedExample]
    fitting: list[EncodedExample]


def encode_file(
    tokenizer: Tokenizer, path: Path, param: str, *, max_length: int, poll: Callable[[], object] = lambda: None
) -> EncodedFile:
    """Read and encode a data set. Raises InvalidRequest if a row does not render or none fits.

    param: the request's field that names the file. poll: called for each example; may raise.
    """
    examples = read_examples(path)
    encoded = []
    for example in examples:
        poll()
        try:
            encoded.append(encode(tokenizer, example))
        except InvalidRequest as cause:
            raise InvalidRequest(f"{example.location}: {cause.message}", param=param, code=cause.code) from cause
    fitting = [example for example in encoded if example.length <= max_length]
    needed = MIN_EXAMPLES if param == "training_file" else 1
    if len(fitting) < min(needed, len(encoded)):
        raise InvalidRequest(_too_long(encoded, len(fitting), needed, max_length), param=param, code="too_few_examples")
    return EncodedFile(examples, encoded, fitting)


def make_report(learned: EncodedFile, held_out: EncodedFile | None, *, max_length: int, seed: int) -> DataReport:
    """Split the files as the job would, and report on them. Raises InvalidRequest if too few examples fit."""
    splits = split(learned.fitting, None if held_out is None else held_out.fitting, seed=seed)
    prompts = prompts_of(learned.fitting)
    labels = label_set(learned.examples)
    report = DataReport(
        training=_file_report(learned),
        validation=None if held_out is None else _file_report(held_out),
        max_length=max_length,
        leaked=0 if held_out is None else sum(example.prompt_ids in prompts for example in held_out.fitting),
        splits=SplitSizes(train=len(splits.train), validation=len(splits.validation), test=len(splits.test)),
        labels=None if labels is None else list(labels),
        warnings=[],
    )
    return report.model_copy(update={"warnings": _warnings(report)})


def _too_long(encoded: Sequence[EncodedExample], fitting: int, needed: int, max_length: int) -> str:
    shortest, longest = (choose(encoded, key=lambda example: example.length) for choose in (min, max))
    return (
        f"{fitting} of {len(encoded)} examples have at most max_length, {max_length} tokens; at least {needed} are "
        f"needed. The longest, {longest.location}, has {longest.length} tokens, the shortest, {shortest.location}, "
        f"{shortest.length}"
    )


def _file_report(file: EncodedFile) -> FileReport:
    targets_of = defaultdict(set)
    for example in file.encoded:
        targets_of[example.prompt_ids].add(example.completion_ids)
    return FileReport(
        rows=len({example.location for example in file.examples}),
        examples=len(file.examples),
        too_long=len(file.encoded) - len(file.fitting),
        duplicates=len(file.encoded) - sum(map(len, targets_of.values())),
        conflicts=sum(len(targets) > 1 for targets in targets_of.values()),
        targets=len({example.completion_ids for example in file.encoded}),
        prompt_tokens=_lengths([len(example.prompt_ids) for example in file.encoded]),
        completion_tokens=_lengths([len(example.completion_ids) for example in file.encoded]),
        total_tokens=_lengths([example.length for example in file.encoded]),
    )


def _lengths(tokens: Sequence[int]) -> TokenLengths:
    ordered = sorted(tokens)
    p50, p90, p99 = (ordered[math.ceil(percent * len(ordered) / 100) - 1] for percent in (50, 90, 99))
    return TokenLengths(p50=p50, p90=p90, p99=p99, max=ordered[-1])


def _warnings(report: DataReport) -> list[str]:
    files = [("training", report.training), ("validation", report.validation)]
    found = [warning for name, file in files if file is not None for warning in _file_warnings(name, file, report)]
    if report.leaked and report.validation is not None:
        found.append(
            f"{report.leaked} of {report.validation.examples} validation examples are left out, because the "
            f"training data has their prompts"
        )
    return found


def _file_warnings(name: str, file: FileReport, report: DataReport) -> list[str]:
    found = []
    if file.too_long:
        found.append(
            f"{file.too_long} of {file.examples} {name} examples are left out: they are longer than max_length, "
            f"{report.max_length} tokens; the longest has {file.total_tokens.max}"
        )
    if file.duplicates:
        found.append(f"{file.duplicates} of {file.examples} {name} examples repeat another one exactly")
    if file.conflicts:
        found.append(f"{file.conflicts} {name} prompts have different targets; is this intended?")
    if file.targets == 1:
        found.append(f"all {name} targets are the same, so one answer is right for every prompt")
    return found
