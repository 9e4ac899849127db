"""Which tokens of a request an edit touches, in the notation of the LoReFT paper.

    f7+l7       the first 7 and the last 7 prompt tokens          (likewise f0+l1, f5, l1)
    prompt      every prompt token
    generated   every token after the prompt; `all` is both

Positions are indices into the final token ids, chat template and BOS included. As in pyreft, at most n // 2 of a
prompt's n tokens are first and at most n // 2 are last. A one-token prompt's token is last: `l1` is always index n - 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from reftserve.interventions.intervention_errors import PositionsError, shorten

_PATTERN = re.compile(r"(?:f(?P<first>\d{1,6}))?(?:\+?l(?P<last>\d{1,6}))?")


@dataclass(frozen=True)
class Positions:
    """Parsed positions; the module's table explains them."""

    first: int = 0
    last: int = 0
    prompt: bool = False
    generated: bool = False

    @classmethod
    @lru_cache(maxsize=1024)  # an artifact names the same positions at each of its layers
    def parse(cls, text: str) -> Positions:
        """Parse the notation. Raises PositionsError for any other text, and for positions without a token."""
        if text in ("prompt", "generated", "all"):
            return cls(prompt=text != "generated", generated=text != "prompt")
        match = _PATTERN.fullmatch(text)
        if not match or text.startswith("+"):
            raise PositionsError(
                f"positions {shorten(repr(text))}; expected like 'f7+l7', 'l1', 'prompt', 'generated' or 'all'"
            )
        parsed = cls(first=int(match["first"] or 0), last=int(match["last"] or 0))
        if parsed == cls():
            raise PositionsError(f"positions {text!r} select no token; f or l must be above 0")
        return parsed

    def __str__(self) -> str:
        if self.prompt or self.generated:
            return "all" if self.prompt and self.generated else "prompt" if self.prompt else "generated"
        return f"f{self.first}+l{self.last}"

    def indices(self, n_prompt: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the edited indices within [start, stop), ascending, of a request with `n_prompt` prompt tokens."""
        parts = [np.arange(max(start, low), min(stop, high)) for low, high in self._ranges(n_prompt, stop)]
        return np.concatenate(parts).astype(np.int64)

    def _ranges(self, n_prompt: int, stop: int) -> list[tuple[int, int]]:
        if self.prompt or self.generated:
            return [(0 if self.prompt else n_prompt, stop if self.generated else n_prompt)]
        first = min(self.first, n_prompt // 2)
        last = min(self.last, max(1, n_prompt // 2))
        return [(0, first), (n_prompt - last, n_prompt)]

    def split(self) -> list[Positions]:
        """Return prefix and suffix as separate positions, for untied weights; other positions stay whole."""
        parts = [Positions(first=self.first), Positions(last=self.last)]
        return [part for part in parts if part != Positions()] or [self]
