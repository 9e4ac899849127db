"""Three disjoint parts of a data set, of which no prompt and no conversation is on two sides."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reftserve.server.datasets.encoding import EncodedExample
from reftserve.server.errors import InvalidRequest

MIN_EXAMPLES = 10

Group = list[EncodedExample]
PromptIds = tuple[int, ...]


@dataclass(frozen=True)
class Splits:
    """train changes the weights, validation selects the best of them, test scores and selects nothing."""

    train: list[EncodedExample]
    validation: list[EncodedExample]
    test: list[EncodedExample]


def split(training: Sequence[EncodedExample], validation: Sequence[EncodedExample] | None, *, seed: int) -> Splits:
    """Examples of one row, or with one prompt, stay on one side.

    Without validation data, 80, 10 and 10 percent of the training data. With it, half of it selects and half scores.
    What would be held out although a part before it has its prompt (conversations that begin alike) is left out.
    Raises InvalidRequest when there are too few examples.
    """
    if len(training) < MIN_EXAMPLES:
        raise InvalidRequest(
            f"{len(training)} training examples; at least {MIN_EXAMPLES} are needed",
            param="training_file",
            code="too_few_examples",
        )
    if validation is None:
        ends, beginnings = _by_end(_groups(training, seed))
        # Two groups at the least: one selects, one scores.
        held_out, rest = _take(ends + beginnings, 2 * max(1, len(training) // 10), at_least=2)
        train = _together(rest)
    else:
        held_out = _groups(validation, seed)
        train = list(training)
    ends, beginnings = _by_end(_unseen(held_out, train))
    held_out = ends[:-1] + beginnings + ends[-1:]  # what scores last is not all seen in what selects
    chosen, scoring = _take(held_out, sum(map(len, held_out)) // 2, at_least=1)
    scoring = _unseen(scoring, _together(chosen))
    if not (train and chosen and scoring):
        needed = "three different prompts" if validation is None else "two prompts that are not in the training data"
        raise InvalidRequest(
            f"at least {needed} are needed: held-out examples, some to select and some to score, share no prompt",
            param="training_file" if validation is None else "validation_file",
            code="too_few_examples",
        )
    return Splits(train=train, validation=_together(chosen), test=_together(scoring))


def prompts_of(examples: Iterable[EncodedExample]) -> set[PromptIds]:
    """The different prompts."""
    return {example.prompt_ids for example in examples}


def _groups(examples: Sequence[EncodedExample], seed: int) -> list[Group]:
    """What must stay together, in random order: conversations whose last learned turns have the same prompt.

    Of a row with one example that is its prompt. Prompts of earlier turns join nothing: conversations often begin
    alike, and all of them would be one group.
    """
    last = {example.place: example.prompt_ids for example in examples}
    groups: defaultdict[PromptIds, Group] = defaultdict(list)
    for example in examples:
        groups[example.prompt_ids if example.place is None else last[example.place]].append(example)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - a split, not a secret
    return shuffled


def _by_end(groups: list[Group]) -> tuple[list[Group], list[Group]]:
    """Groups whose last prompt no other goes through, which held out keep that one at least; and the others."""
    count = Counter(prompt for group in groups for prompt in prompts_of(group))
    ends = [group for group in groups if count[group[-1].prompt_ids] == 1]
    return ends, [group for group in groups if count[group[-1].prompt_ids] > 1]


def _take(groups: list[Group], count: int, *, at_least: int) -> tuple[list[Group], list[Group]]:
    """The first groups, until they hold `count` examples and are `at_least` so many, though never all; and the rest."""
    taken = size = 0
    while taken < len(groups) - 1 and (size < count or taken < at_least):
        size += len(groups[taken])
        taken += 1
    return groups[:taken], groups[taken:]


def _unseen(groups: list[Group], seen: Sequence[EncodedExample]) -> list[Group]:
    """The groups without the examples whose prompts have been seen."""
    prompts = prompts_of(seen)
    kept = [[example for example in group if example.prompt_ids not in prompts] for group in groups]
    return [group for group in kept if group]


def _together(groups: list[Group]) -> list[EncodedExample]:
    return [example for group in groups for example in group]
