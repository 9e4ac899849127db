"""One copy of the base's weights on a GPU: the engine lends handles as plain data, checked before use."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
import torch
from tiny_models import tiny_llama
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from reftserve.interventions import model_checksum
from reftserve.server.base import cuda_weights
from reftserve.server.base.cuda_weights import lend_weights, open_lent
from reftserve.server.base.lent_tensor import LentTensor
from reftserve.server.base.weights import borrow_weights
from reftserve.server.engine.messages import FromEngine, Ready

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Borrows a model's weights by handles on standard input; prints their checksum and the sum of its output.
BORROWER = """
import sys
from pathlib import Path
import msgspec, torch
from reftserve.interventions import model_checksum
from reftserve.server.base.kernel_choice import ALL_KERNELS
from reftserve.server.base.lent_tensor import LentTensor
from reftserve.server.base.weights import load_base
lent = msgspec.json.decode(sys.stdin.readline(), type=list[LentTensor])
device = torch.device("cuda")
model = load_base(Path(sys.argv[1]), torch.bfloat16, device, kernels=ALL_KERNELS, shared=None, lent=lent)
logits = model(torch.tensor([[1, 2, 3]], device=device)).logits
print(model_checksum(model), logits.float().sum().item(), flush=True)
"""


class Memory:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: dict[bytes, torch.Tensor] = {}
        monkeypatch.setattr(cuda_weights, "rebuild_cuda_tensor", self._open)

    def lend(self, model: torch.nn.Module) -> list[LentTensor]:
        return [self._handle(parameter.detach().clone()) for parameter in model.parameters()]

    def _handle(self, tensor: torch.Tensor) -> LentTensor:
        storage = str(len(self.tensors)).encode()
        self.tensors[storage] = tensor
        size = tuple(tensor.shape)
        return LentTensor("float32", size, tensor.stride(), 0, 0, storage, tensor.nbytes, 0, b"", 0, b"", False)

    def _open(self, *arguments: Any) -> torch.Tensor:
        storage = arguments[7]
        if storage not in self.tensors:
            raise RuntimeError("invalid device context")
        return self.tensors[storage]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


def test_lent_weights_replace_the_models_own(memory: Memory) -> None:
    model = tiny_llama()
    before, lent = model_checksum(model), memory.lend(model)
    borrow_weights(model, lent)
    assert [p.data_ptr() for p in model.parameters()] == [t.data_ptr() for t in memory.tensors.values()]
    assert model_checksum(model) == before


@pytest.mark.parametrize("damage", ["value", "type", "shape", "number", "gone"])
def test_weights_of_another_base_are_not_borrowed(
    damage: str, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    lent = memory.lend(model)
    own = [parameter.data_ptr() for parameter in model.parameters()]
    first = lent[0].storage
    if damage == "value":
        memory.tensors[first].view(-1)[0] += 1
    elif damage == "type":
        memory.tensors[first] = memory.tensors[first].double()
    elif damage == "shape":
        memory.tensors[first] = memory.tensors[first].flatten()
    elif damage == "number":
        lent = lent[1:]
    else:
        del memory.tensors[first]
    borrow_weights(model, lent)
    assert [parameter.data_ptr() for parameter in model.parameters()] == own
    assert "private to this process" in caplog.text


def test_a_model_on_the_cpu_is_not_lent() -> None:
    assert lend_weights(tiny_llama()) == []


def test_handles_are_sent_as_plain_data(memory: Memory) -> None:
    lent = memory.lend(tiny_llama())
    assert msgspec.json.decode(msgspec.json.encode(lent), type=list[LentTensor]) == lent
    ready = Ready(max_context=8, device="cuda", dtype="float32", max_sequences=4, block_size=16, lent=lent)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ready), type=FromEngine) == ready


def test_handles_follow_the_order_of_torchs_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's private signature is the contract: a release that changes it must fail here, not on a user's GPU."""
    opened: list[inspect.BoundArguments] = []
    signature = inspect.signature(rebuild_cuda_tensor)
    names = list(signature.parameters)
    sent = {name: f"<{name}>" for name in names} | {
        "tensor_size": (3, 2),
        "tensor_stride": (1, 3),
        "dtype": torch.bfloat16,
        "tensor_offset": 5,
        "storage_device": 1,
        "storage_handle": b"memory",
        "storage_size_bytes": 1024,
        "storage_offset_bytes": 512,
        "ref_counter_handle": b"counter",
        "ref_counter_offset": 7,
        "event_handle": b"event",
        "event_sync_required": True,
    }
    monkeypatch.setattr(cuda_weights, "reduce_tensor", lambda _: (None, tuple(sent[name] for name in names)))
    monkeypatch.setattr(cuda_weights, "rebuild_cuda_tensor", lambda *given: opened.append(signature.bind(*given)))
    (lent,) = lend_weights(Mock(parameters=lambda: [Mock(device=torch.device("cuda"))]))
    assert (lent.size, lent.stride, lent.offset, lent.dtype) == ((3, 2), (1, 3), 5, "bfloat16")
    assert (lent.storage, lent.storage_bytes, lent.storage_offset) == (b"memory", 1024, 512)
    assert (lent.counter, lent.counter_offset, lent.event, lent.event_sync) == (b"counter", 7, b"event", True)
    open_lent(lent)
    (bound,) = opened
    ours = {"tensor_cls": torch.Tensor, "storage_cls": torch.TypedStorage, "requires_grad": False}
    assert bound.arguments == sent | ours


@needs_gpu
def test_a_worker_computes_on_the_engines_memory(tiny_llama_folder: Path) -> None:
    from reftserve.server.base.model import load_model

    model = load_model(tiny_llama_folder, torch.bfloat16, torch.device("cuda"))
    lent = lend_weights(model)
    assert len(lent) == len(list(model.parameters()))
    command = [sys.executable, "-c", BORROWER, str(tiny_llama_folder)]
    logits = model(torch.tensor([[1, 2, 3]], device="cuda")).logits
    for _ in range(2):  # a worker may be restarted
        done = subprocess.run(
            command, input=msgspec.json.encode(lent) + b"\n", capture_output=True, check=True, timeout=300
        )
        assert b"private to this process" not in done.stderr
        checksum, total = done.stdout.split()
        assert checksum.decode() == model_checksum(model)
        assert float(total) == pytest.approx(logits.float().sum().item())
