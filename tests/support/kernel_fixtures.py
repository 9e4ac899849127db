"""Fixtures of every folder whose tests compute with the base: one thread, and the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from reftserve.server.base.cpu_kernels import load_kernels


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second thread, and wait for it for ever where the machine has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels() -> None:
    """The CPU's kernels are there; for tests that call them without an engine."""
    load_kernels()
