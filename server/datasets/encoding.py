"""From examples to token ids, exactly as serving renders the prompt and the model should go on."""

from __future__ import annotations

from dataclasses import dataclass

from reftserve.client.schemas import ChatMessage
from reftserve.server.base.prompts import encode_completion, encode_rendered, encode_text, render_answer, render_chat
from reftserve.server.base.tokenizer import Tokenizer
from reftserve.server.datasets.examples import Example, Instruction
from reftserve.server.datasets.source_location import SourceLocation

# Stanford Alpaca's own wording: what a base without a chat template has most likely seen.
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
    """Token ids of a prompt and of what should follow it, end of turn included. location: its row."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    location: SourceLocation | None = None

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prompt_ids) + len(self.completion_ids)


def encode(tokenizer: Tokenizer, example: Example) -> EncodedExample:
    """Token ids exactly as serving would render the prompt and produce the answer.

    Raises InvalidRequest when the base has no chat template for a chat, or it refuses the messages.
    """
    prompt = example.prompt
    if isinstance(prompt, Instruction):
        prompt = _instruction_prompt(prompt, has_template=tokenizer.chat_template is not None)
    if isinstance(prompt, str):
        prompt_ids = encode_text(tokenizer, prompt)
        completion_ids = encode_completion(tokenizer, example.target)
    else:
        answer = ChatMessage(role="assistant", content=example.target)
        prompt_ids = encode_rendered(tokenizer, render_chat(tokenizer, prompt))
        completion_ids = encode_rendered(tokenizer, render_answer(tokenizer, [*prompt, answer]))
    return EncodedExample(tuple(prompt_ids), tuple(completion_ids), example.location)


def _instruction_prompt(asked: Instruction, *, has_template: bool) -> tuple[ChatMessage, ...] | str:
    """A user's message, the input a paragraph below the instruction; a base without a template gets Alpaca's text."""
    if has_template:
        text = f"{asked.instruction}\n\n{asked.input}" if asked.input else asked.instruction
        return (ChatMessage(role="user", content=text),)
    wording = _WITH_INPUT if asked.input else _WITHOUT_INPUT
    return wording.format(instruction=asked.instruction, input=asked.input)
