"""Server-sent events of a streamed answer, read into pieces of text."""

from __future__ import annotations

from typing import Annotated

import httpx
from pydantic import Field, TypeAdapter

from reftserve.client.exceptions import StreamFailed
from reftserve.client.schemas import ChatCompletionChunk, Completion, CompletionChoice, ErrorBody, FinishReason, Usage

END = "[DONE]"
_CHUNK: TypeAdapter[ChatCompletionChunk | Completion] = TypeAdapter(
    Annotated[ChatCompletionChunk | Completion, Field(discriminator="object")]
)


def raise_if_error(data: str) -> None:
    """Raise StreamFailed when an event's data is the server's error object."""
    if data.startswith('{"error"'):
        raise StreamFailed(ErrorBody.model_validate_json(data).error)


class StreamedText:
    """The part of a streamed answer that has arrived. finish_reason, usage: known once it is complete."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.usage: Usage | None = None

    def take(self, data: str) -> str:
        """Return the text in one event's data, which may be empty. Raises StreamFailed when the event is an error."""
        raise_if_error(data)
        chunk = _CHUNK.validate_json(data)
        piece = ""
        for choice in chunk.choices:
            piece += choice.text if isinstance(choice, CompletionChoice) else choice.delta.content or ""
            self.finish_reason = choice.finish_reason or self.finish_reason
        self.usage = chunk.usage or self.usage
        self.text += piece
        return piece
