"""An engine over a tiny random Llama that records its logits, and its oracle: `attach()` on a single request."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from recorded import record, use_paged_cache
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reftserve.interventions import (
    BaseFingerprint,
    Intervention,
    LowRankEdit,
    PlacedEdit,
    Positions,
    attach,
    load_artifact,
    save_artifact,
)
from reftserve.server.base.attention import LayerShape
from reftserve.server.base.tokenizer import Tokenizer, load_tokenizer
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.grammar_masks import GrammarCompiler
from reftserve.server.engine.messages import InterventionRef, SamplingParams, Submit, TokenLogprobs, TokenOutput
from reftserve.server.engine.runner import Logits, Runner
from reftserve.server.engine.scheduler import Batch


class RecordingRunner(Runner):
    def __init__(self, model: PreTrainedModel, **sizes: int) -> None:
        super().__init__(model, **sizes)
        self.logits: dict[tuple[str, int], Tensor] = {}
        self.batches: list[Batch] = []

    def step(self, batch: Batch, token_ids: Tensor | None = None) -> Logits:
        logits = super().step(batch, token_ids)
        sampling = [chunk for chunk in batch.chunks if chunk.samples]
        for chunk, row in zip(sampling, logits.sampling, strict=True):
            self.logits[chunk.sequence.request_id, chunk.stop] = row.clone()
        self.batches.append(batch)
        return logits


@dataclass
class Run:
    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    finished: dict[str, TokenOutput] = field(default_factory=dict)

    def take(self, outputs: Iterable[TokenOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.finished, "output after the last one"
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            self.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
            self.prompt_logprobs.setdefault(output.request_id, []).extend(output.prompt_logprobs)
            if output.finish_reason is not None:
                self.finished[output.request_id] = output


def run_until_done(
    engine: Engine, run: Run | None = None, max_steps: int = 5000, until: Callable[[], bool] = lambda: False
) -> Run:
    """Step until no work is left or `until` holds, and return the outputs; fail after `max_steps`."""
    run = run or Run()
    for _ in range(max_steps):
        if until() or not (engine.has_work or engine.is_loading):
            return run
        run.take(engine.step().outputs)
        if not engine.has_work:
            time.sleep(0.001)
    raise AssertionError(f"not done after {max_steps} steps: {engine.stats()}")


def oracle_logits(model: PreTrainedModel, tokens: list[int], n_prompt: int, edits: list[PlacedEdit]) -> Tensor:
    """Return teacher-forced logits of the tokens after the prompt, [len(tokens) - n_prompt, vocabulary]."""
    with torch.no_grad(), attach(model, edits, n_prompt):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits[n_prompt - 1 : len(tokens) - 1]


def scaled_edits(intervention: Intervention, scale: float) -> list[PlacedEdit]:
    return [PlacedEdit(p.layer, p.positions, p.edit.scaled(scale)) for p in intervention.edits]


def request(
    name: str,
    prompt: list[int],
    *,
    uses: Iterable[tuple[Path, float]] = (),
    max_tokens: int = 8,
    cache_salt: str = "",
    priority: int = 0,
    timeout_s: float | None = None,
    client: str = "",
    sibling: int = 0,
    **sampling: object,
) -> Submit:
    refs = tuple(InterventionRef(str(f), load_artifact(f).content_hash, scale) for f, scale in uses)
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Submit(name, prompt, params, refs, cache_salt, priority, timeout_s, client=client, sibling=sibling)


def random_edit(rank: int, hidden: int, seed: int, activation: int = 0) -> LowRankEdit:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return LowRankEdit(
        A=normal(rank, hidden) * hidden**-0.5,
        b=normal(rank),
        U=normal(rank, hidden),
        act=torch.full((rank,), activation, dtype=torch.int8),
        scale=torch.ones(rank),
    )


def save_random(
    folder: Path,
    placements: list[tuple[int, str]],
    *,
    rank: int,
    hidden: int = 32,
    seed: int = 0,
    activation: int = 0,
) -> Path:
    edits = [
        PlacedEdit(layer, Positions.parse(positions), random_edit(rank, hidden, seed * 100 + i, activation))
        for i, (layer, positions) in enumerate(placements)
    ]
    return save_edits(folder, edits, positions=placements[0][1], rank=rank, hidden=hidden)


def save_edits(
    folder: Path, edits: list[PlacedEdit], *, positions: str = "prompt", rank: int = 1, hidden: int = 32
) -> Path:
    base = BaseFingerprint(architecture="LlamaForCausalLM", hidden_size=hidden, num_layers=4, vocab_size=300)
    save_artifact(folder, edits, family="loreft", positions=positions, rank=rank, base=base)
    return folder


def make_engine(
    folder: Path,
    *,
    blocks: int = 64,
    block_size: int = 4,
    bank_rows: int = 200,
    max_batch_tokens: int = 64,
    max_sequences: int = 16,
    prefix_cache: bool = True,
    host_bytes: int = 1 << 30,
    recorded: bool = False,
    overlap: bool = False,
) -> Engine:
    """Make an engine with caches of exactly these sizes. recorded: emulate the GPU's steps by recorded.py."""
    model, tokenizer = _loaded(folder)
    hidden, layers, kv_heads, head_dim = 32, 4, 2, 8
    # The CPU's cache pads blocks and values to multiples of sixteen.
    bytes_per_block = layers * kv_heads * 16 * -(-block_size // 16) * (head_dim + 16) * 4
    runner = RecordingRunner(
        copy.deepcopy(model),  # the runner modifies its model
        kv_cache_bytes=blocks * bytes_per_block,
        block_size=block_size,
        bank_bytes=bank_rows * 4 * (2 * hidden + 2),
    )
    if recorded:
        use_paged_cache(runner, [LayerShape(kv_heads, head_dim, head_dim)] * layers, blocks)
        runner.record_decodes(max_sequences, record)
    return Engine(
        runner,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        prefix_cache=prefix_cache,
        host_bytes=host_bytes,
        overlap=overlap,
        grammars=GrammarCompiler(tokenizer, (2,), runner.config.vocab_size),
    )


@functools.cache
def _loaded(folder: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Load once: property tests make thousands of engines, and loading takes five times as long as copying."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False), load_tokenizer(folder)
