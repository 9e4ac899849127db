"""Strings, numbers and lists of requests, each as one type with its limits.

Lists stop at the first wrong item, so a body of wrong items costs no more than its first. JSON's `true` is no number.
Databases store no NUL in text. `Request` refuses half surrogate pairs in all of them.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, Strict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 256  # prompts of a completion, inputs or conversations of a classification
MAX_MESSAGES = 2048  # of a conversation
MAX_PARTS = 256  # of a message
MAX_TOKEN_BIAS = 1024
MAX_LAYERS = 1024

T = TypeVar("T")


def at_most(items: int, *, at_least: int = 0) -> FieldInfo:
    """Return a list's constraint."""
    found: FieldInfo = Field(min_length=at_least or None, max_length=items, fail_fast=True)
    return found


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul_character", "the character NUL cannot be part of a name")
    return text


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "expected a number, found {value}", {"value": str(value).lower()})
    return value


def _few_entries(value: Any) -> Any:
    # pydantic looks at every entry of a mapping before it counts them.
    if isinstance(value, dict) and len(value) > MAX_TOKEN_BIAS:
        raise PydanticCustomError(
            "too_many_entries",
            "{count} entries; at most {most} are allowed",
            {"count": len(value), "most": MAX_TOKEN_BIAS},
        )
    return value


Printable = AfterValidator(_without_nul)
Number = BeforeValidator(_no_boolean)

Identifier = Annotated[str, Field(min_length=1, max_length=256), Printable]  # a name or an id
Title = Annotated[str, Field(min_length=1, max_length=64), Printable]
Tag = Annotated[str, Field(max_length=1024)]  # a text that no answer depends on
Salt = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(max_length=4 << 20)]
Grammar = Annotated[str, Field(max_length=64 << 10)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]

Count = Annotated[int, Field(ge=1, lt=2**31), Number]
Size = Annotated[int, Field(ge=0, lt=2**31), Number]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), Number]
Priority = Annotated[int, Field(ge=-100, le=100), Number]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400.0, allow_inf_nan=False), Number]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), Number]
# No range: the service compares them with the vocabulary, and a range would double the time of a long list.
TokenIds = Annotated[list[Annotated[int, Strict()]], at_most(1 << 18)]

Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False), Number]
LogitBias = Annotated[dict[int, Bias], Field(max_length=MAX_TOKEN_BIAS), BeforeValidator(_few_entries)]
Metadata = Annotated[  # OpenAI's limits
    dict[Annotated[str, Field(max_length=64), Printable], Annotated[str, Field(max_length=512), Printable]],
    Field(max_length=16),
    BeforeValidator(_few_entries),
]
FreeMetadata = Annotated[dict[str, Any], Field(max_length=64)]
