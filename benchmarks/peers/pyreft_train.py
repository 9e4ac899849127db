"""Run pyreft's trainer on the rows of `benchmarks/train.py`, in its environment: `pyreft_train.py JOB.json`."""

import json
import sys
import tempfile
import time
from pathlib import Path

import pyreft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments


def load(folder):
    """Load the base; its config is from a newer transformers than pyreft's."""
    fields = json.loads((folder / "config.json").read_text())
    fields["rope_theta"] = fields.get("rope_parameters", fields)["rope_theta"]
    fields.pop("rope_parameters", None)
    config = LlamaConfig(**{**fields, "torch_dtype": "float32"})
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), model_max_length=2048)
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    return LlamaForCausalLM.from_pretrained(folder, config=config), tokenizer


def train(job, seed=42):
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    model, tokenizer = load(Path(job["model"]))
    layers = job["layers"]
    interventions = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": job["rank"],
            "intervention": pyreft.LoreftIntervention(
                embed_dim=model.config.hidden_size, low_rank_dimension=job["rank"], dtype=torch.float32
            ),
        }
        for layer in layers
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=interventions))
    reft.set_device("cpu")
    texts = job["prompts"], job["completions"]
    if job["positions"] == "l1":
        data = pyreft.make_last_position_supervised_data_module(
            tokenizer, model, *texts, num_interventions=len(layers), nonstop=True
        )
    else:
        data = pyreft.make_multiple_position_supervised_data_module(
            tokenizer, model, *texts, positions=job["positions"], num_interventions=len(layers), nonstop=True
        )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=job["epochs"],
            per_device_train_batch_size=job["batch_size"],
            learning_rate=4e-3,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=seed,
        )
        trainer = pyreft.ReftTrainerForCausalLM(model=reft, tokenizer=tokenizer, args=arguments, **data)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    return reft, seconds


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    _, seconds = train(job)
    print("RESULT", job["epochs"] * len(job["prompts"]) / seconds, transformers.__version__, flush=True)


if __name__ == "__main__":
    main()
