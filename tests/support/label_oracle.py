"""The oracle of label sets: a plain forward pass of prompt and label in transformers."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import httpx
import torch
from engine_oracle import scaled_edits
from transformers import AutoModelForCausalLM, AutoTokenizer

from reftserve.interventions import Intervention, attach, load_artifact


def download(http: httpx.Client, reference: str, folder: Path) -> Intervention:
    name, version = reference.split("@")
    content = http.get(f"/v1/interventions/{name}/versions/{version}/content").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
    return load_artifact(folder)


class LabelOracle:
    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def text(self, prompt: str, label: str, *uses: tuple[Intervention, float]) -> float:
        return self._logprob(self._ids(prompt), [*self._ids(label), self.tokenizer.eos_token_id], uses)

    def chat(self, messages: list[dict[str, str]], label: str, *uses: tuple[Intervention, float]) -> float:
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._logprob(self._ids(prompt), self._ids(f"{label}<|im_end|>"), uses)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _logprob(self, prompt: list[int], label: list[int], uses: tuple[tuple[Intervention, float], ...]) -> float:
        edits = [edit for intervention, scale in uses for edit in scaled_edits(intervention, scale)]
        with torch.no_grad(), attach(self.model, edits, len(prompt)):
            logits = self.model(torch.tensor([prompt + label]), use_cache=False).logits[0]
        rows = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        return float(rows.gather(1, torch.tensor(label).unsqueeze(1)).sum())
