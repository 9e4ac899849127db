"""Run PEFT with a different LoRA for each row of one static batch, in its environment: `peft_peer.py WORKLOAD.json`."""

import json
import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    torch.set_num_threads(2)
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    names = [f"lora{i}" for i in range(len(job["loras"]))]
    model = PeftModel.from_pretrained(base, job["loras"][0], adapter_name=names[0])
    for name, path in zip(names[1:], job["loras"][1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    model.eval()
    prompts, new = job["prompts"], job["new_tokens"]
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    fields = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    for _ in range(job["runs"] + 1):
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=mask, adapter_names=names[: len(prompts)], **fields)
        print("RESULT", len(prompts) * new / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
