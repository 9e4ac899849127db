"""Encodes examples to token ids, exactly as serving renders the prompt and the model should continue it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reftserve.client.schemas import ChatMessage
from reftserve.server.base.prompts import encode_completion, encode_rendered, encode_text, render_answer, render_chat
from reftserve.server.base.tokenizer import Tokenizer
from reftserve.server.datasets.examples import ChatPrompt, Example, Instruction
from reftserve.server.datasets.source_location import SourceLocation
from reftserve.server.errors import InvalidRequest

# Stanford Alpaca's wording, which a base without a chat template has most likely seen in training.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of a prompt and of its completion with the end of turn. location: the example's row in the file."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    location: SourceLocation | None = None

    @property
    def length(self) -> int:
        """Return the number of tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


def encode(tokenizer: Tokenizer, example: Example) -> EncodedExample:
    """Return an example's token ids.

    Raises InvalidRequest if a chat's template is missing or refuses the messages, or the model lacks a token.
    """
    prompt = _rendered_as(example.prompt, has_template=tokenizer.chat_template is not None)
    if isinstance(prompt, str):
        prompt_ids = encode_text(tokenizer, prompt)
        completion_ids = encode_completion(tokenizer, example.target)
    else:
        answer = ChatMessage(role="assistant", content=example.target)
        prompt_ids = encode_rendered(tokenizer, render_chat(tokenizer, prompt))
        completion_ids = encode_rendered(tokenizer, render_answer(tokenizer, [*prompt, answer]))
    _require_known(tokenizer, prompt_ids, "prompt")
    _require_known(tokenizer, completion_ids, "answer")
    return EncodedExample(tuple(prompt_ids), tuple(completion_ids), example.location)


def _require_known(tokenizer: Tokenizer, token_ids: Sequence[int], part: str) -> None:
    """Check that the model has an embedding for each token; a tokenizer's added tokens may have none."""
    size = tokenizer.model_vocab_size
    if size is None or max(token_ids, default=0) < size:
        return
    index, token = next((index, token) for index, token in enumerate(token_ids) if token >= size)
    raise InvalidRequest(
        f"token {index} of the {part} is {tokenizer.decode([token])!r}, id {token}, but the model's vocabulary ends at "
        f"{size - 1}; remove this text",
        code="unknown_token",
    )


def _rendered_as(prompt: ChatPrompt | str | Instruction, *, has_template: bool) -> list[ChatMessage] | str:
    """Return the messages that the template renders, or a plain text."""
    if isinstance(prompt, ChatPrompt):
        turns = prompt.conversation[: prompt.length]
        # Without validation: the reader has checked the turns, and a data set may have those of tools.
        return [ChatMessage.model_construct(role=turn.role, content=turn.text) for turn in turns]  # type: ignore[arg-type]
    if isinstance(prompt, str):
        return prompt
    if has_template:
        text = f"{prompt.instruction}\n\n{prompt.input}" if prompt.input else prompt.instruction
        return [ChatMessage(role="user", content=text)]
    wording = _WITH_INPUT if prompt.input else _WITHOUT_INPUT
    return wording.format(instruction=prompt.instruction, input=prompt.input)
