"""Chooses between the CPU kernels and torch's operations: both are timed once, and ours runs unless it takes more than
1.25 of torch's time. No kernel is faster on every processor: without AVX-512, torch's products were 25 times as fast.

The engine, the worker and later starts must choose alike, because the layout of the shared weights (`weights.py`) and
the bits of a resumed job depend on it. So `kernels-<hash>.json`, next to the weights, stores the ratios as
{"linear 576x1536": 0.61}. The hash covers kernels and processor, not the number of threads, which may differ.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import msgspec
import torch
from filelock import FileLock

from reftserve.server.base.cpu_kernels import NATIVE, identity, load_kernels
from reftserve.server.base.model_errors import KernelsUnavailable

logger = logging.getLogger(__name__)
ROWS = (1, 32)  # a step of one request, and a step of many
# Above 1, because our rows are the same to the bit in any batch. Equal speeds measure up to half as far apart.
MOST_RATIO = 1.25
ROUNDS = 50
TRIAL_S = 0.0025  # a trial's time limit; it runs at least one round

Run = Callable[[], object]
Clock = Callable[[], float]


class Trial(NamedTuple):
    """The same work in two forms: by our kernel, and by torch's operations."""

    kernel: Run
    torch: Run


Trials = Callable[[], Sequence[Trial]]
Measure = Callable[[str, Sequence[Trial]], float]


class KernelChoice(Protocol):
    """Decides whether a kernel replaces torch's operations. missing: why no kernels are available, or empty."""

    missing: str

    def load(self) -> bool:
        """Make `torch.ops.reftserve` available and return True; return False if torch computes everything."""
        ...

    def takes(self, kernel: str, shape: str, trials: Trials) -> bool:
        """Whether the kernel runs at this shape. trials: both forms at each row count in `ROWS`."""
        ...

    def describe(self) -> str:
        """Return one line for the log: which kernels run, what torch computes, and the instruction set."""
        ...


class AllKernels:
    """Runs every kernel regardless of its speed. march: GCC's name of the processor to compile for."""

    def __init__(self, march: str = NATIVE) -> None:
        self.missing = ""
        self._march = march

    def load(self) -> bool:
        """Load the kernels and return True. Raises KernelsUnavailable when they cannot be compiled."""
        load_kernels(self._march)
        return True

    def takes(self, kernel: str, shape: str, trials: Trials) -> bool:
        """Return True; nothing is timed."""
        return True

    def describe(self) -> str:
        """Return the line for the log."""
        return f"CPU kernels for {self._march}: all of them"


class NoKernels:
    """Runs no kernel: torch computes everything."""

    missing = "cpu_kernels is never"

    def load(self) -> bool:
        """Return False; nothing is compiled."""
        return False

    def takes(self, kernel: str, shape: str, trials: Trials) -> bool:
        """Return False; nothing is timed."""
        return False

    def describe(self) -> str:
        """Return the line for the log."""
        return f"CPU kernels: none, {self.missing}; torch computes with {_instruction_set()}"


class FasterKernels:
    """Runs kernels as fast as torch's, within `MOST_RATIO`. folder: of the ratios' file; None keeps them in memory."""

    def __init__(self, folder: Path | None, *, measure: Measure | None = None, march: str = NATIVE) -> None:
        self.missing = ""
        self._folder, self._march = folder, march
        self._measure: Measure = measure or (lambda _, trials: time_ratio(trials))
        self._is_loaded: bool | None = None
        self._ratios: dict[str, float] = {}

    def load(self) -> bool:
        """Load the kernels and return True; if they cannot be compiled, warn once and return False."""
        if self._is_loaded is None:
            try:
                load_kernels(self._march)
                self._is_loaded = True
            except KernelsUnavailable as cause:
                self.missing = str(cause)
                self._is_loaded = False
                logger.warning("torch's operations compute the model, which is slower on most processors: %s", cause)
        return self._is_loaded

    def takes(self, kernel: str, shape: str, trials: Trials) -> bool:
        """Whether the kernel was as fast as torch's operations when the first process measured it."""
        key = f"{kernel} {shape}"
        if key not in self._ratios:
            self._ratios[key] = self._shared_ratio(key, functools.partial(self._measured, kernel, trials))
        return self._ratios[key] <= MOST_RATIO

    def describe(self) -> str:
        """Return the line for the log."""
        if self.missing:
            return f"CPU kernels: none; torch computes with {_instruction_set()}"
        ours, theirs = (
            ", ".join(f"{key} ({ratio:.2f})" for key, ratio in self._ratios.items() if (ratio <= MOST_RATIO) is taken)
            for taken in (True, False)
        )
        return (
            f"CPU kernels for {self._march}, torch with {_instruction_set()} (our time over torch's): "
            f"ours compute {ours or 'nothing'}; torch computes {theirs or 'nothing'}"
        )

    def _measured(self, kernel: str, trials: Trials) -> float:
        with torch.inference_mode():
            return self._measure(kernel, trials())

    def _shared_ratio(self, key: str, measured: Callable[[], float]) -> float:
        if self._folder is None:
            return measured()
        file = self._folder / f"kernels-{_hardware(self._march)}.json"
        with ExitStack() as stack:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(self._folder / "kernels.lock"))
            except OSError as cause:
                logger.warning("cannot store the choice of CPU kernels for other processes: %s", cause)
                return measured()
            ratios = _read(file)
            if key not in ratios:
                ratios[key] = measured()
                _write(file, ratios)
            return ratios[key]


ALL_KERNELS = AllKernels()


def kernel_choice(mode: Literal["auto", "always", "never"], folder: Path | None) -> KernelChoice:
    """Return the choice that the setting `cpu_kernels` names. folder: None keeps the ratios in the process."""
    if mode == "auto":
        return _process_choice() if folder is None else FasterKernels(folder)
    return ALL_KERNELS if mode == "always" else NoKernels()


@functools.cache
def _process_choice() -> FasterKernels:
    return FasterKernels(None)


def time_ratio(trials: Sequence[Trial], *, clock: Clock = time.thread_time) -> float:
    """Return the kernel's time over torch's: the geometric mean of the best rounds' ratios, in thread CPU time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return math.exp(sum(math.log(_ratio(trial, clock)) for trial in trials) / len(trials))
    finally:
        torch.set_num_threads(threads)


def _ratio(trial: Trial, clock: Clock) -> float:
    for run in trial:
        run()  # the first call allocates
    best = [math.inf, math.inf]
    end = clock() + TRIAL_S
    for _ in range(ROUNDS):
        for form, run in enumerate(trial):
            began = clock()
            run()
            best[form] = min(best[form], clock() - began)
        if clock() >= end:
            break
    return best[0] / best[1]


def _read(file: Path) -> dict[str, float]:
    try:
        found = msgspec.json.decode(file.read_bytes(), type=dict[str, float])
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, OSError) as cause:
        logger.warning("measuring the CPU kernels again, because %s cannot be read: %s", file, cause)
        return {}
    return {key: ratio for key, ratio in found.items() if ratio > 0}


def _write(file: Path, ratios: dict[str, float]) -> None:
    partial = file.with_suffix(".partial")
    try:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(ratios)))
        partial.replace(file)
    except OSError as cause:
        logger.warning("cannot store the choice of CPU kernels for other processes: %s", cause)
        partial.unlink(missing_ok=True)


@functools.cache
def _hardware(march: str) -> str:
    return identity(march, "speed", _instruction_set(), _processor())


def _instruction_set() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _processor() -> str:
    """Return the model name, because processors with equal features can differ in speed."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith("model name")), "")
