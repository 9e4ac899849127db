"""From tokens to text, piece by piece: no half characters, and stop strings found across token boundaries."""

from __future__ import annotations

from collections.abc import Sequence

from reftserve.server.base.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT = 5  # tokens before a text that decide how it begins
# An unfinished character has at most 3 bytes, and a token at least one: of more tokens that make no text, those before
# the last 3 are no character and never will be.
UNFINISHED = 3
LONGEST_TAIL = 16  # tokens that make no text, before those are given up: decoding them again each time is quadratic


class Detokenizer:
    """The text of one answer. Text is held back while it could still become something else: a character whose bytes
    are not complete, or the beginning of a stop string.

    prompt_ids: what the answer goes on from: many tokenizers drop a space at the beginning of what they decode.
    hidden_token_ids: without text. min_tokens: what is certain before so many tokens is never part of a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        prompt_ids: Sequence[int] = (),
        hidden_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._min_tokens = min_tokens
        self._stops = stops
        self._hidden = frozenset(hidden_token_ids)
        self._token_ids = list(prompt_ids[-CONTEXT:])
        # Decoding begins at `_prefix`: a few tokens before the text that is new, for tokenizers that put a space
        # between words only when there is a word before.
        self._prefix, self._read = 0, len(self._token_ids)
        self._num_context = len(self._token_ids)
        self._pending = ""
        self.stopped = False

    def add(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """Take new tokens; the text that is certain now. With `last`, all that is left.

        Once `stopped` is true a stop string was found: what comes before it has been returned, nothing more will be.
        """
        if self.stopped:
            return ""
        self._token_ids += [token for token in token_ids if token not in self._hidden]
        self._pending += self._decode(last=last)
        if len(self._token_ids) - self._num_context < self._min_tokens:
            return self._release(len(self._pending))
        ends = [index for stop in self._stops if (index := self._pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends))
        return self._release(len(self._pending) - (0 if last else self._held_back()))

    def _decode(self, *, last: bool) -> str:
        before = self._tokenizer.decode(self._token_ids[self._prefix : self._read])
        text = self._tokenizer.decode(self._token_ids[self._prefix :])
        end = len(self._token_ids)
        if not last and text.endswith(REPLACEMENT):
            end -= UNFINISHED
            given_up = self._tokenizer.decode(self._token_ids[self._prefix : end])
            # Where a character lies across the end, the next token moves it on.
            if end - self._read < LONGEST_TAIL or not text.startswith(given_up):
                return ""
            text = given_up
        self._prefix, self._read = self._read, end
        return text[len(before) :]

    def _held_back(self) -> int:
        """Length of the longest end of the pending text that a stop string begins with."""
        lengths = [
            length
            for stop in self._stops
            for length in range(1, min(len(stop), len(self._pending) + 1))
            if self._pending.endswith(stop[:length])
        ]
        return max(lengths, default=0)

    def _release(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        return text
