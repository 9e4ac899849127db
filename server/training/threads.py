"""The number of threads that training computes with: all of them, until another process needs the cores.

An operation lasts as long as its slowest thread, and each low-priority thread waits about 30 ms for its core while the
engine is busy: on all threads, a step of hundreds of operations took 80 times as long as on an idle machine. One thread
gets the share of a core that its niceness grants.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WINDOW_S = 0.1
BUSY, FREE = 0.6, 0.8  # the calling thread's CPU time per wall time: fewer threads below BUSY, more above FREE
PATIENCE = 10  # after a decrease, wait this many times the length of its window before an increase


def set_mkl_deterministic() -> None:
    """Make MKL's products bitwise equal on any number of threads, at no measurable cost. Call before the first one."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


class Threads:
    """Halves the threads while the calling thread waits for a core or for other threads, and doubles them otherwise."""

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
        """Measure a model's forward and backward passes, but not the I/O between them."""
        model.register_forward_pre_hook(lambda *_: self.begin())
        model.register_forward_hook(lambda *_: self.tick())
        for layer in layers:
            layer.register_forward_pre_hook(self._before_layer)

    def begin(self) -> None:
        """Start measuring."""
        self._mark = self._clock(), self._running()

    def tick(self) -> None:
        """Count the time since `begin` or the last `tick` as computing, and adapt the threads once per window."""
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
            inputs[0].register_hook(self._after_layer_backward)  # type: ignore[no-untyped-call]

    def _after_layer_backward(self, gradient: Tensor) -> None:
        self.tick()

    def _change(self, count: int) -> None:
        self.count = count
        self._use(count)
