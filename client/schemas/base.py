"""What all wire types build on.

Requests forbid unknown fields, so that a typing error is an answer and not silence; responses ignore what they do not
know, so that an older client reads a newer server.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from reftserve.client.schemas.unicode import half_pair


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul_character", "the character NUL cannot be part of a name")
    return text


Printable = AfterValidator(_without_nul)
Identifier = Annotated[str, Field(max_length=256), Printable]  # a name or an id; databases hold no NUL in a text


class Request(BaseModel):
    """Base of everything a client sends.

    Null means "not given": the field has its default, and a required field is missing. Clients send back fields of
    OpenAI's answers that are null or empty (`refusal`, `annotations`, `tools`), so an unknown field is ignored when it
    is null, `[]` or `{}`; any other unknown field is an error by its name. A string that holds half a surrogate pair is
    an error by its field: nothing could store it or answer with it.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _only_given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = _known_fields(cls)
        return {name: value for name, value in data.items() if not _says_nothing(value, is_known=name in known)}

    @field_validator("*", mode="after")
    @classmethod
    def _is_whole(cls, value: Any) -> Any:
        broken = half_pair(value)
        if broken is not None:
            raise PydanticCustomError(
                "half_surrogate_pair",
                "half a surrogate pair is no character: {text}",
                {"text": ascii(broken[:100])},
            )
        return value


@functools.cache
def _known_fields(kind: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


def _says_nothing(value: Any, *, is_known: bool) -> bool:
    return value is None or (not is_known and isinstance(value, (list, dict)) and not value)


class Response(BaseModel):
    """Base of everything the server answers."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


T = TypeVar("T")


class Page(Response, Generic[T]):
    """OpenAI's list envelope."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class Deleted(Response):
    """Answer of DELETE."""

    id: str
    object: str
    deleted: Literal[True] = True


class ErrorDetail(Response):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Response):
    """Body of every answer with a status of 400 or above."""

    error: ErrorDetail
