"""Incremental detokenization: pieces join to the text, without half characters, with stop strings across tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_base_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from reftserve.server.base.tokenizer import Tokenizer
from reftserve.server.inference.detokenizer import Detokenizer
from reftserve.server.inference.stop_strings import StopString

TOKENIZER = tiny_base_tokenizer()


def byte_names() -> dict[int, str]:
    """Return GPT-2's name of each byte: the byte itself if printable, else a character from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + number) for number, byte in enumerate(unseen)}


BYTES = byte_names()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), sizes=st.lists(st.integers(1, 4), min_size=1))
def test_pieces_join_to_the_whole_text_without_half_characters(text: str, sizes: list[int]) -> None:
    ids = TOKENIZER.encode(text)
    detokenizer = Detokenizer(TOKENIZER)
    pieces, start = [], 0
    while start < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(detokenizer.add(ids[start : start + size]))
        start += size
    assert "\ufffd" not in "".join(pieces)
    pieces.append(detokenizer.add([], last=True))
    assert "".join(pieces) == TOKENIZER.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text("abc ", max_size=30), stops=st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_at_any_token_boundary(text: str, stops: list[str]) -> None:
    ids = TOKENIZER.encode(text)
    detokenizer = Detokenizer(TOKENIZER, stops)
    pieces = [detokenizer.add([token]) for token in ids] + [detokenizer.add([], last=True)]
    cuts = [text.find(stop) for stop in stops if stop in text]
    # If stop strings end at different tokens, the first complete one counts.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert detokenizer.stopped == bool(cuts)
    result = "".join(pieces)
    if not cuts:
        assert result == text
    else:
        assert text.startswith(result)
        assert any(text[len(result) :].startswith(stop) for stop in stops)
        assert len(result) <= min(ends)


def test_a_possible_stop_string_is_held_back_until_it_is_ruled_out() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["STOP"])
    assert detokenizer.add(TOKENIZER.encode("yes ST")) == "yes "
    assert detokenizer.add(TOKENIZER.encode("AR")) == "STAR"


@pytest.mark.parametrize("last", [True, False])
def test_hidden_tokens_are_not_shown(last: bool) -> None:
    detokenizer = Detokenizer(TOKENIZER, hidden_token_ids=[2])
    assert detokenizer.add([*TOKENIZER.encode("done"), 2], last=last) == "done"


def sentencepiece_like(words: list[str]) -> Tokenizer:
    """Return a tokenizer that marks word beginnings and drops a leading space on decoding, like Llama 2's."""
    tokenizer = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return Tokenizer(tokenizer)


def test_an_answer_that_begins_with_a_space_keeps_it() -> None:
    tokenizer = sentencepiece_like(["?", "▁France", "▁is", "▁Paris", "▁indeed"])
    assert tokenizer.decode([3, 4]) == "Paris indeed"
    detokenizer = Detokenizer(tokenizer, prompt_ids=[1, 2])
    assert detokenizer.add([3]) + detokenizer.add([4]) == " Paris indeed"


class CountingTokenizer:
    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.decoded += len(token_ids)
        return TOKENIZER.decode(token_ids)


@pytest.mark.parametrize("piece", ["\u00ff", "\u00e2\u00c2"], ids=["one token", "two tokens"])
def test_each_invalid_byte_is_decoded_only_a_few_times(piece: str) -> None:
    counting = CountingTokenizer()
    found = [TOKENIZER.backend.token_to_id(BYTES[ord(byte)]) for byte in piece]
    ids = (found * 2000)[:2000]
    detokenizer = Detokenizer(cast("Tokenizer", counting))
    text = "".join([detokenizer.add([token]) for token in ids]) + detokenizer.add([], last=True)
    assert text == TOKENIZER.decode(ids)
    assert counting.decoded < 80 * len(ids)


class CountedText(str):
    reads = 0

    def __getitem__(self, index: Any) -> str:
        CountedText.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("text", ["a" * 4000, "ab" * 2000, "a" * 1999 + "c" + "a" * 2000], ids=["held", "no", "late"])
def test_a_long_pending_stop_string_costs_a_few_reads_for_each_character(text: str) -> None:
    stop = CountedText("a" * 3999 + "b")
    detokenizer = Detokenizer(TOKENIZER, [stop])
    ids = TOKENIZER.encode(text)
    CountedText.reads = 0
    pieces = [detokenizer.add([token]) for token in ids]
    assert CountedText.reads < 8 * len(text)
    assert "".join([*pieces, detokenizer.add([], last=True)]) == text


@given(text=st.text("ab", max_size=60), stop=st.text("ab", min_size=1, max_size=8), sizes=st.lists(st.integers(1, 5)))
def test_a_stop_string_is_found_where_str_find_finds_it(text: str, stop: str, sizes: list[int]) -> None:
    search, start = StopString(stop), 0
    for size in [*sizes, len(text)]:
        end = search.find(text[start : start + size])
        if end is not None:
            assert start + end - len(stop) == text.find(stop)
            return
        start += size
        read = text[:start]
        assert search.num_matched == max(length for length in range(len(stop)) if read.endswith(stop[:length]))
    assert stop not in text


invalid = st.lists(st.integers(0, 255), max_size=80)


@given(raw=invalid, sizes=st.lists(st.integers(1, 5), min_size=1))
def test_pieces_of_any_bytes_join_to_the_whole_text(raw: list[int], sizes: list[int]) -> None:
    ids = [TOKENIZER.backend.token_to_id(BYTES[byte]) for byte in raw]
    detokenizer = Detokenizer(TOKENIZER)
    pieces, start = [], 0
    while start < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(detokenizer.add(ids[start : start + size]))
        start += size
    pieces.append(detokenizer.add([], last=True))
    assert "".join(pieces) == TOKENIZER.decode(ids)
