"""Train PEFT's LoRA, keep its best epoch, and score it like ours: `peft_score.py JOB.json`. The job names model,
batch_size, epochs, learning_rate, and rows `train`, `validation`, `test` with token `ids`, `n_prompt` of the prompt.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft_train import collate, with_lora
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

IGNORED = -100


@torch.no_grad()
def scores(model, rows, batch_size):
    """Return the answers' loss per token, and the share of answers that greedy decoding gives word for word."""
    model.eval()
    loss = tokens = exact = 0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        counted = labels != IGNORED
        loss += float(cross_entropy(logits[counted], labels[counted], reduction="sum"))
        tokens += int(counted.sum())
        exact += int(((logits.argmax(dim=-1) == labels) | ~counted).all(dim=1).sum())
    return {"loss": loss / tokens, "exact_match": exact / len(rows)}


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = with_lora(job["model"])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=job["epochs"],
            per_device_train_batch_size=job["batch_size"],
            per_device_eval_batch_size=job["batch_size"],
            learning_rate=job["learning_rate"],
            warmup_steps=0.1,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            report_to=[],
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=job["train"],
            eval_dataset=job["validation"],
            data_collator=collate,
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        model.save_pretrained(scratch)
        found = {
            **scores(model, job["test"], job["batch_size"]),
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "bytes": (Path(scratch) / "adapter_model.safetensors").stat().st_size,
            "seconds": seconds,
        }
    print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
