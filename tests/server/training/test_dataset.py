"""Data sets: rendered as serving renders them, split without leaks, refused with line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from reftserve.client.schemas import ChatMessage
from reftserve.server.errors import InvalidRequest
from reftserve.server.prompts import encode_rendered, render_chat
from reftserve.server.training.dataset import (
    ChatExample,
    CompletionExample,
    EncodedExample,
    encode,
    read_examples,
    split,
)

TOKENIZER = tiny_tokenizer()


def chat(*turns: tuple[str, str]) -> ChatExample:
    return ChatExample(messages=[ChatMessage(role=role, content=text) for role, text in turns])  # type: ignore[arg-type]


def test_the_prompt_is_what_serving_would_render_and_the_completion_ends_the_turn() -> None:
    example = chat(("system", "be brief"), ("user", "hello"), ("assistant", "hi"))
    encoded = encode(TOKENIZER, example)
    assert list(encoded.prompt_ids) == encode_rendered(TOKENIZER, render_chat(TOKENIZER, example.messages[:-1]))
    assert TOKENIZER.decode(encoded.completion_ids) == "hi<|im_end|>"


def test_only_the_last_assistant_turn_is_learned() -> None:
    encoded = encode(TOKENIZER, chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    assert TOKENIZER.decode(encoded.completion_ids) == "d<|im_end|>"
    assert "b<|im_end|>" in TOKENIZER.decode(encoded.prompt_ids)


def test_a_plain_completion_keeps_its_spaces_and_ends() -> None:
    encoded = encode(TOKENIZER, CompletionExample(prompt="2+2=", completion=" 4"))
    assert TOKENIZER.decode(encoded.prompt_ids) == "2+2="
    assert TOKENIZER.decode(encoded.completion_ids) == " 4<|im_end|>"


def test_a_byte_order_mark_and_blank_lines_are_no_error(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a", "completion": "b"})
    path = tmp_path / "data.jsonl"
    path.write_text(f"\ufeff{row}\n\n{row}\n", encoding="utf-8")
    assert len(read_examples(path)) == 2


encoded_examples = st.builds(lambda p, c: EncodedExample((p,), (c,)), st.integers(0, 40), st.integers(0, 3))


@given(training=st.lists(encoded_examples, min_size=10, max_size=60), seed=st.integers(0, 9))
def test_the_three_parts_are_everything_and_share_no_prompt(training: list[EncodedExample], seed: int) -> None:
    assume(len({example.prompt_ids for example in training}) > 2)
    parts = split(training, None, seed=seed)
    prompts = [{e.prompt_ids for e in part} for part in (parts.train, parts.validation, parts.test)]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    together = parts.train + parts.validation + parts.test
    assert sorted(map(repr, together)) == sorted(map(repr, training))
    assert parts == split(training, None, seed=seed), "the same seed gives the same split"


def test_validation_data_selects_with_one_half_and_scores_with_the_other() -> None:
    training = [EncodedExample((i,), (1,)) for i in range(10)]
    held_out = [EncodedExample((i,), (1,)) for i in range(5, 25)]
    parts = split(training, held_out, seed=0)
    assert parts.train == training
    assert len(parts.validation) + len(parts.test) == 15, "what is in the training data is no held-out example"
    with pytest.raises(InvalidRequest, match="two prompts"):
        split(training, training, seed=0)
    with pytest.raises(InvalidRequest, match="three different prompts"):
        split(training[:2] * 5, None, seed=0)
