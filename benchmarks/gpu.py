"""What graphs, attention in place and interventions do on a GPU, with random weights: `python benchmarks/gpu.py`.

Needs no download and no model: the shapes are Llama's, 1B and 8B, in bfloat16. Prints decode tokens a second by batch
size for each way to compute a step, then tokens a second over the number of different interventions. `--shape tiny
--device cpu` goes through the same code without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reftserve.interventions import BaseFingerprint, InterventionConfig, TrainableIntervention, load_artifact
from reftserve.interventions import save_artifact as save
from reftserve.server.base.kernel_choice import NoKernels
from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import InterventionRef, SamplingParams, Submit
from reftserve.server.engine.runner import Runner

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "tiny": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    },
}
WAYS: dict[str, dict[str, bool]] = {
    "graphs": {"graphs": True, "in_place": True},
    "no graphs": {"graphs": False, "in_place": True},
    "gathered": {"graphs": False, "in_place": False},
}
BLOCK_SIZE = 32
WARM_UP_STEPS = 4
SPARE_TOKENS = 64  # what the first of a batch may have generated before the last has read its prompt


def make_engine(
    shape: str, device: torch.device, *, sequences: int, tokens: int, graphs: bool, in_place: bool
) -> Engine:
    """An engine with room for `sequences` of `tokens` each."""
    gc.collect()
    torch.cuda.empty_cache()
    config = LlamaConfig(**SHAPES[shape])
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    head_dim = config.hidden_size // config.num_attention_heads
    token_bytes = 2 * 2 * head_dim * config.num_key_value_heads * config.num_hidden_layers
    runner = Runner(
        model,
        kv_cache_bytes=token_bytes * BLOCK_SIZE * sequences * (tokens // BLOCK_SIZE + 2),
        block_size=BLOCK_SIZE,
        bank_bytes=2 << 30 if device.type == "cuda" else 1 << 24,
        kernels=NoKernels(),
        recorded_rows=sequences if graphs else 0,
        in_place=in_place,
    )
    overlap = device.type == "cuda"
    return Engine(runner, max_batch_tokens=8192, max_sequences=sequences, prefix_cache=False, overlap=overlap)


def submit(engine: Engine, count: int, prompt: int, new_tokens: int, refs: list[InterventionRef]) -> None:
    """Queue `count` requests of random tokens, interventions in turn."""
    draw = random.Random(0)  # noqa: S311 - a workload, not a secret
    vocabulary = engine.runner.config.vocab_size
    for index in range(count):
        ids = [draw.randrange(3, vocabulary) for _ in range(prompt)]
        uses = (refs[index % len(refs)],) if refs else ()
        engine.submit(Submit(f"{time.monotonic_ns()}-{index}", ids, SamplingParams(max_tokens=new_tokens), uses))


def decode_speed(engine: Engine, count: int, prompt: int, steps: int) -> float:
    """Tokens a second while all of `count` sequences decode."""
    submit(engine, count, prompt, steps + SPARE_TOKENS, [])
    while engine.stats().running < count or any(s.n_generated < WARM_UP_STEPS for s in engine.scheduler.running):
        engine.step()
    began, generated = time.perf_counter(), engine.stats().generated_tokens
    for _ in range(steps):
        engine.step()  # ends when the host has a step's tokens: nothing else to wait for
    seconds = time.perf_counter() - began
    figure = (engine.stats().generated_tokens - generated) / seconds
    while engine.has_work:
        engine.step()
    return figure


def interventions(folder: Path, shape: str, count: int, positions: str) -> list[InterventionRef]:
    """Different untrained interventions of rank 8 in all layers."""
    fields = SHAPES[shape]
    layers = fields["num_hidden_layers"]
    base = BaseFingerprint(
        architecture="LlamaForCausalLM",
        hidden_size=fields["hidden_size"],
        num_layers=layers,
        vocab_size=fields["vocab_size"],
    )
    config = InterventionConfig("loreft", tuple(range(layers)), positions, 8)
    refs = []
    for seed in range(count):
        target = folder / f"{positions}-{seed}"
        edits = TrainableIntervention(config, base.hidden_size, seed=seed).lower()
        save(target, edits, family="loreft", positions=positions, rank=8, base=base)
        refs.append(InterventionRef(str(target), load_artifact(target).content_hash))
    return refs


def serve_speed(engine: Engine, count: int, prompt: int, new_tokens: int, refs: list[InterventionRef]) -> float:
    """Generated tokens a second over `count` requests queued at once, prompts included; loads are not counted."""
    for ref in refs:
        engine.loader.request(ref)
    while engine.is_loading:
        time.sleep(0.001)
        engine.step()
    began = time.perf_counter()
    submit(engine, count, prompt, new_tokens, refs)
    while engine.has_work:
        engine.step()
    return count * new_tokens / (time.perf_counter() - began)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--shape", choices=SHAPES, default="1B")
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    arguments.add_argument("--prompt", type=int, default=256, help="tokens")
    arguments.add_argument("--steps", type=int, default=64)
    arguments.add_argument("--counts", type=int, nargs="*", default=[0, 1, 8, 64, 256], help="of interventions")
    arguments.add_argument("--positions", nargs="*", default=["f7+l7", "generated"])
    args = arguments.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "torch finds no CUDA device here, so there is nothing to measure; --shape tiny --device cpu only tries"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU: no figures"
    print(f"{name}; torch {torch.__version__}; Llama {args.shape}, bfloat16; prompts of {args.prompt} tokens")
    largest, tokens = max(args.batches), args.prompt + args.steps + SPARE_TOKENS
    for way, fields in WAYS.items():
        engine = make_engine(args.shape, device, sequences=largest, tokens=tokens, **fields)
        for batch in args.batches:
            decode_speed(engine, batch, args.prompt, WARM_UP_STEPS)  # compiles what this size needs
            figure = decode_speed(engine, batch, args.prompt, args.steps)
            step_ms = 1000 * batch / figure
            print(f"{way:10} batch {batch:>4}  {figure:9.0f} tokens/s  {step_ms:7.2f} ms a step", flush=True)
        engine.close()
        del engine
    engine = make_engine(args.shape, device, sequences=largest, tokens=tokens, **WAYS["graphs"])
    with tempfile.TemporaryDirectory() as scratch:
        for positions in args.positions:
            refs = interventions(Path(scratch), args.shape, max(args.counts), positions)
            serve_speed(engine, largest, args.prompt, args.steps, refs[:1])
            for count in args.counts:
                figure = serve_speed(engine, largest, args.prompt, args.steps, refs[:count])
                print(f"{positions:10} K = {count:>4}  {figure:9.0f} tokens/s, {largest} requests", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
