"""The tokens that a forward pass of training computes, packed into one row. Attention is in `varlen_attention.py`.

A pass computes one *span* per example: its tokens from `start` on. The tokens before are cached
(`activation_cache.py`), or they are the *parent* of several spans: a common prefix, computed once.

    examples   a b c d e f    a b c d g h i        (of one batch, with the same edits up to `d`)
    parent     a b c d
    children   e f    g h i
    rows       tokens of all spans, parents first and children last   [rows]
    targets    rows whose logits predict a completion token           [targets]
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reftserve.interventions import Positions
from reftserve.server.datasets import EncodedExample

# A common prefix becomes a parent if it is at least this part of the longest example. Attention to a parent needs a
# mask, and on the CPU the mask costs a long example more than a short prefix saves.
LEAST_PART = 1 / 8


@dataclass(frozen=True)
class Span:
    """The tokens [start, stop) of an example. parent: computes the tokens before `start` unless they are cached."""

    example: EncodedExample
    start: int
    stop: int
    batch: int = 0
    parent: Span | None = None

    @property
    def rows(self) -> int:
        """The number of tokens that a pass computes."""
        return self.stop - self.start

    @property
    def targets(self) -> int:
        """The number of completion tokens that the span predicts: all of its example's, or 0 for a parent."""
        return max(0, self.stop - len(self.example.prompt_ids) + 1)


@dataclass(frozen=True)
class Batch:
    """Examples computed under the same edits at the positions `edited`. at_random: edits differ by row (dropout)."""

    examples: Sequence[EncodedExample]
    edited: Collection[Positions] = ()
    at_random: bool = False

    def families(self, spans: Iterable[Span]) -> list[list[Span]]:
        """Group spans of this batch by common prefix; a prefix that is long enough becomes a parent."""
        return [
            _with_parent(family, length)
            for family, length in _group_by_prefix([(span, self._prefix_keys(span)) for span in spans])
        ]

    def _prefix_keys(self, span: Span) -> NDArray[np.int64]:
        """Return a key for each token that spans may share, from its id and edits; the last prompt token predicts."""
        if span.start > 0:
            return np.empty(0, dtype=np.int64)
        n_prompt = len(span.example.prompt_ids)
        numbers = np.array(span.example.prompt_ids, dtype=np.int64)
        stop = n_prompt - 1
        for positions in self.edited:
            indices = positions.indices(n_prompt, 0, n_prompt)
            numbers *= 2
            numbers[indices] += 1
            if self.at_random and len(indices):
                stop = min(stop, int(indices[0]))
        return numbers[:stop]


def _group_by_prefix(keyed: Iterable[tuple[Span, NDArray[np.int64]]]) -> list[tuple[list[Span], int]]:
    """Return groups of spans with the length of their shared prefix. Sorted neighbours join where that saves rows."""
    families: list[tuple[list[Span], int]] = []
    last = np.empty(0, dtype=np.int64)
    for span, keys in sorted(keyed, key=lambda pair: pair[1].tobytes()):
        family, length = families[-1] if families else ([], 0)
        common = min(length, _common_prefix_length(last, keys))
        if common * len(family) > length * (len(family) - 1):
            family.append(span)
            families[-1] = family, common
        else:
            families.append(([span], len(keys)))
        last = keys
    return families


def _common_prefix_length(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


def _with_parent(family: list[Span], length: int) -> list[Span]:
    if len(family) == 1 or length < LEAST_PART * max(span.rows for span in family):
        return family
    parent = replace(family[0], stop=length)
    return [replace(span, start=length, parent=parent) for span in family]


def in_passes(families: Iterable[Sequence[Span]], max_rows: int) -> list[list[Span]]:
    """Divide spans into passes of up to `max_rows` rows, with families and spans of similar length together.

    A single span and its parent may exceed the limit. A family that needs several passes has its parent in each.
    """
    passes: list[list[Span]] = []
    free = 0
    for family in sorted(families, key=lambda family: max(span.rows for span in family)):
        parent = family[0].parent
        parent_rows = needed = 0 if parent is None else parent.rows
        for span in sorted(family, key=lambda span: span.rows):
            if needed + span.rows > free:
                passes.append([])
                free, needed = max_rows, parent_rows
            passes[-1].append(span)
            free -= needed + span.rows
            needed = 0
    return passes


class VarlenRows:
    """Spans and their parents as tensors: input_ids and positions [rows], target_rows and labels [targets].

    spans: in row order, `roots` spans without a parent first. parents: the parent's index of each other span.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        parents = list(dict.fromkeys(span.parent for span in spans if span.parent is not None))
        single = [span for span in spans if span.parent is None]
        self.spans = [*parents, *single, *(span for span in spans if span.parent is not None)]
        self.roots = len(parents) + len(single)
        numbers = {parent: number for number, parent in enumerate(parents)}
        self.parents = [numbers[span.parent] for span in self.spans if span.parent is not None]
        self.device = device
        self.offsets: list[int] = []
        ids: list[int] = []
        positions: list[int] = []
        target_rows: list[int] = []
        labels: list[int] = []
        for span in self.spans:
            example = span.example
            self.offsets.append(len(ids))
            ids += (example.prompt_ids + example.completion_ids)[span.start : span.stop]
            positions += range(span.start, span.stop)
            target_rows += range(len(ids) - span.targets, len(ids))
            labels += example.completion_ids[: span.targets]
        self.input_ids, self.positions, self.target_rows, self.labels = (
            torch.tensor(values, device=device) for values in (ids, positions, target_rows, labels)
        )

    @property
    def scored(self) -> list[Span]:
        """The spans that have targets, in the order of the targets."""
        return [span for span in self.spans if span.targets]

    def with_parent(self, number: int) -> Tensor:
        """Return the rows of a span after those of its parent, [rows]."""
        span = self.spans[number]
        own = torch.arange(self.offsets[number], self.offsets[number] + span.rows, device=self.device)
        if number < self.roots:
            return own
        return torch.cat([self.with_parent(self.parents[number - self.roots]), own])
