"""Which tokens of which examples a forward pass computes, side by side in one row of tokens.

Of each example a pass computes a *span*: the tokens from `start` on. What lies before is constant and kept
(`activation_cache.py`), or it is the *parent* of several spans: tokens that their examples begin with, computed once
for all.

    examples   a b c d e f    a b c d g h i        (of one batch, edited alike as far as `d`)
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

# A beginning in common gets rows of its own from this part of the longest example on: attention to it goes through a
# mask, which on the CPU costs a long example more than the rows of a short beginning.
LEAST_PART = 1 / 8


@dataclass(frozen=True)
class Span:
    """The tokens [start, stop) of an example of a batch, which is named by its number.

    parent: computes the tokens before `start`, unless they are kept.
    """

    example: EncodedExample
    start: int
    stop: int
    batch: int = 0
    parent: Span | None = None

    @property
    def rows(self) -> int:
        """Tokens that a pass computes."""
        return self.stop - self.start

    @property
    def targets(self) -> int:
        """Completion tokens that it predicts: all of its example's, or of a parent none."""
        return max(0, self.stop - len(self.example.prompt_ids) + 1)


@dataclass(frozen=True)
class Batch:
    """Examples that are computed under the same edits.

    edited: where those edits are. at_random: whether they differ from row to row, as they do with dropout.
    """

    examples: Sequence[EncodedExample]
    edited: Collection[Positions] = ()
    at_random: bool = False

    def families(self, spans: Iterable[Span]) -> list[list[Span]]:
        """Spans of this batch's examples; those that begin alike get a parent for what they have in common."""
        return [
            _with_parent(family, length)
            for family, length in _alike([(span, self._comparable(span)) for span in spans])
        ]

    def _comparable(self, span: Span) -> NDArray[np.int64]:
        """For each token that other spans may have in common: a number for the token and whether it is edited.

        The last prompt token is not among them: it predicts.
        """
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


def _alike(sequences: Iterable[tuple[Span, NDArray[np.int64]]]) -> list[tuple[list[Span], int]]:
    """Families of spans whose sequences begin alike, and with how many numbers.

    In sorted order, where like beginnings are neighbours, a span joins the family before it if that saves rows.
    """
    families: list[tuple[list[Span], int]] = []
    last = np.empty(0, dtype=np.int64)
    for span, sequence in sorted(sequences, key=lambda pair: pair[1].tobytes()):
        family, length = families[-1] if families else ([], 0)
        common = min(length, _common(last, sequence))
        if common * len(family) > length * (len(family) - 1):
            family.append(span)
            families[-1] = family, common
        else:
            families.append(([span], len(sequence)))
        last = sequence
    return families


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many numbers two sequences begin with alike."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


def _with_parent(family: list[Span], length: int) -> list[Span]:
    if len(family) == 1 or length < LEAST_PART * max(span.rows for span in family):
        return family
    parent = replace(family[0], stop=length)
    return [replace(span, start=length, parent=parent) for span in family]


def in_passes(families: Iterable[Sequence[Span]], max_rows: int) -> list[list[Span]]:
    """The spans that one forward pass computes together; those of a family meet, and those of like length.

    A pass has up to `max_rows` rows, unless a single span and its parent have more. A family that needs several passes
    has its parent in each.
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
    """Spans as tensors, their parents among them.

    spans: in the order of their rows. roots: how many of them, the first, have no parent. parents: of each of the
    others, the number of its parent. offsets: first row of a span.
    input_ids, positions: [rows]. target_rows, labels: [targets].
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
        """The spans that have targets, in the order of these."""
        return [span for span in self.spans if span.targets]

    def with_parent(self, number: int) -> Tensor:
        """The rows of a span and before them those of its parent, [rows]."""
        span = self.spans[number]
        own = torch.arange(self.offsets[number], self.offsets[number] + span.rows, device=self.device)
        if number < self.roots:
            return own
        return torch.cat([self.with_parent(self.parents[number - self.roots]), own])
