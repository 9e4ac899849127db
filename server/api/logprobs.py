"""Log-probabilities in OpenAI's two shapes: chat and text completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from reftserve.client.schemas import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from reftserve.server.base.folder import Base
from reftserve.server.engine.messages import TokenLogprobs

LOWEST = -9999.0  # OpenAI's value for minus infinity, which JSON cannot write


def chat_logprobs(base: Base, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """Return the log-probabilities of a chat answer's tokens."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                **_top(base, entry.token_id, entry.logprob).model_dump(),
                top_logprobs=[_top(base, token, logprob) for token, logprob in entry.top],
            )
            for entry in entries
        ]
    )


class TextLogprobs:
    """Log-probabilities of one text's tokens; each piece continues the offsets of the one before."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._offset = 0
        # A character may span several tokens: it begins at the first one and counts once.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def start(self, first_token: int) -> CompletionLogprobs:
        """Return the entry of a prompt's first token, which has no log-probability."""
        return CompletionLogprobs(
            tokens=[self._text(first_token)],
            token_logprobs=[None],
            top_logprobs=[None],
            text_offset=[self._advance(first_token)],
        )

    def add(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """Return the entries of the next tokens. `top_logprobs` always includes the token itself."""
        return CompletionLogprobs(
            tokens=[self._text(entry.token_id) for entry in entries],
            token_logprobs=[max(entry.logprob, LOWEST) for entry in entries],
            top_logprobs=[
                {
                    self._text(token): max(logprob, LOWEST)
                    for token, logprob in [*entry.top, (entry.token_id, entry.logprob)]
                }
                for entry in entries
            ],
            text_offset=[self._advance(entry.token_id) for entry in entries],
        )

    def _text(self, token_id: int) -> str:
        return _readable(self._base.tokenizer.token_bytes(token_id))

    def _advance(self, token_id: int) -> int:
        offset = self._offset
        self._offset += len(self._decoder.decode(self._base.tokenizer.token_bytes(token_id)))
        return offset


def joined(pieces: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Join the pieces of one text."""
    return CompletionLogprobs(
        tokens=[token for piece in pieces for token in piece.tokens],
        token_logprobs=[logprob for piece in pieces for logprob in piece.token_logprobs],
        top_logprobs=[top for piece in pieces for top in piece.top_logprobs],
        text_offset=[offset for piece in pieces for offset in piece.text_offset],
    )


def _top(base: Base, token_id: int, logprob: float) -> TopLogprob:
    raw = base.tokenizer.token_bytes(token_id)
    return TopLogprob(token=_readable(raw), logprob=max(logprob, LOWEST), bytes=list(raw))


def _readable(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
