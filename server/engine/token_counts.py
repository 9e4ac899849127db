"""The distinct tokens of a sequence and their number in its answer: what penalties need, kept as tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SMALLEST = 64


class TokenCounts:
    """Counts of one sequence's tokens. It follows the list of tokens, so preemption changes nothing."""

    def __init__(self, n_prompt: int) -> None:
        self._n_prompt = n_prompt
        self._num_counted = 0
        self._index_of: dict[int, int] = {}
        self._ids = np.empty(SMALLEST, dtype=np.int64)
        self._in_answer = np.zeros(SMALLEST, dtype=np.float32)

    def count(self, token_ids: Sequence[int]) -> None:
        """Count the tokens that have arrived since the last call. token_ids: all of the sequence's, only growing."""
        for position in range(self._num_counted, len(token_ids)):
            index = self._index(token_ids[position])
            if position >= self._n_prompt:
                self._in_answer[index] += 1
        self._num_counted = len(token_ids)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The distinct tokens, [distinct], a view."""
        return self._ids[: len(self._index_of)]

    @property
    def in_answer(self) -> NDArray[np.float32]:
        """How often the answer holds each of `ids`, [distinct], a view."""
        return self._in_answer[: len(self._index_of)]

    def _index(self, token: int) -> int:
        index = self._index_of.setdefault(token, len(self._index_of))
        if index == len(self._ids):
            self._ids = np.resize(self._ids, 2 * index)
            self._in_answer = np.concatenate([self._in_answer, np.zeros(index, dtype=np.float32)])
        self._ids[index] = token
        return index
