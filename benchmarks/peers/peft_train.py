"""Train PEFT's LoRA with transformers' Trainer on the rows of `benchmarks/train.py`: `peft_train.py JOB.json`."""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def collate(rows):
    width = max(len(row["ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        size = len(row["ids"])
        ids[number, :size] = torch.tensor(row["ids"])
        labels[number, row["n_prompt"] : size] = ids[number, row["n_prompt"] : size]
        mask[number, :size] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def with_lora(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(2)
    model = with_lora(job["model"])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=job["epochs"],
            per_device_train_batch_size=job["batch_size"],
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=job["rows"], data_collator=collate)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    print("RESULT", job["epochs"] * len(job["rows"]) / seconds, flush=True)


if __name__ == "__main__":
    main()
