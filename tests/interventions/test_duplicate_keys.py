"""The duplicate among many keys of a JSON object is found without comparing each key with each."""

from __future__ import annotations

import pytest

from reftserve.interventions import strict_json
from reftserve.server.datasets import json_rows

KEYS = 1000


class Key(str):
    compared = 0

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        Key.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("unique", [json_rows._unique, strict_json._unique], ids=["data set", "manifest"])
def test_the_last_of_many_keys_that_stands_twice_is_found_in_linear_time(unique) -> None:  # type: ignore[no-untyped-def]
    pairs = [(Key(f"key {number}"), 0) for number in range(KEYS)]
    Key.compared = 0
    with pytest.raises(Exception, match=f"key {KEYS - 1}"):
        unique([*pairs, (Key(f"key {KEYS - 1}"), 0)])
    assert Key.compared < 10 * KEYS
