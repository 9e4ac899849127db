"""The bytes of each token, as text completions and log-probabilities report them; a character may span several tokens.

llguidance knows them too, but reads the whole vocabulary first and lets no other thread run meanwhile: 0.3 s for 49,000
tokens. A test compares both.
"""

from __future__ import annotations

import json
import re
from functools import cached_property

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_SPACE = "▁"


class TokenBytes:
    """Looks up single tokens of one vocabulary."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def of(self, token_id: int) -> bytes:
        """Return a token's bytes: an added token's are those of its text, an unknown token has none."""
        if token_id in self._added:
            return self._added[token_id].encode()
        text = self._backend.id_to_token(token_id) or ""
        if self._is_byte_level:
            return b"".join(_BYTES[c] if c in _BYTES else c.encode() for c in text)
        byte = _BYTE_TOKEN.fullmatch(text)
        return bytes.fromhex(byte[1]) if byte else text.replace(_SPACE, " ").encode()

    @cached_property
    def _added(self) -> dict[int, str]:
        return {index: token.content for index, token in self._backend.get_added_tokens_decoder().items()}

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = self._backend.decoder
        if decoder is None:
            return False
        state = json.loads(decoder.__getstate__())
        return any(part["type"] == "ByteLevel" for part in state.get("decoders", [state]))


def _bytes() -> dict[str, bytes]:
    """Return the byte of each character in byte-level vocabularies (GPT-2): printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}


_BYTES = _bytes()
