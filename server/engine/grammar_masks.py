"""Structured output through llguidance: compiles grammars outside the step loop, and masks forbidden tokens."""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from reftserve.server.base.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
SILENT = 0  # llguidance would otherwise write warnings about a grammar to standard error


@dataclass(frozen=True)
class Compiled:
    """A request's matcher in its initial state, or an error."""

    request_id: str
    matcher: LLMatcher | None
    error: str | None = None


class GrammarCompiler:
    """Compiles grammars in a thread; the engine collects them between steps. vocabulary: width of the logits.

    It reads the vocabulary at once: later that would stop a step for 0.3 s, because llguidance lets no thread run.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...], vocabulary: int) -> None:
        width = max(vocabulary, len(tokenizer))  # Gemma 3's tokenizer has one token more than the model
        self._unsupported = ""
        self._vocabulary: LLTokenizer | None = None
        try:
            self._vocabulary = tokenizer.vocabulary(size=width, eos_token_ids=eos_token_ids)
        except Exception as cause:  # requests without a grammar do not need it
            logger.warning("structured output is off: llguidance cannot read this vocabulary: %s", cause)
            self._unsupported = f"llguidance cannot read this base's vocabulary: {cause}"
        self._num_pending = 0
        self._grammars: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="grammar-compiler", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether a requested grammar is not collected yet."""
        return self._num_pending > 0

    def request(self, request_id: str, grammar: str) -> None:
        """Request a matcher; `collect` will return it."""
        self._num_pending += 1
        self._grammars.put((request_id, grammar))

    def collect(self) -> list[Compiled]:
        """Return the grammars compiled since the last call, without waiting."""
        done = []
        while not self._results.empty():
            done.append(self._results.get())
        self._num_pending -= len(done)
        return done

    def close(self) -> None:
        """Stop the thread after the current grammar."""
        self._grammars.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._grammars.get()) is not None:
            request_id, grammar = item
            if self._vocabulary is None:
                self._results.put(Compiled(request_id, None, self._unsupported))
                continue
            try:
                matcher = LLMatcher(self._vocabulary, grammar, log_level=SILENT)
                compiled = Compiled(request_id, matcher, matcher.get_error() or None)
            except BaseException as cause:  # a panic of llguidance is no Exception
                # Without an error the request would wait for ever, and without the thread all later ones.
                logger.exception("a grammar could not be compiled")
                compiled = Compiled(request_id, None, f"{type(cause).__name__}: {cause}")
            self._results.put(compiled)


def forbidden_tokens(matchers: list[LLMatcher], vocabulary: int) -> NDArray[np.bool_]:
    """Return the tokens that cannot come next, [matchers, vocabulary]. Beyond llguidance's limits a matcher fails."""
    bits = allocate_token_bitmask(len(matchers), vocabulary)
    for row, matcher in enumerate(matchers):
        fill_next_token_bitmask(matcher, bits, row)
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :vocabulary]
    forbidden: NDArray[np.bool_] = allowed == 0
    return forbidden
