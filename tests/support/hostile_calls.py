"""Calls of the API that its description suggests and that mean harm: wrong types, sizes, characters and shapes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

HALF = "\ud800"
TEXTS = [
    "",
    " ",
    "a",
    "\0",
    HALF,
    "a\n\r\tb",
    "ü😀",
    "'\"; DROP TABLE jobs; --",
    "../../../etc/passwd",
    "name@",
    "@",
    "@1",
    "a@b@c",
    "a@" + "9" * 5000,
    "<|im_end|>",
    "{{ 7 * 7 }}",
    "x" * 257,
    "x" * 70_000,
    "auto",
    "latest",
    "true",
    "NaN",
    "1e999",
]
NUMBERS = [0, 1, 2, -1, 5, 0.5, -0.0, 1e-320, 1e308, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]
DEEP: Any = []
for _ in range(70):
    DEEP = [DEEP]
SHAPES: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [None],
    [[]],
    [{}],
    {"a": 1},
    {HALF: HALF},
    {"": None},
    {"type": "text"},
    {"type": "nothing"},
    [1, "a", None],
    [0] * 3000,
    [{}] * 3000,
    ["a"] * 300,
    {str(number): number for number in range(2000)},
    DEEP,
]
VALUES: list[Any] = [*TEXTS, *NUMBERS, *SHAPES]
BROKEN_JSON = [b"", b"{", b"[]", b"null", b"\xff", b'{"a": NaN}', b'{"model": 1, "model": 2}', b"[" * 50_000]


@dataclass(frozen=True)
class Operation:
    """An operation of the API. body: a valid JSON body, or None. schema: the fields that it may have."""

    method: str
    path: str
    parameters: list[dict[str, Any]]
    statuses: frozenset[int]
    body: dict[str, Any] | None = None
    fields: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HostileCall:
    """A request. content: its body, or None; path has its parameters filled in."""

    operation: Operation
    path: str
    query: dict[str, str]
    content: bytes | None

    def __repr__(self) -> str:
        shown = self.content if self.content is None or len(self.content) < 500 else self.content[:500] + b"..."
        return f"{self.operation.method} {self.path[:200]} {self.query} {shown!r}"


def operations(api: dict[str, Any], bodies: Mapping[tuple[str, str], dict[str, Any]]) -> list[Operation]:
    """Return all operations of an OpenAPI description. bodies: a valid one for each operation that takes JSON."""
    found = []
    for path, methods in api["paths"].items():
        for method, described in methods.items():
            content = described.get("requestBody", {}).get("content", {})
            body, fields = None, []
            if "application/json" in content:
                schema = api["components"]["schemas"][content["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]]
                body, fields = bodies[method, path], sorted(schema["properties"])
            statuses = frozenset(int(status) for status in described["responses"])
            found.append(Operation(method, path, described.get("parameters", []), statuses, body, fields))
    return found


@st.composite
def hostile_calls(draw: st.DrawFn, known: list[Operation], ids: list[str]) -> HostileCall:
    """Draw a call. ids: values of path parameters that exist."""
    operation = draw(st.sampled_from(known))
    path, query = operation.path, {}
    for parameter in operation.parameters:
        text = draw(st.one_of(st.sampled_from(ids), st.sampled_from(TEXTS), st.text(max_size=20)))
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", text)
        elif parameter["in"] == "query" and draw(st.booleans()):
            query[parameter["name"]] = draw(st.one_of(st.just(text), st.sampled_from(NUMBERS).map(str)))
    content = None
    if operation.body is not None:
        content = draw(st.one_of(bodies(operation), bodies(operation), bodies(operation), st.sampled_from(BROKEN_JSON)))
    return HostileCall(operation, path, query, content)


@st.composite
def bodies(draw: st.DrawFn, operation: Operation) -> bytes:
    """Draw a valid body with up to three wrong values anywhere in it."""
    body = copy.deepcopy(operation.body)
    assert body is not None
    for _ in range(draw(st.integers(0, 3))):
        value = draw(st.one_of(st.sampled_from(VALUES), json_values()))
        if draw(st.booleans()):
            body[draw(st.sampled_from([*operation.fields, "unknown"]))] = value
        else:
            holder, key = draw(st.sampled_from(list(places(body))))
            holder[key] = value
    return json.dumps(body).encode()


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield all places of a JSON value as containers with keys; of a long list the first ones."""
    if isinstance(value, dict):
        for key, item in list(value.items()):
            yield value, key
            yield from places(item)
    elif isinstance(value, list):
        for index, item in enumerate(value[:5]):
            yield value, index
            yield from places(item)
