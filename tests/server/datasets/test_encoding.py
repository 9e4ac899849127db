"""Examples are rendered as in serving, and each turn of a conversation is an example."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHAT_TEMPLATE, tiny_base_tokenizer
from tokenizers import AddedToken

from reftserve.client.schemas import ChatMessage
from reftserve.server.base.prompts import encode_rendered, encode_text, render_chat
from reftserve.server.base.tokenizer import load_tokenizer
from reftserve.server.datasets import EncodedExample, SourceLocation, encode
from reftserve.server.datasets.rows import row_examples
from reftserve.server.errors import InvalidRequest

TOKENIZER = tiny_base_tokenizer()
LOCATION = SourceLocation("row", 1)


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def encoded(row: dict[str, Any], tokenizer: Any = TOKENIZER) -> list[EncodedExample]:
    return [encode(tokenizer, example) for example in row_examples(row, LOCATION)]


def texts(examples: list[EncodedExample]) -> list[str]:
    return [TOKENIZER.decode(example.completion_ids) for example in examples]


said = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(str.strip)
conversations = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), said), min_size=1, max_size=7)


@given(turns=conversations, answer=said)
def test_each_assistant_turn_is_learned_after_the_prompt_that_serving_renders(
    turns: list[tuple[str, str]], answer: str
) -> None:
    row = chat(*turns, ("assistant", answer))
    messages = [ChatMessage.model_validate(message) for message in row["messages"]]
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" and index > 0]
    examples = encoded(row)
    assert len(examples) == len(answers)
    for index, example in zip(answers, examples, strict=True):
        assert list(example.prompt_ids) == encode_rendered(TOKENIZER, render_chat(TOKENIZER, messages[:index]))
        assert TOKENIZER.decode(example.completion_ids) == messages[index].text + "<|im_end|>"
        assert example.location == LOCATION


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.mark.parametrize("answer", ["yes", " yes\n", "<eos> ends a text"])
def test_an_answer_ends_with_the_templates_end_of_turn_and_no_extra_eos(answer: str) -> None:
    tokens = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    named = {"bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = replace(tiny_base_tokenizer(*tokens, **named), chat_template=GEMMA)
    rows = encoded(chat(("user", "a"), ("assistant", answer), ("user", "b"), ("assistant", answer)), tokenizer)
    assert [tokenizer.decode(row.completion_ids) for row in rows] == [f"{answer.strip()}<end_of_turn>"] * 2
    assert tokenizer.decode(rows[1].prompt_ids).endswith("<start_of_turn>user\nb<end_of_turn>\n<start_of_turn>model\n")


def test_an_answer_rewritten_by_the_template_ends_with_its_turn() -> None:
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'][5:]")
    tokenizer = replace(tiny_base_tokenizer(), chat_template=template)
    (row,) = encoded(chat(("user", "what is it?"), ("assistant", "well, a fox")), tokenizer)
    assert tokenizer.decode(row.completion_ids) == " a fox<|im_end|>"


def test_an_assistant_turn_of_weight_0_is_context_and_not_learned() -> None:
    row = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    row["messages"][1]["weight"] = 0
    row["messages"][3]["weight"] = 1
    (example,) = encoded(row)
    assert texts([example]) == ["d<|im_end|>"]
    assert "b<|im_end|>" in TOKENIZER.decode(example.prompt_ids)


def test_a_turn_of_a_tool_is_context_though_no_request_may_have_one() -> None:
    row = chat(("user", "a"), ("tool", "result"), ("assistant", "b"))
    (example,) = encoded(row)
    assert "result" in TOKENIZER.decode(example.prompt_ids)


def test_an_opening_assistant_greeting_is_not_learned() -> None:
    assert texts(encoded(chat(("assistant", "welcome"), ("user", "a"), ("assistant", "b")))) == ["b<|im_end|>"]


def test_a_plain_completion_keeps_its_spaces_and_ends() -> None:
    (example,) = encoded({"prompt": "2+2=", "completion": " 4"})
    assert TOKENIZER.decode(example.prompt_ids) == "2+2="
    assert texts([example]) == [" 4<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "translate", "input": "dog", "output": "Hund"}, "translate\n\ndog"),
        ({"instruction": "translate dog", "input": "", "output": "Hund"}, "translate dog"),
        ({"instruction": "translate dog", "input": None, "output": "Hund"}, "translate dog"),
        ({"instruction": "translate dog", "output": "Hund"}, "translate dog"),
    ],
)
def test_an_instruction_is_rendered_as_a_user_message(row: dict[str, Any], asked: str) -> None:
    assert encoded(row) == encoded(chat(("user", asked), ("assistant", "Hund")))


def test_without_a_chat_template_an_instruction_uses_alpacas_format_and_a_chat_is_refused() -> None:
    plain = replace(tiny_base_tokenizer(), chat_template=None)
    (example,) = encoded({"instruction": "translate", "input": "dog", "output": "Hund"}, plain)
    prompt = TOKENIZER.decode(example.prompt_ids)
    assert prompt.endswith("### Instruction:\ntranslate\n\n### Input:\ndog\n\n### Response:")
    assert list(example.prompt_ids) == encode_text(plain, prompt)
    (example,) = encoded({"instruction": "translate dog", "output": "Hund"}, plain)
    assert "### Input" not in TOKENIZER.decode(example.prompt_ids)
    with pytest.raises(InvalidRequest, match="no chat template"):
        encoded(chat(("user", "a"), ("assistant", "b")), plain)


@pytest.mark.parametrize("part", ["prompt", "answer"])
def test_a_token_beyond_the_models_vocabulary_is_refused_by_name(part: str) -> None:
    tokenizer = tiny_base_tokenizer()
    tokenizer.backend.add_tokens([AddedToken("<image>", special=False)])
    image = tokenizer.backend.token_to_id("<image>")
    row = {"prompt": "a ", "completion": " b"}
    row["prompt" if part == "prompt" else "completion"] += "<image>"
    assert encoded(row, replace(tokenizer, model_vocab_size=len(tokenizer)))
    encoded({"prompt": "a", "completion": "b"}, replace(tokenizer, model_vocab_size=image))
    with pytest.raises(InvalidRequest, match=f"of the {part} is '<image>', id {image}, but .* ends at {image - 1}"):
        encoded(row, replace(tokenizer, model_vocab_size=image))


def test_a_base_folder_gives_the_size_of_the_models_vocabulary(tiny_llama_folder: Path) -> None:
    config = json.loads((tiny_llama_folder / "config.json").read_text())
    assert load_tokenizer(tiny_llama_folder).model_vocab_size == config["vocab_size"]
