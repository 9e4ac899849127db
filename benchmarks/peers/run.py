"""Compare ours with the peers, in environments of `peers/setup.sh`: `python benchmarks/peers/run.py --runs 5`. Each
process warms up with one run. Hugging Face runs first and last, which shows the machine's drift.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import throughput
import workload as w

from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import SamplingParams, Submit

PEERS = w.ROOT / ".peers"
HERE = Path(__file__).parent
LORA_RANK = 8
SIZES = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)}
MLP_SIZES = {"gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576)}


def save_loras(folder: Path, count: int) -> list[str]:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(w.MODEL),
        "r": LORA_RANK,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [*SIZES, *MLP_SIZES],
    }
    paths = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(30):
            for block, sizes in (("self_attn", SIZES), ("mlp", MLP_SIZES)):
                for name, (n_in, n_out) in sizes.items():
                    key = f"base_model.model.model.layers.{layer}.{block}.{name}"
                    tensors[f"{key}.lora_A.weight"] = torch.randn(LORA_RANK, n_in, generator=draw) * 0.01
                    tensors[f"{key}.lora_B.weight"] = torch.randn(n_out, LORA_RANK, generator=draw) * 0.01
        target = folder / f"lora-{seed}"
        target.mkdir()
        (target / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, target / "adapter_model.safetensors")
        paths.append(str(target))
    return paths


def peer(name: str, command: list[str], **environment: str) -> float:
    """Return the median of a process's RESULT lines without the first; its other output goes to .peers/<name>.log."""
    with (PEERS / f"{name}.log").open("w") as log:
        done = subprocess.run(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=log, text=True, check=False
        )
    results = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or len(results) < 2:
        raise SystemExit(f"{name} failed with code {done.returncode}: see .peers/{name}.log")
    return statistics.median(results[1:])


def vllm(name: str, workload: Path, *flags: str) -> float:
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "LD_PRELOAD": str(PEERS / "vllm" / "lib" / "libiomp5.so"),
        "HF_HUB_OFFLINE": "1",
    }
    return peer(
        name, [str(PEERS / "vllm/bin/python"), str(HERE / "vllm_peer.py"), str(workload), *flags], **environment
    )


def llama_cpp(file: str, batch: int, prompt: int, new: int, runs: int) -> tuple[float, float]:
    binaries = PEERS / "llama.cpp" / "build" / "bin"
    shape = ["-npp", str(prompt), "-ntg", str(new), "-npl", ",".join([str(batch)] * (runs + 1))]
    command = [str(binaries / "llama-batched-bench"), "-m", str(PEERS / "llama.cpp" / file), "-c", "8192", "-t", "2"]
    done = subprocess.run(
        [*command, *shape, "--output-format", "jsonl"],
        env={**os.environ, "LD_LIBRARY_PATH": str(binaries)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")][1:]
    total = statistics.median(row["pl"] * row["tg"] / (row["t_pp"] + row["t_tg"]) for row in rows)
    return total, statistics.median(row["pl"] * row["tg"] / row["t_tg"] for row in rows)


def decode_alone(engine: Engine, prompt: list[int], new: int) -> float:
    engine.submit(Submit(f"{time.perf_counter()}", prompt, SamplingParams(max_tokens=new + 1)))
    while not engine.step().outputs:
        pass
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    return new / (time.perf_counter() - began)


def compare_batch_1(prompt: list[int], new: int, rounds: int) -> None:
    """Compare decoding of one request, ours and llama.cpp in turns, so that the machine's drift affects both."""
    for quantization, file in (("none", "f32.gguf"), ("int8", "q8_0.gguf")):
        engine = w.make_engine(prefix_cache=False, quantization=quantization)
        pairs = []
        for _ in range(rounds):
            ours = w.medians({"": functools.partial(decode_alone, engine, prompt, new)}, 3)[""]
            pairs.append((ours, llama_cpp(file, 1, len(prompt), new, 3)[1]))
        engine.close()
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(ours / peer for ours, peer in pairs)
        print(f"batch 1, decode, {quantization} / {file}: {mine:.1f} and {theirs:.1f} tokens/s, ratio {ratio:.2f}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--batch-1", action="store_true", help="decoding of one request beside llama.cpp, no more")
    arguments.add_argument("--requests", type=int, default=32)
    args = arguments.parse_args()
    runs, new = args.runs, throughput.NEW_TOKENS
    torch.set_num_threads(2)
    prompts = w.prompts(args.requests, 59, 72)
    if args.batch_1:
        compare_batch_1(prompts[0], new, runs)
        return
    figures: dict[str, float] = {}

    def show(name: str, figure: float) -> None:
        figures[name] = figure
        print(f"{name:45} {figure:8.1f} tokens/s", flush=True)

    def measure(name: str, variant: Callable[[], float]) -> None:
        show(name, w.medians({name: variant}, runs)[name])

    print(f"{args.requests} requests of 59 to 72 tokens, {new} new ones; {w.machine()}; medians of {runs}")
    with tempfile.TemporaryDirectory() as scratch:
        hugging_face = throughput.hugging_face(prompts)
        measure("Hugging Face generate", hugging_face)
        mixed = w.interventions(Path(scratch), args.requests, positions="f7+l7", rank=4, layers=throughput.ALL_LAYERS)
        for name, quantization in (("float32", "none"), ("int8", "int8")):
            engine = w.make_engine(prefix_cache=False, quantization=quantization)
            measure(f"ours {name}", functools.partial(w.serve, engine, prompts, new, []))
            measure(f"ours {name}, mixed interventions", functools.partial(w.serve, engine, prompts, new, mixed))
            measure(f"ours {name}, batch 1, decode", functools.partial(decode_alone, engine, prompts[0], new))
            engine.close()
        workload = Path(scratch) / "workload.json"
        job = {"model": str(w.MODEL), "prompts": prompts, "new_tokens": new, "runs": runs}
        workload.write_text(json.dumps({**job, "loras": save_loras(Path(scratch), args.requests)}))
        show("vLLM", vllm("vllm", workload))
        show("vLLM, mixed LoRAs", vllm("vllm-loras", workload, "--loras"))
        command = [str(PEERS / "peft/bin/python"), str(HERE / "peft_peer.py"), str(workload)]
        show("PEFT, mixed LoRAs", peer("peft", command, HF_HUB_OFFLINE="1"))
        for name, file in (("F32", "f32.gguf"), ("Q8_0", "q8_0.gguf")):
            show(f"llama.cpp {name}", llama_cpp(file, args.requests, 65, new, runs)[0])
            show(f"llama.cpp {name}, batch 1, decode", llama_cpp(file, 1, 65, new, runs)[1])
        measure("Hugging Face generate, again", hugging_face)
    for ours, theirs in (
        ("ours float32", "Hugging Face generate"),
        ("ours float32", "vLLM"),
        ("ours int8", "llama.cpp Q8_0"),
        ("ours int8, batch 1, decode", "llama.cpp Q8_0, batch 1, decode"),
        ("ours float32, mixed interventions", "ours float32"),
        ("ours float32, mixed interventions", "vLLM, mixed LoRAs"),
        ("ours float32, mixed interventions", "PEFT, mixed LoRAs"),
    ):
        print(f"{ours} / {theirs} = {figures[ours] / figures[theirs]:.2f}")


if __name__ == "__main__":
    main()
