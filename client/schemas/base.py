"""Base classes of all wire types. Requests refuse unknown fields, so that a misspelt field is not ignored. Responses
ignore them, so that an older client can read a newer server.
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
Identifier = Annotated[str, Field(max_length=256), Printable]  # a name or an id; databases store no NUL in text


class Request(BaseModel):
    """Base of all requests.

    Null means "not given": the field has its default, or is missing if it is required. Clients send back empty fields
    of OpenAI's answers (`refusal`, `tools`), so an unknown field may be null, `[]` or `{}`. A string with half a
    surrogate pair is an error, because no database or answer can hold it.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_not_given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = _known_fields(cls)
        return {name: value for name, value in data.items() if not _is_not_given(value, is_known=name in known)}

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_half_pairs(cls, value: Any) -> Any:
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


def _is_not_given(value: Any, *, is_known: bool) -> bool:
    return value is None or (not is_known and isinstance(value, (list, dict)) and not value)


class Response(BaseModel):
    """Base of all responses."""

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
    """Response to DELETE."""

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
    """Body of every response with status 400 or above."""

    error: ErrorDetail
