"""How many threads training computes with: all that it may have, as long as nobody else wants their cores.

An operation on several threads ends when the last of them has ended. Beside a busy engine each thread waits for its own
turn on its own core, some thirty milliseconds at a low priority, and a step has hundreds of operations: on all threads
it took eighty times as long as alone. On one thread training gets what its niceness weighs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WINDOW_S = 0.1
BUSY, FREE = 0.6, 0.8  # of the time that passes, the share in which the calling thread runs
PATIENCE = 10  # windows like the last that failed, until more threads are tried again


def set_mkl_deterministic() -> None:
    """Let MKL's products be the same to the bit on any number of threads; to be called before its first one.

    Its strict reproducibility, which costs nothing measurable here. A user's own setting stands.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


class Threads:
    """Halves the threads when the calling thread waits, for a core or for the others; doubles them when it does not.

    most: as many as there ever are. clock, running: seconds that have passed, and in which the calling thread ran.
    """

    def __init__(
        self,
        most: int,
        *,
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.perf_counter,
        running: Callable[[], float] = time.thread_time,
    ) -> None:
        self.count = self._most = most
        self._use, self._clock, self._running = use, clock, running
        self._passed_s = self._ran_s = 0.0
        self._mark = clock(), running()
        self._patient_until = 0.0
        use(most)

    def watch(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Measure a model's passes, there and back; what lies between them, reading and writing, is no matter."""
        model.register_forward_pre_hook(lambda *_: self.begin())
        model.register_forward_hook(lambda *_: self.tick())
        for layer in layers:
            layer.register_forward_pre_hook(self._before_layer)

    def begin(self) -> None:
        """Computing begins."""
        self._mark = self._clock(), self._running()

    def tick(self) -> None:
        """There was only computing since `begin` or the last `tick`; now there may be more threads, or fewer."""
        then, (now, ran) = self._mark, (self._clock(), self._running())
        self._mark = now, ran
        self._passed_s += now - then[0]
        self._ran_s += ran - then[1]
        if self._passed_s < WINDOW_S:
            return
        share = self._ran_s / self._passed_s
        if share < BUSY and self.count > 1:
            self._patient_until = now + PATIENCE * self._passed_s
            self._change(self.count // 2)
        elif share > FREE and self.count < self._most and now >= self._patient_until:
            self._change(min(2 * self.count, self._most))
        self._passed_s = self._ran_s = 0.0

    def _before_layer(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.tick()
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
            inputs[0].register_hook(self._behind_layer)  # type: ignore[no-untyped-call]

    def _behind_layer(self, gradient: Tensor) -> None:
        self.tick()

    def _change(self, count: int) -> None:
        self.count = count
        self._use(count)
