"""Measure int8 against float32: loss on held-out text and greedy agreement: `python benchmarks/int8.py`."""

from __future__ import annotations

import argparse

import torch
import workload as w

from reftserve.server.engine.engine import Engine
from reftserve.server.engine.messages import SamplingParams, Submit

LENGTH = 256


def run(engine: Engine, submits: list[Submit]) -> tuple[dict[str, float], dict[str, list[int]]]:
    losses: dict[str, float] = {}
    tokens: dict[str, list[int]] = {submit.request_id: [] for submit in submits}
    for submit in submits:
        engine.submit(submit)
    while engine.has_work:
        for output in engine.step().outputs:
            if output.prompt_logprobs:
                scores = [entry.logprob for entry in output.prompt_logprobs]
                losses[output.request_id] = -sum(scores) / len(scores)
            tokens[output.request_id] += output.token_ids
    return losses, tokens


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--texts", type=int, default=32)
    arguments.add_argument("--new-tokens", type=int, default=64)
    args = arguments.parse_args()
    torch.set_num_threads(2)
    texts = w.prompts(args.texts, LENGTH, LENGTH, seed=3)
    scored = SamplingParams(max_tokens=0, logprobs=0, prompt_logprobs=True)
    greedy = SamplingParams(max_tokens=args.new_tokens)
    losses, tokens = {}, {}
    for quantization in ("none", "int8"):
        engine = w.make_engine(quantization=quantization)
        found, _ = run(engine, [Submit(str(i), text, scored) for i, text in enumerate(texts)])
        losses[quantization] = sum(found.values()) / len(found)
        # Teacher-forced: a token is right if float32 gives the same one after the same tokens.
        prompts = w.prompts(args.texts, 59, 72)
        if quantization == "none":
            _, tokens = run(engine, [Submit(str(i), prompt, greedy) for i, prompt in enumerate(prompts)])
            same = total = 0
        else:
            one = SamplingParams(max_tokens=1)
            begun = {
                f"{i}-{n}": prompt + tokens[str(i)][:n]
                for i, prompt in enumerate(prompts)
                for n in range(len(tokens[str(i)]))
            }
            _, found_tokens = run(engine, [Submit(name, prompt, one) for name, prompt in begun.items()])
            total = len(begun)
            same = sum(tokens[n.split("-")[0]][int(n.split("-")[1])] == t[0] for n, t in found_tokens.items())
        engine.close()
    change = losses["int8"] / losses["none"] - 1
    print(f"{args.texts} texts of {LENGTH} tokens; {w.machine()}")
    print(f"mean loss: float32 {losses['none']:.4f}, int8 {losses['int8']:.4f}: {change:+.2%}")
    print(f"greedy tokens that agree after the same beginning: {same} of {total}: {same / total:.1%}")


if __name__ == "__main__":
    main()
