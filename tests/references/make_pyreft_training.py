"""Write `pyreft/training.safetensors` for the parity test: the loss curves of pyreft 0.1.0's trainer. Run it in the
environment of `make_pyreft_reference.py`, with `accelerate<1.0`.

All examples have one length, so nothing is padded (pyreft's data collator shifts padded positions). Positions come
from `get_intervention_locations` with `last_position` = prompt length, as in its `ReftDataset` helpers.

<case>.losses [steps]   <case>.batches [steps, batch]   <case>.<n>.<tensor>: the n-th intervention's initial weights
llama.<tensor>          ids [examples, tokens]          n_prompt [1]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyreft
import torch
from pyreft.dataset import get_intervention_locations
from rotations import begin_alike
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

HERE = Path(__file__).parent / "pyreft"
HIDDEN, RANK, VOCABULARY = 24, 3, 40
EXAMPLES, TOKENS, N_PROMPT, BATCH, EPOCHS = 20, 11, 8, 4, 10
CASES = {"last": ([1], "l1", 0.0), "tied": ([0, 1, 2], "f2+l2", 0.1), "all_layers_last": ([0, 1, 2], "l1", 0.1)}


class Examples(torch.utils.data.Dataset):
    def __init__(self, ids: torch.Tensor, locations: list[list[int]]) -> None:
        self.ids, self.locations = ids, locations

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"index": index, "ids": self.ids[index], "locations": torch.tensor(self.locations)}


def train(llama: LlamaForCausalLM, ids: torch.Tensor, case: str) -> dict[str, torch.Tensor]:
    layers, positions, warmup = CASES[case]
    made = [pyreft.LoreftIntervention(embed_dim=HIDDEN, low_rank_dimension=RANK, dtype=torch.float32) for _ in layers]
    bases = [begin_alike(intervention.rotate_layer) for intervention in made]
    found = {
        f"{case}.{number}.{name}": tensor.detach().clone().contiguous()
        for number, intervention in enumerate(made)
        for name, tensor in [
            *[(f"rotate.{n}", t) for n, t in intervention.rotate_layer.named_parameters()],
            ("rotate.parametrizations.weight.0.base", bases[number]),
            *[(f"learned_source.{n}", t) for n, t in intervention.learned_source.named_parameters()],
        ]
    }
    representations = [
        {"layer": layer, "component": "block_output", "low_rank_dimension": RANK, "intervention": intervention}
        for layer, intervention in zip(layers, made, strict=True)
    ]
    model = pyreft.get_reft_model(llama, pyreft.ReftConfig(representations=representations), set_device=False)
    locations = get_intervention_locations(
        last_position=N_PROMPT, positions=positions, num_interventions=len(layers), share_weights=True
    )
    batches, losses = [], []

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batches.append(torch.tensor([row["index"] for row in rows]))
        input_ids = torch.stack([row["ids"] for row in rows])
        labels = input_ids.clone()
        labels[:, :N_PROMPT] = -100
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": torch.ones_like(input_ids),
            "intervention_locations": torch.stack([row["locations"] for row in rows]),
        }

    class Recorded(pyreft.ReftTrainerForCausalLM):
        def compute_loss(self, *arguments: object, **named: object) -> object:
            result = super().compute_loss(*arguments, **named)
            losses.append((result[0] if isinstance(result, tuple) else result).detach().clone())
            return result

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=4e-3,
            warmup_ratio=warmup,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=0,
        )
        trainer = Recorded(model=model, args=arguments, train_dataset=Examples(ids, locations), data_collator=collate)
        trainer.train()
    steps = len(losses)
    return found | {f"{case}.losses": torch.stack(losses), f"{case}.batches": torch.stack(batches[:steps])}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    llama = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, VOCABULARY, (EXAMPLES, TOKENS))
    ids[:, N_PROMPT:] = ids[:, :1] % 4 + torch.arange(TOKENS - N_PROMPT)  # a learnable pattern
    tensors = {f"llama.{name}": tensor.clone() for name, tensor in llama.state_dict().items()}
    tensors |= {"ids": ids, "n_prompt": torch.tensor([N_PROMPT])}
    for case in CASES:
        tensors |= train(llama, ids, case)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "training.safetensors")


if __name__ == "__main__":
    main()
