"""The engine serves any unpatched transformers decoder with full or sliding-window attention, as `attach()` does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, ROTARY, tiny_model
from engine_oracle import RecordingRunner, oracle_logits, random_edit, request, run_until_done
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from reftserve.interventions import BaseFingerprint, PlacedEdit, Positions, save_artifact
from reftserve.server.base.model_errors import UnsupportedModel
from reftserve.server.engine.engine import Engine


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_serves_edited_and_plain_requests_as_alone(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "model")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    edits = [
        PlacedEdit(1, Positions.parse("f2+l3"), random_edit(3, 32, 1)),
        PlacedEdit(2, Positions.parse("all"), random_edit(2, 32, 2)),
    ]
    base = BaseFingerprint(architecture="any", hidden_size=32, num_layers=3, vocab_size=100)
    save_artifact(tmp_path / "edits", edits, family="loreft", positions="f2+l3", rank=3, base=base)
    runner = RecordingRunner(served, kv_cache_bytes=1 << 20, block_size=4, bank_bytes=1 << 14)
    engine = Engine(runner, max_batch_tokens=16, max_sequences=8)
    generator = torch.Generator().manual_seed(3)
    submits = []
    for index in range(4):
        prompt = torch.randint(3, 100, (7 + 9 * index,), generator=generator).tolist()
        uses = [(tmp_path / "edits", 1.0)] if index % 2 else []
        submits.append(request(f"r{index}", prompt, uses=uses, max_tokens=12))
        engine.submit(submits[-1])
    run = run_until_done(engine)
    for index, submit in enumerate(submits):
        tokens = run.tokens[submit.request_id]
        assert len(tokens) == 12
        alone = oracle_logits(oracle, submit.prompt_ids + tokens, len(submit.prompt_ids), edits if index % 2 else [])
        mixed = torch.stack([runner.logits[submit.request_id, len(submit.prompt_ids) + i] for i in range(12)])
        torch.testing.assert_close(mixed, alone, atol=2e-4, rtol=1e-4)
    engine.close()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_bfloat16_an_architecture_is_as_close_to_float32_as_alone(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    exact, alone, served = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    runner = RecordingRunner(served, kv_cache_bytes=1 << 20, block_size=4, bank_bytes=1 << 14)
    engine = Engine(runner, max_batch_tokens=16, max_sequences=8)
    prompts = [list(range(3 + index, 12 + 9 * index)) for index in range(4)]
    for index, prompt in enumerate(prompts):
        engine.submit(request(str(index), prompt, max_tokens=1))
    run_until_done(engine)
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            expected, rounded = (m(torch.tensor([prompt])).logits[0, -1].float() for m in (exact, alone))
        found = runner.logits[str(index), len(prompt)].float()
        assert float((found - expected).norm()) <= 2 * float((rounded - expected).norm()) + 0.01 * float(
            expected.norm()
        )
    engine.close()


def test_positions_that_depend_on_other_requests_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = LlamaForCausalLM(LlamaConfig(**ROTARY, rope_parameters=rope)).eval()
    with pytest.raises(UnsupportedModel, match="dynamic"):
        RecordingRunner(model, kv_cache_bytes=1 << 20, block_size=4, bank_bytes=1 << 14)
