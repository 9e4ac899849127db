"""/openapi.json says what the server answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

ERROR = {"schema": {"$ref": "#/components/schemas/ErrorBody"}}


@pytest.fixture
def api(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def test_every_operation_has_the_errors_that_exist_in_openais_shape(api: dict[str, Any]) -> None:
    for path, operations in api["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            for status in ("400", "404", "408", "409", "413", "415", "421", "429", "503", "504", "507"):
                if (path, status) != ("/ready", "503"):
                    assert responses[status]["content"]["application/json"] == ERROR, (path, status)
            assert "422" not in responses, path
    assert not {"HTTPValidationError", "ValidationError"} & api["components"]["schemas"].keys()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("post", "/v1/chat/completions"),
        ("post", "/v1/completions"),
        ("get", "/v1/fine_tuning/jobs/{job_id}/events"),
    ],
)
def test_streams_are_described(api: dict[str, Any], method: str, path: str) -> None:
    assert api["paths"][path][method]["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}


def test_every_field_of_a_request_has_a_limit(api: dict[str, Any]) -> None:
    checked = 0

    def check(form: dict[str, Any], where: str) -> None:
        nonlocal checked
        for each in form.get("anyOf", []) + form.get("oneOf", []):
            check(each, where)
        kind = form.get("type")
        if kind == "string" and not form.keys() & {"const", "enum"}:
            assert "maxLength" in form, where
        elif kind == "array":
            assert "maxItems" in form, where
            check(form["items"], where)
        elif kind in ("integer", "number") and where not in UNLIMITED:
            assert form.keys() & {"maximum", "exclusiveMaximum"}, where
        checked += 1

    for name, schema in api["components"]["schemas"].items():
        if schema.get("additionalProperties") is False:  # as of requests alone
            for field, form in schema["properties"].items():
                check(form, f"{name}.{field}")
    assert checked > 100


# Token ids are compared with the vocabulary, and a range's ends with the field's own limits.
UNLIMITED = {"CompletionRequest.prompt", "Range.low", "Range.high"}
