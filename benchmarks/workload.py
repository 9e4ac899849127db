"""The benchmarks' workload: a real model, prompts from real text, random interventions, an engine in this process."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from reftserve.interventions import (
    BaseFingerprint,
    LowRankEdit,
    PlacedEdit,
    Positions,
    fingerprint,
    load_artifact,
    save_artifact,
)
from reftserve.server.base.kernel_choice import KernelChoice
from reftserve.server.base.memory import freeze_gc
from reftserve.server.engine.config import EngineConfig
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import InterventionRef, SamplingParams, Submit
from reftserve.server.engine.process import build

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "reftserve-data" / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct"


def prompts(count: int, low: int, high: int, seed: int = 0, model: Path = MODEL) -> list[list[int]]:
    lines = (ROOT / "examples" / "sentiment.train.jsonl").read_text("utf-8").splitlines()
    text = "\n".join(json.loads(line)["messages"][0]["content"] for line in lines)
    ids: list[int] = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    draw = random.Random(seed)  # noqa: S311 - a workload, not a secret
    starts = [draw.randrange(len(ids) - high) for _ in range(count)]
    return [ids[start : start + draw.randint(low, high)] for start in starts]


def make_engine(kernels: KernelChoice | None = None, **fields: Any) -> Engine:
    """Make the engine as its process does. kernels: the ones to use; None: by the settings' fields."""
    engine, _ = build(EngineConfig(str(MODEL), threads=2, **fields), kernels)
    freeze_gc()
    return engine


def interventions(
    folder: Path, count: int, *, positions: str, rank: int, layers: tuple[int, ...]
) -> list[InterventionRef]:
    """Save different random interventions into a folder, in the form of LoReFT with tied weights."""
    base: BaseFingerprint = fingerprint(MODEL)
    parsed = Positions.parse(positions)
    refs = []
    for seed in range(count):
        target = folder / f"{positions}-{rank}-{len(layers)}-{seed}"
        if not target.exists():
            draw = torch.Generator().manual_seed(seed)
            edits = [PlacedEdit(layer, parsed, _random_edit(rank, base.hidden_size, draw)) for layer in layers]
            save_artifact(target, edits, family="loreft", positions=positions, rank=rank, base=base)
        refs.append(InterventionRef(str(target), load_artifact(target).content_hash))
    return refs


def _random_edit(rank: int, hidden_size: int, draw: torch.Generator) -> LowRankEdit:
    A, U = (torch.randn(rank, hidden_size, generator=draw) / hidden_size**0.5 for _ in range(2))
    linear = torch.zeros(rank, dtype=torch.int8)
    return LowRankEdit(A, torch.zeros(rank), U, linear, torch.ones(rank))


def serve(engine: Engine, workload: list[list[int]], new_tokens: int, refs: list[InterventionRef]) -> float:
    """Return generated tokens per second, with all requests queued at once, interventions in turn, without loads."""
    for ref in refs:
        engine.loader.request(ref)
    while engine.is_loading:
        time.sleep(0.001)  # like the engine's process: spinning would starve the loader's thread
        engine.step()
    sampling = SamplingParams(max_tokens=new_tokens)
    began = time.perf_counter()
    for index, prompt in enumerate(workload):
        uses = (refs[index % len(refs)],) if refs else ()
        engine.submit(Submit(f"{began}-{index}", prompt, sampling, uses))
    while engine.has_work:
        engine.step()
    return len(workload) * new_tokens / (time.perf_counter() - began)


def medians(variants: dict[str, Callable[[], float]], runs: int, *, warm_up: bool = True) -> dict[str, float]:
    """Return each variant's median over `runs` rounds, in turns, so that the machine's drift affects all."""
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for counts in [False] * warm_up + [True] * runs:
        for name, variant in variants.items():
            figure = variant()
            if counts:
                figures[name].append(figure)
    return {name: statistics.median(values) for name, values in figures.items()}


def machine() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
