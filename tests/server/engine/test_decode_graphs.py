"""Which decode steps are replayed, and that recordings keep CUDA's rules; test_mixtures.py checks the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from engine_oracle import make_engine, request, run_until_done, save_random
from recorded import PlainKernels, record, use_paged_cache
from torch import Tensor

from reftserve.server.base.attention import LayerShape
from reftserve.server.base.kernel_choice import NoKernels
from reftserve.server.engine.decode_graphs import DecodeGraphs
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.kv_cache.cuda import CudaCache
from reftserve.server.engine.runner import Runner

PROMPT = [5, 9, 17, 120, 44]


class CountingRecorder:
    def __init__(self) -> None:
        self.recorded = 0
        self.replayed: list[int] = []

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        replay = record(compute)

        def counted() -> Tensor:
            logits = replay()
            self.replayed.append(len(logits))
            return logits

        return counted


def counting_engine(folder: Path, **sizes: int) -> tuple[Engine, CountingRecorder]:
    engine = make_engine(folder, recorded=True, **sizes)
    recorder = CountingRecorder()
    engine.runner.record_decodes(engine.scheduler.max_sequences, recorder)
    return engine, recorder


def test_every_plain_decode_step_is_replayed_at_the_next_larger_size(tiny_llama_folder: Path) -> None:
    engine, recorder = counting_engine(tiny_llama_folder, max_sequences=11)
    assert recorder.recorded == 5
    for index in range(3):
        engine.submit(request(str(index), PROMPT[index:], max_tokens=6))
    run_until_done(engine)
    assert recorder.recorded == 5
    assert recorder.replayed == [4] * 5
    engine.close()


def test_edits_of_the_prompt_leave_decode_steps_to_the_base_models_recording(
    tiny_llama_folder: Path, artifacts: list[Path]
) -> None:
    engine, recorder = counting_engine(tiny_llama_folder, max_sequences=4)
    engine.submit(request("a", PROMPT, uses=[(artifacts[1], 1.0)], max_tokens=4))
    run_until_done(engine)
    assert (recorder.recorded, recorder.replayed) == (3, [1] * 3)
    engine.close()


def test_edits_of_the_answer_are_recorded_by_kind_up_to_the_rank_limit(
    tiny_llama_folder: Path, artifacts: list[Path], tmp_path: Path
) -> None:
    engine, recorder = counting_engine(tiny_llama_folder, max_sequences=1)
    wide = save_random(tmp_path / "wide", [(1, "generated")], rank=17)
    added = []
    # Linear, another activation, linear again, too wide.
    for index, folder in enumerate((artifacts[4], artifacts[5], artifacts[4], wide)):
        before = (recorder.recorded, len(recorder.replayed))
        # Four tokens: with one more, the next request would find them in the cache and decode its last token.
        engine.submit(request(str(index), PROMPT[:4], uses=[(folder, 1.0)], max_tokens=4))
        run_until_done(engine)
        added.append((recorder.recorded - before[0], len(recorder.replayed) - before[1]))
    assert added == [(1, 3), (1, 3), (0, 3), (0, 0)]
    engine.close()


def test_padding_rows_write_only_to_the_scratch_block(tiny_llama_folder: Path) -> None:
    engine, _ = counting_engine(tiny_llama_folder, max_sequences=8, blocks=8)
    cache = engine.runner.cache
    assert isinstance(cache, CudaCache)
    for index in range(5):
        engine.submit(request(str(index), PROMPT[:2], max_tokens=2))
    engine.step()
    held = {block for s in engine.scheduler.running for block in s.block_table}
    before = [keys.clone() for keys in cache.keys]
    engine.step()
    changed = {
        block
        for keys, old in zip(cache.keys, before, strict=True)
        for block in (keys != old).flatten(1).any(1).nonzero().flatten().tolist()
    }
    assert changed <= held | {cache.num_blocks}
    engine.close()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_recorded(name: str) -> None:
    model = tiny_model(name).requires_grad_(False)
    runner = Runner(model, kv_cache_bytes=1 << 16, block_size=4, bank_bytes=1 << 14, kernels=NoKernels())
    shapes = [LayerShape(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in stores(runner)]
    use_paged_cache(runner, shapes, blocks=8)
    runner.record_decodes(4, record)  # refuses operations that read values on the device
    assert isinstance(runner._graphs, DecodeGraphs)


def stores(runner: Runner) -> list[tuple[Tensor, Tensor]]:
    return list(zip(runner.cache.keys, runner.cache.values, strict=True))  # type: ignore[attr-defined]


def test_a_row_without_tokens_gives_zeros_in_plain_torch_as_on_the_gpu() -> None:
    keys = torch.full((2, 4, 1, 8), torch.nan)
    out = torch.full((1, 2, 8), torch.nan)
    tables, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    PlainKernels().decodes(torch.ones(2, 1, 8), keys, keys, tables, lengths, 1.0, None, out)
    assert torch.equal(out, torch.zeros(1, 2, 8))
