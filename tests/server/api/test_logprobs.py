"""Text offsets of tokens if a character spans several tokens."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

from reftserve.server.api.logprobs import TextLogprobs
from reftserve.server.base.folder import Base
from reftserve.server.engine.messages import TokenLogprobs


@dataclass
class Bytes:
    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def test_a_character_of_several_tokens_counts_once() -> None:
    base = cast("Base", SimpleNamespace(tokenizer=Bytes()))
    found = TextLogprobs(base).add([TokenLogprobs(byte, -1.0, []) for byte in "a😀b".encode()])
    assert found.text_offset == [0, 1, 1, 1, 1, 2]
    assert found.tokens == ["a", *(f"bytes:\\x{byte:02x}" for byte in "😀".encode()), "b"]
