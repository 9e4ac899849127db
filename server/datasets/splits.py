"""Splits of a data set into training, validation and test parts that share no prompt and no conversation."""

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
    """Split examples into parts that share no row and no prompt. Raises InvalidRequest when there are too few.

    Without validation data the parts are 80, 10 and 10 percent; with it, half of it selects and half scores. A held-out
    example is dropped if an earlier part has its prompt, as in conversations that begin alike.
    """
    if len(training) < MIN_EXAMPLES:
        raise InvalidRequest(
            f"{len(training)} training examples; at least {MIN_EXAMPLES} are needed",
            param="training_file",
            code="too_few_examples",
        )
    if validation is None:
        unique, shared = _split_by_unique_last_prompt(_shuffled_groups(training, seed))
        # At least two groups: one selects, one scores.
        held_out, rest = _split_off(unique + shared, 2 * max(1, len(training) // 10), min_groups=2)
        train = _flatten(rest)
    else:
        held_out = _shuffled_groups(validation, seed)
        train = list(training)
    unique, shared = _split_by_unique_last_prompt(_without_prompts_of(train, held_out))
    held_out = unique[:-1] + shared + unique[-1:]  # the test part keeps at least the last group's unique prompt
    selecting, scoring = _split_off(held_out, sum(map(len, held_out)) // 2, min_groups=1)
    scoring = _without_prompts_of(_flatten(selecting), scoring)
    if not (train and selecting and scoring):
        needed = "three different prompts" if validation is None else "two prompts that are not in the training data"
        raise InvalidRequest(
            f"at least {needed} are needed: the examples that train, select and score share no prompt",
            param="training_file" if validation is None else "validation_file",
            code="too_few_examples",
        )
    return Splits(train=train, validation=_flatten(selecting), test=_flatten(scoring))


def prompts_of(examples: Iterable[EncodedExample]) -> set[PromptIds]:
    """Return the distinct prompts."""
    return {example.prompt_ids for example in examples}


def _shuffled_groups(examples: Sequence[EncodedExample], seed: int) -> list[Group]:
    """Group conversations by their last prompt, at random; groups by any prompt would join all that begin alike."""
    last = {example.location: example.prompt_ids for example in examples}
    groups: defaultdict[PromptIds, Group] = defaultdict(list)
    for example in examples:
        groups[example.prompt_ids if example.location is None else last[example.location]].append(example)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - a split, not a secret
    return shuffled


def _split_by_unique_last_prompt(groups: list[Group]) -> tuple[list[Group], list[Group]]:
    """Split groups into those whose last prompt is in no other group, which a held-out part can keep, and the rest."""
    count = Counter(prompt for group in groups for prompt in prompts_of(group))
    unique = [group for group in groups if count[group[-1].prompt_ids] == 1]
    return unique, [group for group in groups if count[group[-1].prompt_ids] > 1]


def _split_off(groups: list[Group], count: int, *, min_groups: int) -> tuple[list[Group], list[Group]]:
    """Split off the first groups with at least `count` examples and `min_groups` groups; at least one group remains."""
    taken = size = 0
    while taken < len(groups) - 1 and (size < count or taken < min_groups):
        size += len(groups[taken])
        taken += 1
    return groups[:taken], groups[taken:]


def _without_prompts_of(earlier: Sequence[EncodedExample], groups: list[Group]) -> list[Group]:
    prompts = prompts_of(earlier)
    kept = [[example for example in group if example.prompt_ids not in prompts] for group in groups]
    return [group for group in kept if group]


def _flatten(groups: list[Group]) -> list[EncodedExample]:
    return [example for group in groups for example in group]
