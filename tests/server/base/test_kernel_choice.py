"""The kernel choice: the faster form of each operation, equal in all processes; torch's without a compiler."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_data import examples

from reftserve.server.base import kernel_choice as module
from reftserve.server.base.cpu_kernels import load_kernels
from reftserve.server.base.fused import FusedMLP, FusedRMSNorm
from reftserve.server.base.fused_attention import FusedAttention
from reftserve.server.base.kernel_choice import (
    ALL_KERNELS,
    FasterKernels,
    KernelChoice,
    NoKernels,
    Trial,
    kernel_choice,
    time_ratio,
)
from reftserve.server.base.model_errors import KernelsUnavailable, UnsupportedModel
from reftserve.server.base.panels import PanelLinear
from reftserve.server.base.weights import load_base
from reftserve.server.engine.kv_cache.cpu import CpuCache
from reftserve.server.engine.kv_cache.gathered import GatheredCache
from reftserve.server.engine.runner import Runner
from reftserve.server.training.spans import Span, VarlenRows
from reftserve.server.training.varlen import VarlenModel

BOTH = ("linear", "rms_norm", "gated_activation", "rotate")  # engine and training use these
ENGINE, TRAINING = (*BOTH, "paged_attention", "edit_rows"), (*BOTH, "span_attention")
EVERY = (*ENGINE, "span_attention")
FAST, SLOW = 0.5, 20.0

# Builds an engine like its process does, and prints the generated tokens.
BUILDS = """
import logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
from reftserve.server.engine.config import EngineConfig
from reftserve.server.engine.messages import SamplingParams, Submit
from reftserve.server.engine.process import build
engine, _ = build(EngineConfig(sys.argv[1], sys.argv[2], threads=1, kv_cache_bytes=1 << 20, bank_bytes=1 << 14))
engine.submit(Submit("one", [5, 6, 7], SamplingParams(max_tokens=4)))
tokens = []
while engine.has_work:
    tokens += [token for output in engine.step().outputs for token in output.token_ids]
engine.close()
print(len(tokens))
"""


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_kernels()


class Speeds:
    def __init__(self, *slow: str) -> None:
        self._slow = slow
        self.asked: list[str] = []

    def __call__(self, kernel: str, trials: Sequence[Trial]) -> float:
        assert trials
        self.asked.append(kernel)
        return SLOW if kernel in self._slow else FAST


def runner(kernels: KernelChoice, name: str = "llama", **fields: bool) -> Runner:
    model = tiny_model(name).requires_grad_(False)
    return Runner(model, kv_cache_bytes=1 << 20, block_size=4, bank_bytes=1 << 14, kernels=kernels, **fields)


def forward(model: nn.Module, kernels: KernelChoice) -> Tensor:
    packed = VarlenModel(model, kernels=kernels)  # type: ignore[arg-type]
    rows = VarlenRows([Span(e, 0, e.length - 1) for e in examples(3, 1, vocabulary=100)], torch.device("cpu"))
    return packed.logits(rows, {})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> object:
        return lambda: setattr(self, "now", self.now + seconds)


def test_times_are_compared_by_ratio_at_each_row_count() -> None:
    clock = Clock()
    trials = [Trial(clock.work(4e-4), clock.work(1e-4)), Trial(clock.work(1e-3), clock.work(1e-3))]  # type: ignore[arg-type]
    assert time_ratio(trials, clock=clock) == pytest.approx(math.sqrt(4.0 * 1.0))


def test_the_best_round_counts_and_a_slow_form_runs_few_rounds() -> None:
    clock, runs = Clock(), []

    def disturbed() -> None:
        runs.append(1)
        clock.now += 1e-4 if len(runs) == 3 else 9e-4

    assert time_ratio([Trial(disturbed, clock.work(1e-4))], clock=clock) == pytest.approx(1.0)  # type: ignore[arg-type]
    runs.clear()
    slow = Trial(lambda: runs.append(1), clock.work(10.0))  # type: ignore[arg-type]
    clock.now = 0.0
    with pytest.raises(ValueError):  # a kernel that takes no time
        time_ratio([slow], clock=clock)
    assert len(runs) == 2


def test_measuring_keeps_the_number_of_threads() -> None:
    torch.set_num_threads(2)
    seen: list[int] = []
    time_ratio([Trial(lambda: seen.append(torch.get_num_threads()), lambda: sum(range(1000)))])
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("slow", ENGINE)
def test_the_engine_replaces_only_slow_kernels_by_torchs_operations(slow: str) -> None:
    measure = Speeds(slow)
    engine = runner(FasterKernels(None, measure=measure))
    assert sorted(measure.asked) == sorted(ENGINE)
    kinds = {type(part) for part in engine.model.modules()}
    found = {
        "linear": PanelLinear in kinds,
        "rms_norm": FusedRMSNorm in kinds,
        "gated_activation": FusedMLP in kinds,
        "rotate": FusedAttention in kinds,
        "paged_attention": isinstance(engine.cache, CpuCache),
        "edit_rows": engine._edits_by_kernel,
    }
    assert found == {kernel: kernel != slow for kernel in ENGINE}


def test_if_every_kernel_is_slow_the_model_stays_torchs() -> None:
    engine = runner(FasterKernels(None, measure=Speeds(*EVERY)))
    assert {type(part) for part in engine.model.modules()} == {type(part) for part in tiny_model("llama").modules()}
    assert isinstance(engine.cache, GatheredCache)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(ARCHITECTURES), slow=st.sets(st.sampled_from(TRAINING)))
def test_any_mixture_of_kernels_computes_the_same(name: str, slow: set[str]) -> None:
    model = tiny_model(name).requires_grad_(False)
    expected = forward(tiny_model(name).requires_grad_(False), NoKernels())
    torch.testing.assert_close(
        forward(model, FasterKernels(None, measure=Speeds(*slow))), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("form", [runner, lambda kernels: forward(tiny_model("llama").requires_grad_(False), kernels)])
def test_both_forms_of_a_trial_do_the_same_work(form: object) -> None:
    def compared(kernel: str, trials: Sequence[Trial]) -> float:
        for trial in trials:
            one, other = trial.kernel(), trial.torch()
            if kernel not in ("rotate", "edit_rows"):  # these write in place
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        return FAST

    form(FasterKernels(None, measure=compared))  # type: ignore[operator]


def test_an_object_without_a_folder_measures_once_and_the_process_has_one() -> None:
    measure = Speeds()
    kernels = FasterKernels(None, measure=measure)
    for _ in range(2):
        runner(kernels)
    assert sorted(measure.asked) == sorted(ENGINE)
    assert kernel_choice("auto", None) is kernel_choice("auto", None)


def test_another_process_and_a_later_start_reuse_the_first_choice(tmp_path: Path) -> None:
    first, second = Speeds("linear"), Speeds()
    forward(tiny_model("llama").requires_grad_(False), FasterKernels(tmp_path, measure=first))
    engine = runner(FasterKernels(tmp_path, measure=second))
    assert second.asked == ["paged_attention", "edit_rows"], "the engine's own"
    assert not any(type(part) is PanelLinear for part in engine.model.modules())


def test_only_one_of_several_starting_processes_measures(tmp_path: Path) -> None:
    measure = Speeds("linear")
    choices = [FasterKernels(tmp_path, measure=measure) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(lambda choice: choice.takes("linear", "1x1", lambda: [Trial(int, int)]), choices)
        assert list(asked) == [False] * 8
    assert measure.asked == ["linear"]


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"[1]", b'{"linear 32x48": "fast"}', b'{"linear 32x48": -1}'])
def test_a_damaged_file_is_ignored_and_rewritten(tmp_path: Path, content: bytes) -> None:
    runner(FasterKernels(tmp_path, measure=Speeds("linear")))
    (file,) = tmp_path.glob("kernels-*.json")
    whole = file.read_bytes()
    file.write_bytes(content)
    measure = Speeds("linear")
    runner(FasterKernels(tmp_path, measure=measure))
    assert sorted(measure.asked) == sorted(ENGINE)
    assert file.read_bytes() == whole


def test_kernels_for_another_processor_are_measured_separately(tmp_path: Path) -> None:
    for march in ("native", "x86-64-v3"):
        measure = Speeds()
        FasterKernels(tmp_path, measure=measure, march=march).takes("linear", "1x1", lambda: [Trial(int, int)])
        assert measure.asked == ["linear"]
    assert len(list(tmp_path.glob("kernels-*.json"))) == 2


def test_a_choice_that_cannot_be_saved_holds_for_the_process_with_a_log_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    measure = Speeds()
    kernels = FasterKernels(tmp_path / "file", measure=measure)
    for _ in range(2):
        assert kernels.takes("linear", "1x1", lambda: [Trial(int, int)])
    assert measure.asked == ["linear"]
    assert "cannot store the choice of CPU kernels" in caplog.text


def test_the_choice_is_described_in_one_line() -> None:
    kernels = FasterKernels(None, measure=Speeds("linear"))
    runner(kernels)
    line = kernels.describe()
    assert "\n" not in line
    ours, theirs = line.split("torch computes ")
    assert "linear 32x48 (20.00)" in theirs
    assert "rms_norm 32 (0.50)" in ours
    assert torch.backends.cpu.get_cpu_capability() in ours


def test_a_real_measurement_is_saved_for_every_kernel(tiny_llama_folder: Path, tmp_path: Path) -> None:
    kernels = kernel_choice("auto", tmp_path)
    model = load_base(tiny_llama_folder, torch.float32, torch.device("cpu"), kernels=kernels, shared=None)
    Runner(model, kv_cache_bytes=1 << 20, block_size=4, bank_bytes=1 << 14, kernels=kernels)
    VarlenModel(tiny_model("llama").requires_grad_(False), kernels=kernels)
    (file,) = tmp_path.glob("kernels-*.json")
    assert {kernel for kernel in EVERY if f'"{kernel} ' in file.read_text()} == set(EVERY)


def test_no_compiler_is_needed_if_torch_computes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_kernels", lambda march: pytest.fail("loaded"))
    runner(NoKernels())
    bfloat16 = tiny_model("llama").to(torch.bfloat16).requires_grad_(False)
    Runner(bfloat16, kv_cache_bytes=1 << 20, block_size=4, bank_bytes=1 << 14, kernels=ALL_KERNELS)


def test_without_a_compiler_the_engine_builds_answers_and_warns_once(tiny_llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    environment = {**os.environ, "PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    command = [sys.executable, "-c", BUILDS, str(tiny_llama_folder), str(tmp_path / "weights")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"
    assert done.stderr.count("install g++") == 1
    assert not list((tmp_path / "weights").glob("kernels-*")), "a compiler that comes later is used"


def test_without_a_compiler_int8_and_the_always_setting_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(march: str) -> None:
        raise KernelsUnavailable("install g++")

    monkeypatch.setattr(module, "load_kernels", fails)
    with pytest.raises(UnsupportedModel, match=r"int8 .* install g\+\+"):
        runner(FasterKernels(None), int8=True)
    with pytest.raises(KernelsUnavailable):
        runner(ALL_KERNELS)


def test_int8_is_refused_if_kernels_are_disabled() -> None:
    with pytest.raises(UnsupportedModel, match="cpu_kernels is never"):
        runner(NoKernels(), int8=True)
