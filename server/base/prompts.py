"""Renders chats and texts to token ids, the same way for serving and training.

chat messages, answers, labels    special tokens that they spell are characters (by a setting: control tokens)
plain prompts                     control tokens, as clients of `/v1/completions` expect
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError

from reftserve.client.schemas import ChatMessage
from reftserve.server.base.tokenizer import Tokenizer
from reftserve.server.errors import InvalidRequest

MARK = "7e1f0c5a"  # placeholder for an answer; no template interprets it


def render_chat(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> str:
    """Return the next assistant turn's prompt. Raises InvalidRequest if the template is missing or refuses it."""
    return _apply_template(tokenizer, messages, add_generation_prompt=True)


def render_answer(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> str:
    """Return the text that the model should generate for the last message, an assistant's, with the end of turn."""
    prompt = render_chat(tokenizer, messages[:-1])
    whole = _apply_template(tokenizer, messages, add_generation_prompt=False)
    behind = _behind_an_answer(tokenizer, messages[:-1])
    # Some templates rewrite earlier turns when a later one follows; then the answer is the content itself.
    answer = whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.escape(messages[-1].text) + behind
    # The turn ends with the first special token after the content, which may differ from the tokenizer's eos. Gemma's
    # template adds a line break after it, but serving stops before.
    start = len(answer) - len(behind) if behind and answer.endswith(behind) else 0
    ends = [answer.find(token, start) + len(token) for token in tokenizer.special_texts if token in answer[start:]]
    return answer[: min(ends)] if ends else answer + (tokenizer.eos_token or "")


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a rendered text, which already contains its special tokens; those in contents are text.

    Raises InvalidRequest if the vocabulary cannot encode such a content.
    """
    return tokenizer.encode_escaped(text)


def encode_completion(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a plain completion's token ids, with the end of turn. Raises InvalidRequest if the tokenizer has none.

    Special tokens in the completion are text: it is an answer.
    """
    ids = tokenizer.encode_escaped(tokenizer.escape(text))
    if tokenizer.eos_token_id is None:
        raise InvalidRequest("the base's tokenizer names no eos_token, so an answer could not end")
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a plain prompt, in which special tokens are control tokens.

    BOS comes first if the tokenizer adds one; a prompt that begins with it, as rendered ones do, gets no second one.
    """
    bos = tokenizer.added_bos
    return tokenizer.encode(text)[1:] if bos is not None and text.startswith(bos) else tokenizer.encode(text)


def _apply_template(tokenizer: Tokenizer, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise InvalidRequest(
            "the base model has no chat template; use /v1/completions, or prompt and completion in data sets",
            param="messages",
            code="no_chat_template",
        )
    plain = [{"role": _role(m.role), "content": tokenizer.escape(m.text)} for m in messages]
    try:
        return tokenizer.render(plain, add_generation_prompt=add_generation_prompt)
    except TemplateError as cause:
        raise InvalidRequest(f"the chat template refuses these messages: {cause}", param="messages") from cause


def _behind_an_answer(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> str:
    """Return the template's constant text after an assistant's answer; empty if the template rewrites answers."""
    answered = [*messages, ChatMessage(role="assistant", content=MARK)]
    _, mark, behind = _apply_template(tokenizer, answered, add_generation_prompt=False).rpartition(MARK)
    return behind if mark else ""


def _role(role: str) -> str:
    # OpenAI renamed `system` to `developer`; templates know the old name.
    return "system" if role == "developer" else role
