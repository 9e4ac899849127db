"""Structured output through llguidance: grammars compiled off the step loop, and which tokens they let come next."""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
SILENT = 0  # llguidance would write what it thinks of a grammar to standard error


@dataclass(frozen=True)
class Compiled:
    """A request's grammar at its beginning, or why there is none."""

    request_id: str
    matcher: LLMatcher | None
    error: str | None = None


class GrammarCompiler:
    """Compiles grammars in a thread of its own; the engine collects them between steps.

    vocabulary: width of the model's logits, which may be more or less than the tokenizer has tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...], vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocabulary = max(vocabulary, len(tokenizer))  # Gemma 3's tokenizer knows a token that the model does not
        self._num_pending = 0
        self._grammars: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="grammar-compiler", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether a requested grammar has not been collected yet."""
        return self._num_pending > 0

    def request(self, request_id: str, grammar: str) -> None:
        """Ask for a matcher; `collect` will report it."""
        self._num_pending += 1
        self._grammars.put((request_id, grammar))

    def collect(self) -> list[Compiled]:
        """What was compiled since the last call; never waits."""
        done = []
        while not self._results.empty():
            done.append(self._results.get())
        self._num_pending -= len(done)
        return done

    def close(self) -> None:
        """End the thread after the grammar under way."""
        self._grammars.put(None)
        self._thread.join()

    @cached_property
    def _vocabulary_trie(self) -> LLTokenizer:
        return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=list(self._eos_token_ids))

    def _run(self) -> None:
        while (item := self._grammars.get()) is not None:
            request_id, grammar = item
            try:
                matcher = LLMatcher(self._vocabulary_trie, grammar, log_level=SILENT)
                compiled = Compiled(request_id, matcher, matcher.get_error() or None)
            except Exception as cause:
                # The thread must live on, and the request hear of it: whoever waits for a grammar would wait for ever.
                logger.exception("a grammar could not be compiled")
                compiled = Compiled(request_id, None, f"{type(cause).__name__}: {cause}")
            self._results.put(compiled)


def forbidden_tokens(matchers: list[LLMatcher], vocabulary: int) -> NDArray[np.bool_]:
    """Which tokens cannot come next, [matchers, vocabulary] of booleans.

    A matcher that gives up, because its grammar needs more than llguidance's limits, has an error afterwards.
    """
    bits = allocate_token_bitmask(len(matchers), vocabulary)
    for row, matcher in enumerate(matchers):
        fill_next_token_bitmask(matcher, bits, row)
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :vocabulary]
    forbidden: NDArray[np.bool_] = allowed == 0
    return forbidden
