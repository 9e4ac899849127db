"""Turns tokens into text incrementally, with whole characters and with stop strings across token boundaries."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from reftserve.server.base.tokenizer import Tokenizer
from reftserve.server.inference.stop_strings import StopString

REPLACEMENT = "\ufffd"
CONTEXT = 5  # tokens before a text that decide its first characters
# An unfinished character has at most 3 bytes, so at most the last 3 tokens can still become a character.
UNFINISHED = 3
LONGEST_TAIL = 16  # tokens to decode again while they form no text: without a limit the cost is quadratic


class Detokenizer:
    """The text of one answer. Holds back incomplete characters and possible beginnings of stop strings.

    prompt_ids: the prompt; many tokenizers drop a leading space when they decode an answer alone.
    hidden_token_ids: tokens without text. min_tokens: stop strings count only after this many tokens.
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
        self._stops = [StopString(stop) for stop in stops]
        self._hidden = frozenset(hidden_token_ids)
        self._token_ids = list(prompt_ids[-CONTEXT:])
        # Decode from a few tokens before the new text: some tokenizers put a space only after an earlier word.
        self._prefix, self._read = 0, len(self._token_ids)
        self._num_context = len(self._token_ids)
        self._pending: deque[str] = deque()
        self._num_pending = 0
        self.stopped = False

    def add(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """Return the text that is now certain, up to a stop string, which sets `stopped`. last: return all of it."""
        if self.stopped:
            return ""
        self._token_ids += [token for token in token_ids if token not in self._hidden]
        text = self._decode(last=last)
        if len(self._token_ids) - self._num_context < self._min_tokens:
            return text
        num_pending = self._num_pending
        self._pending.append(text)
        self._num_pending += len(text)
        # Where each completed stop string begins, in the pending text.
        starts = [num_pending + end - len(stop.text) for stop in self._stops if (end := stop.find(text)) is not None]
        if starts:
            self.stopped = True
            return "".join(self._pending)[: min(starts)]
        held_back = 0 if last else max((stop.num_matched for stop in self._stops), default=0)
        return self._release(self._num_pending - held_back)

    def _decode(self, *, last: bool) -> str:
        before = self._tokenizer.decode(self._token_ids[self._prefix : self._read])
        text = self._tokenizer.decode(self._token_ids[self._prefix :])
        end = len(self._token_ids)
        if not last and text.endswith(REPLACEMENT):
            end -= UNFINISHED
            given_up = self._tokenizer.decode(self._token_ids[self._prefix : end])
            # If a character crosses `end`, wait for the next token.
            if end - self._read < LONGEST_TAIL or not text.startswith(given_up):
                return ""
            text = given_up
        self._prefix, self._read = self._read, end
        return text[len(before) :]

    def _release(self, length: int) -> str:
        """Take this many characters from the pending pieces."""
        self._num_pending -= length
        released = []
        while length:
            piece = self._pending.popleft()
            released.append(piece[:length])
            if len(piece) > length:
                self._pending.appendleft(piece[length:])
            length -= len(released[-1])
        return "".join(released)
