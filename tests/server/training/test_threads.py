"""Training takes fewer threads while cores are busy, and all of them again when they are free."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reftserve.server.training.threads import PATIENCE, WINDOW_S, Threads

# A separate process, because MKL decides once. An edit's products have few rows, so threads would split the sums.
CHILD = """
import torch
from reftserve.server.training.threads import set_mkl_deterministic
set_mkl_deterministic()
generator = torch.Generator().manual_seed(0)
hidden, weight = (torch.randn(size, generator=generator) for size in ((10, 576), (4, 576)))
found = []
for threads in (1, 2, 3, 4):
    torch.set_num_threads(threads)
    below = hidden @ weight.T
    found.append([below, below @ weight, below.T @ hidden])
assert all(torch.equal(one, first) for each in found for one, first in zip(each, found[0], strict=True))
"""


class Machine:
    """Cores of which `busy` run other work: a computation that needs one of these runs a tenth of the time."""

    def __init__(self, cores: int, busy: int = 0) -> None:
        self.cores, self.busy = cores, busy
        self.passed_s = self.ran_s = 0.0
        self.used: list[int] = []
        self.threads = Threads(cores, use=self.used.append, clock=lambda: self.passed_s, running=lambda: self.ran_s)

    def compute(self, seconds: float = WINDOW_S) -> None:
        self.threads.begin()
        self.passed_s += seconds
        self.ran_s += seconds if self.threads.count <= self.cores - self.busy else seconds / 10
        self.threads.tick()

    def rest(self, seconds: float) -> None:
        self.passed_s += seconds


def test_an_idle_machine_gives_all_its_cores() -> None:
    machine = Machine(8)
    for _ in range(20):
        machine.compute()
    assert machine.used == [8]


def test_one_thread_is_left_while_an_engine_uses_all_cores() -> None:
    machine = Machine(8, busy=8)
    for _ in range(20):
        machine.compute()
    assert machine.used == [8, 4, 2, 1]


def test_gaps_between_computations_are_not_mistaken_for_a_busy_machine() -> None:
    machine = Machine(2)
    for _ in range(20):
        machine.compute(WINDOW_S / 4)
        machine.rest(1.0)
    assert machine.used == [2]


def test_all_threads_return_soon_after_the_machine_is_idle() -> None:
    machine = Machine(6, busy=6)
    for _ in range(3):
        machine.compute()
    machine.busy = 0
    freed_at = machine.passed_s
    while machine.threads.count < 6:
        machine.compute()
    assert machine.passed_s - freed_at < (PATIENCE + 3) * WINDOW_S
    assert machine.used == [6, 3, 1, 2, 4, 6]


@given(cores=st.integers(2, 64), data=st.data())
def test_probing_for_free_cores_costs_little(cores: int, data: st.DataObject) -> None:
    """If some cores stay free, most of the time goes to computations that fit on them."""
    machine = Machine(cores, busy=data.draw(st.integers(0, cores - 1)))
    in_vain_s = 0.0
    for _ in range(1000):
        fits = machine.threads.count <= machine.cores - machine.busy
        before = machine.passed_s
        machine.compute()
        in_vain_s += 0.0 if fits else machine.passed_s - before
    assert in_vain_s <= machine.passed_s / PATIENCE + 7 * WINDOW_S
    assert all(1 <= count <= cores for count in machine.used)


@pytest.mark.parametrize("waits", ["first layer", "last layer", "head", "first layer's gradient", "head's gradient"])
def test_forward_and_backward_of_a_pass_are_watched(waits: str) -> None:
    passed_s = 0.0
    used: list[int] = []

    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
            nonlocal passed_s
            ctx.name = name
            passed_s += WINDOW_S if waits == name else 0.0
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
            nonlocal passed_s
            passed_s += WINDOW_S if waits == f"{ctx.name}'s gradient" else 0.0
            return gradients[0], None

    class Part(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Waiting.apply(x, self.name)

    layers = [Part("first layer"), Part("last layer")]
    model = nn.Sequential(*layers, Part("head"))
    Threads(2, use=used.append, clock=lambda: passed_s, running=lambda: 0.0).watch(model, layers)
    passed_s += 10 * WINDOW_S  # any time may pass before a pass
    model(torch.zeros(1, requires_grad=True)).backward()
    assert used == [2, 1]


def test_products_are_bitwise_equal_on_any_number_of_threads() -> None:
    subprocess.run([sys.executable, "-c", CHILD], check=True, timeout=120)
