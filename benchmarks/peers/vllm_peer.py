"""Run vLLM on one workload, in its environment: `vllm_peer.py WORKLOAD.json [--loras]`."""

import json
import sys
import time

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    loras = "--loras" in sys.argv
    lora_fields = {"enable_lora": True, "max_loras": len(job["loras"]), "max_lora_rank": 8} if loras else {}
    model = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=len(job["prompts"]),
        enable_prefix_caching=False,
        **lora_fields,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
    requests = [LoRARequest(f"lora{i}", i + 1, path) for i, path in enumerate(job["loras"])] if loras else None
    for _ in range(job["runs"] + 1):
        began = time.perf_counter()
        outputs = model.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == job["new_tokens"] for output in outputs)
        print("RESULT", len(prompts) * job["new_tokens"] / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
