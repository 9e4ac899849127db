"""Turns a request's response format into a grammar in llguidance's notation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher

from reftserve.client.schemas import GenerationFields, JsonObjectFormat, JsonSchemaFormat, StructuredOutputs
from reftserve.server.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_GRAMMAR_CHARACTERS = 64 << 10
# The style of Python and of most training texts. With free whitespace, small models write spaces for ever.
JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_of(request: GenerationFields) -> str:
    """Return the answer's grammar; "" allows any. Raises InvalidRequest if it is wrong, too large or given twice."""
    form, wanted = request.response_format, request.structured_outputs
    if wanted is not None and isinstance(form, (JsonObjectFormat, JsonSchemaFormat)):
        raise InvalidRequest("give response_format or structured_outputs, not both", param="structured_outputs")
    if isinstance(form, JsonObjectFormat):
        return _from_schema({"type": "object"}, "response_format")
    if isinstance(form, JsonSchemaFormat):
        return _from_schema(form.json_schema.json_schema, "response_format.json_schema.schema")
    return _from_structured_outputs(wanted) if wanted is not None else ""


def _from_structured_outputs(wanted: StructuredOutputs) -> str:
    given = wanted.model_dump(by_alias=True, exclude_none=True)
    if not given:
        return ""
    if len(given) != 1:
        names = ", ".join(field.alias or name for name, field in StructuredOutputs.model_fields.items())
        raise InvalidRequest(f"give exactly one of {names}; found {len(given)}", param="structured_outputs")
    [(kind, value)] = given.items()
    param = f"structured_outputs.{kind}"
    if kind == "json":
        return _from_schema(value, param)
    if kind == "regex":
        return _checked(LLMatcher.grammar_from_regex(value), param)
    if kind == "choice":
        value = "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
    return _checked(LLMatcher.grammar_from_lark(value), param)


def _from_schema(schema: dict[str, Any] | str, param: str) -> str:
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, defaults=JSON_STYLE)
    except ValueError as cause:
        raise InvalidRequest(f"{param} is not a JSON schema: {cause}", param=param, code="invalid_schema") from cause
    return _checked(grammar, param)


def _checked(grammar: str, param: str) -> str:
    if len(grammar) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidRequest(
            f"{param} has {len(grammar)} characters; at most {MAX_GRAMMAR_CHARACTERS} are allowed", param=param
        )
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise InvalidRequest(f"{param}: {messages[0].strip()}", param=param, code="invalid_grammar")
    return grammar
