"""Fixtures for every folder whose tests compute with the base: one thread, and the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from reftserve.server.base.cpu_kernels import load_kernels


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: tiny products gain nothing from a second, and on a busy machine they wait long for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels() -> None:
    load_kernels()
