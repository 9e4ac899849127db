"""I1 on the real model: `benchmarks/exactness.py` with fewer requests."""

from __future__ import annotations

from pathlib import Path

import pytest
from exactness import compare

pytestmark = pytest.mark.real_model


def test_requests_in_a_mixture_equal_attach_on_each_alone(smollm2_folder: Path, tmp_path: Path) -> None:
    found = compare(smollm2_folder, tmp_path, requests=24)
    assert found.unequal == []
    assert found.tokens > 150
    assert found.preemptions > 0
    assert found.cached_tokens > 0
    assert found.cancelled > 0
