"""Base classes of all wire types. Requests refuse unknown fields, so that a misspelt field is not ignored. Responses
ignore them, so that an older client can read a newer server.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from pydantic_core import PydanticCustomError

from reftserve.client.schemas.unicode import half_pair

MAX_FIELDS = 256  # of one object, known ones or not


class Request(BaseModel):
    """Base of all requests.

    An optional field with null, `[]` or `{}` is not given, because many clients send all fields with every request. So
    is an unknown field with such a value, or with one in `neutral`, which says what the server does anyway. A string
    with half a surrogate pair is an error, because no database or answer can hold it.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    meaningful_when_empty: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_not_given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise PydanticCustomError(
                "too_many_fields",
                "{count} fields; at most {most} are allowed",
                {"count": len(data), "most": MAX_FIELDS},
            )
        return {name: value for name, value in data.items() if not cls._is_not_given(name, value)}

    @classmethod
    def _is_not_given(cls, name: str, value: Any) -> bool:
        if value is None:
            return True
        if isinstance(value, (list, dict)) and not value:
            return name not in _required_fields(cls) and name not in cls.meaningful_when_empty
        return any(type(value) is type(each) and value == each for each in cls.neutral.get(name, ()))

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
def _required_fields(kind: type[BaseModel]) -> frozenset[str]:
    fields = kind.model_fields.items()
    return frozenset(field.alias or name for name, field in fields if field.is_required())


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
