"""One copy of the base's weights for all processes: a file, written once and verified, that changes no result."""

from __future__ import annotations

import copy
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from engine_oracle import RecordingRunner, request, run_until_done
from tiny_models import tiny_llama
from training_data import examples, plan
from transformers import PreTrainedModel

from reftserve.interventions import Positions, model_checksum
from reftserve.server.base.cpu_kernels import load_kernels
from reftserve.server.base.kernel_choice import ALL_KERNELS, FasterKernels
from reftserve.server.base.weights import load_base, share_weights
from reftserve.server.datasets import Splits
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.runner import Runner
from reftserve.server.training.activation_cache import ActivationCache, Arena
from reftserve.server.training.trainer import Trainer
from reftserve.server.training.varlen import VarlenModel

# Maps the weights and then waits; with "write" it writes to them first.
CHILD = """
import sys
from pathlib import Path
import torch
from reftserve.interventions import model_checksum
from reftserve.server.base.kernel_choice import ALL_KERNELS
from reftserve.server.base.weights import load_base
print("begins", flush=True)
sys.stdin.readline()
folder, shared = Path(sys.argv[1]), Path(sys.argv[2])
model = load_base(folder, torch.float32, torch.device("cpu"), kernels=ALL_KERNELS, shared=shared)
model_checksum(model)  # reads every page
print("maps", flush=True)
if sys.stdin.readline() == "write\\n":
    next(model.parameters()).zero_()
"""


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_kernels()


def base(folder: Path, shared: Path | None) -> PreTrainedModel:
    return load_base(folder, torch.float32, torch.device("cpu"), kernels=ALL_KERNELS, shared=shared)


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("*.weights")
    return file


@contextmanager
def children(model: Path, shared: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-c", CHILD, str(model), str(shared)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    try:
        for said in ("begins\n", "maps\n"):
            assert [process.stdout.readline() for process in processes] == [said] * count
            if said == "begins\n":
                for process in processes:
                    process.stdin.write("\n")
                    process.stdin.flush()
        yield processes
    finally:
        for process in processes:
            process.communicate()


def sizes(pid: int, file: Path) -> dict[str, int]:
    """Return the kernel's figures of a process's mapping of a file, in kB, and the file's inode."""
    found: dict[str, int] = {}
    is_it = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            is_it = rest[4:] == [str(file)]
            if is_it:
                found["inode"] = int(rest[3])
        elif is_it and rest[-1] == "kB":
            found[first] = found.get(first, 0) + int(rest[0])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_processes_that_start_together_write_the_file_once_and_share_its_pages(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    with children(tiny_llama_folder, tmp_path, 2) as processes:
        file = the_file(tmp_path)
        for found in [sizes(process.pid, file) for process in processes]:
            assert found["inode"] == file.stat().st_ino
            assert found["Rss:"] >= file.stat().st_size // 1024
            assert found["Private_Clean:"] == found["Private_Dirty:"] == found["Anonymous:"] == 0
            assert found["Pss:"] == pytest.approx(found["Rss:"] / 2, abs=1)


def test_a_process_that_writes_to_the_weights_is_killed_and_they_stay_unchanged(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    with children(tiny_llama_folder, tmp_path, 1) as (process,):
        before = the_file(tmp_path).read_bytes()
        process.communicate("write\n")
    assert process.returncode == -signal.SIGSEGV
    assert the_file(tmp_path).read_bytes() == before


def test_a_valid_weights_file_is_used_unchanged(tiny_llama_folder: Path, tmp_path: Path) -> None:
    base(tiny_llama_folder, tmp_path)
    before = the_file(tmp_path).stat()
    base(tiny_llama_folder, tmp_path)
    assert the_file(tmp_path).stat() == before


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4)


def lengthen(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 64)


def alter(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def exchange(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [cut, lengthen, alter, exchange])
def test_a_damaged_file_is_rewritten(tiny_llama_folder: Path, tmp_path: Path, damage: object) -> None:
    expected = model_checksum(base(tiny_llama_folder, tmp_path))
    file = the_file(tmp_path)
    content = file.read_bytes()
    file.chmod(0o600)
    damage(file)  # type: ignore[operator]
    assert model_checksum(base(tiny_llama_folder, tmp_path)) == expected
    assert the_file(tmp_path) == file
    assert file.read_bytes() == content


def test_files_of_other_bases_are_removed_when_a_new_one_is_written(tiny_llama_folder: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        share_weights(tiny_llama(seed=seed), tmp_path)
    in_use = base(tiny_llama_folder, tmp_path)
    kept = the_file(tmp_path)
    other = tiny_llama(seed=3)
    share_weights(other, tmp_path)
    assert the_file(tmp_path) != kept
    assert model_checksum(in_use) == model_checksum(base(tiny_llama_folder, None))


def test_without_disk_space_the_weights_stay_private_with_a_log_message(
    tiny_llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            model = base(tiny_llama_folder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "private to this process" in caplog.text
    assert model_checksum(model) == model_checksum(base(tiny_llama_folder, None))
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_dtype_is_shared(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype).requires_grad_(False)
    private, ids = copy.deepcopy(model), torch.arange(20).unsqueeze(0)
    share_weights(model, tmp_path)
    assert torch.equal(model(ids).logits, private(ids).logits)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_fused_layers_are_adjacent_in_the_file(name: str, trains: bool, packs: bool, tmp_path: Path) -> None:
    kernels = FasterKernels(None, measure=lambda kernel, trials: 9.0 if kernel == "linear" and not packs else 0.5)
    tiny_model(name).save_pretrained(tmp_path / "model")
    shared = load_base(tmp_path / "model", torch.float32, torch.device("cpu"), kernels=kernels, shared=tmp_path / "w")
    file = shared.model.layers[0].self_attn.q_proj.weight.untyped_storage().data_ptr()
    sizes = {"kv_cache_bytes": 1 << 20, "block_size": 4, "bank_bytes": 1 << 14}
    user = VarlenModel(shared, kernels=kernels) if trains else Runner(shared, kernels=kernels, **sizes)
    layer = user.model.model.layers[0]
    for joined in (layer.self_attn.qkv, layer.mlp.gate_up):
        assert joined.weight.untyped_storage().data_ptr() == file, "a view, not a copy"


@pytest.mark.parametrize("int8", [False, True])
def test_an_engine_is_bitwise_equal_on_shared_weights(tiny_llama_folder: Path, tmp_path: Path, int8: bool) -> None:
    logits = []
    for shared in (None, tmp_path):
        sizes = {"kv_cache_bytes": 1 << 20, "block_size": 4, "bank_bytes": 1 << 14, "int8": int8}
        runner = RecordingRunner(base(tiny_llama_folder, shared), **sizes)
        engine = Engine(runner, max_batch_tokens=16, max_sequences=8)
        for length in (1, 7, 30):
            engine.submit(request(str(length), list(range(5, 5 + length)), max_tokens=4))
        run_until_done(engine)
        engine.close()
        logits.append(runner.logits)
    assert logits[0].keys() == logits[1].keys()
    assert all(torch.equal(logits[0][key], logits[1][key]) for key in logits[0])


def test_training_is_bitwise_equal_on_shared_weights(tiny_llama_folder: Path, tmp_path: Path) -> None:
    learned = []
    for shared in (None, tmp_path):
        packed = VarlenModel(base(tiny_llama_folder, shared))
        run, data = plan(layers=[0, 2], positions="f1+l1"), examples(8, 1)
        cache = ActivationCache(packed, 0, Positions.parse(run.positions).split(), Arena(1 << 20))
        cache.fill(data)
        trainer = Trainer(cache, Splits(data, data[:2], data[:2]), run, seed=0)
        for _ in range(3):
            trainer.advance()
        learned.append([placed.edit.content_hash for placed in trainer.intervention.lower()])
    assert learned[0] == learned[1]
