"""Our chat-template renderer gives the text of transformers, for the templates of many model families."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from tiny_models import CHAT_TEMPLATE
from transformers.utils.chat_template_utils import render_jinja_template

from reftserve.server.base.chat_template import render_template

FOLDER = Path(__file__).parents[2] / "references" / "chat_templates"
TEMPLATES = {file.stem: file.read_text("utf-8") for file in sorted(FOLDER.glob("*.jinja"))} | {"tiny": CHAT_TEMPLATE}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
Messages = list[dict[str, str]]

CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Why is the sky blue?")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")],
    [("user", "a"), ("assistant", "b")],
    [("user", ""), ("assistant", "")],
    [("system", "")],
    [("user", "  spaces \n\n and\tlines \n"), ("assistant", "\n <b>&amp;'\"</b> {{ 1 }} {% raw %}")],
    [("user", "Grüße, 你好, 🦊, \u200b, \u2028, \x00"), ("assistant", "<think>\nhm\n</think>\n\nyes")],
    [("assistant", "first"), ("user", "second")],
    [("user", "a"), ("user", "b")],
    [("user", "a"), ("system", "late"), ("user", "b")],
    [("tool", "result"), ("skip", "x"), ("ipython", "y"), ("stop", "z"), ("unknown", "w")],
    [],
]


def messages_of(turns: list[tuple[str, str]]) -> Messages:
    return [{"role": role, "content": text} for role, text in turns]


def ours(template: str, messages: Messages, *, prompt: bool, tokens: dict[str, str]) -> str:
    try:
        return render_template(template, messages, add_generation_prompt=prompt, special_tokens=tokens)
    except TemplateError as refused:
        return f"refused by {type(refused).__name__}"


def theirs(template: str, messages: Messages, *, prompt: bool, tokens: dict[str, str]) -> str:
    try:
        [text], _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt, **tokens)
    except TemplateError as refused:
        return f"refused by {type(refused).__name__}"
    return str(text)


@pytest.mark.parametrize("tokens", [TOKENS, {"eos_token": "<|end|>"}], ids=["all tokens", "no bos"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_renders_as_in_transformers(name: str, prompt: bool, tokens: dict[str, str]) -> None:
    for turns in CONVERSATIONS:
        messages = messages_of(turns)
        expected = theirs(TEMPLATES[name], messages, prompt=prompt, tokens=tokens)
        assert ours(TEMPLATES[name], messages, prompt=prompt, tokens=tokens) == expected, turns


roles = st.sampled_from(["system", "user", "assistant", "tool"])


@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    turns=st.lists(st.tuples(roles, st.text(max_size=30)), max_size=6),
    prompt=st.booleans(),
)
def test_any_conversation_renders_as_in_transformers(name: str, turns: list[tuple[str, str]], prompt: bool) -> None:
    messages = messages_of(turns)
    expected = theirs(TEMPLATES[name], messages, prompt=prompt, tokens=TOKENS)
    assert ours(TEMPLATES[name], messages, prompt=prompt, tokens=TOKENS) == expected


@pytest.mark.parametrize("name", ["refused_attribute", "refused_change", "refused_escape", "broken"])
def test_a_template_that_is_invalid_or_leaves_the_sandbox_is_refused(name: str) -> None:
    messages = messages_of([("user", "a")])
    with pytest.raises(TemplateError):
        render_template(TEMPLATES[name], messages, add_generation_prompt=True, special_tokens=TOKENS)


def test_the_templates_of_the_families_are_rendered_not_refused() -> None:
    found = {
        name: ours(TEMPLATES[name], messages_of(CONVERSATIONS[1]), prompt=True, tokens=TOKENS) for name in TEMPLATES
    }
    refused = [name for name, text in found.items() if text.startswith("refused by")]
    assert refused == ["broken", "refused_attribute", "refused_change", "refused_escape"]
    assert "Be brief." in found["llama3"]
