"""How many threads training computes with: as many as it has cores for, while the engine answers or rests.

An operation on several threads ends when the last of them has ended. Beside a busy engine each thread waits for its
own turn on its own core, a few milliseconds in thirty at the default niceness, and a step has hundreds of operations:
on all threads it took eighty times as long as alone. On one thread training gets what its niceness weighs.

However many there are, a step computes the same to the bit (`sum_in_one_order`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

WINDOW_S = 0.1
BUSY, FREE = 0.7, 0.9  # of the time that passes, the share in which the thread computes
PATIENCE = 10  # windows like the last that failed, until more threads are tried again


def sum_in_one_order() -> None:
    """Let MKL's products be the same to the bit on any number of threads; to be called before its first one.

    Strict reproducibility, as its developer guide has it; costs nothing measurable. A user's own setting stands.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


class Threads:
    """Halves the threads when the calling thread waits for cores or for the others, doubles them when it does not.

    most: as many as there ever are. clock, computed: seconds that have passed, and in which the calling thread ran.
    """

    def __init__(
        self,
        most: int,
        *,
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.perf_counter,
        computed: Callable[[], float] = time.thread_time,
    ) -> None:
        self.count = self._most = most
        self._use, self._clock, self._computed = use, clock, computed
        self._passed_s = self._computed_s = 0.0
        self._began = (0.0, 0.0)
        self._patient_until = 0.0
        use(most)

    def watch(self, layers: Iterable[nn.Module]) -> None:
        """Measure each forward pass of these layers; what happens between them, reading and writing, is no matter."""
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: self.begin())
            layer.register_forward_hook(self._end_of_layer)

    def begin(self) -> None:
        """Computing begins."""
        self._began = self._clock(), self._computed()

    def end(self) -> None:
        """Computing ends; from now on there may be more threads, or fewer."""
        now = self._clock()
        self._passed_s += now - self._began[0]
        self._computed_s += self._computed() - self._began[1]
        if self._passed_s < WINDOW_S:
            return
        share = self._computed_s / self._passed_s
        if share < BUSY and self.count > 1:
            self._patient_until = now + PATIENCE * self._passed_s
            self._change(self.count // 2)
        elif share > FREE and self.count < self._most and now >= self._patient_until:
            self._change(min(2 * self.count, self._most))
        self._passed_s = self._computed_s = 0.0

    def _change(self, count: int) -> None:
        self.count = count
        self._use(count)

    def _end_of_layer(self, *_: Any) -> None:
        self.end()
