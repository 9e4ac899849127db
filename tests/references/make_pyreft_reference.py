"""Write the parity test's files in `pyreft/` next to this script: values that pyreft 0.1.0 computes.

pyreft pins transformers 4.45.1, so it needs a separate environment: `pip install pyreft==0.1.0 transformers==4.45.1`.

families.safetensors   `<family>.<activation>.<...>`: hidden states, weights, outputs, gradients of sum(output * ct)
models.safetensors     `<case>.<...>`: a two-layer Llama, token ids, logits with interventions at positions
positions.json         `get_intervention_locations` for many notations and lengths
"""

from __future__ import annotations

import json
from pathlib import Path

import pyreft
import torch
from pyreft.dataset import get_intervention_locations
from rotations import begin_alike
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "pyreft"
HIDDEN, RANK, ROWS = 24, 3, 5
ACTIVATIONS = ["linear", "relu", "gelu", "tanh", "sigmoid", "silu"]
FAMILIES = {
    "loreft": (pyreft.LoreftIntervention, ACTIVATIONS),
    "noreft": (pyreft.NoreftIntervention, ACTIVATIONS),
    "direft": (pyreft.DireftIntervention, ACTIVATIONS),
    "nodireft": (pyreft.NodireftIntervention, ACTIVATIONS),
    "consreft": (pyreft.ConsreftIntervention, ["linear"]),
    "lobireft": (pyreft.LobireftIntervention, ["linear"]),
}


def module(family: str, activation: str, hidden: int = HIDDEN, rank: int = RANK) -> torch.nn.Module:
    kind, _ = FAMILIES[family]
    made = kind(
        embed_dim=hidden, low_rank_dimension=rank, dtype=torch.float32, act_fn=activation, add_bias=True, dropout=0.5
    )
    for name, parameter in made.named_parameters():
        # Weights as after some training. The diagonal is left alone: torch's orthogonal parametrisation keeps
        # signs there, and training never changes them.
        if "parametrizations" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


def families() -> dict[str, torch.Tensor]:
    tensors = {}
    for family, (_, activations) in FAMILIES.items():
        for activation in activations:
            made = module(family, activation)
            if hasattr(made, "rotate_layer"):
                base = begin_alike(made.rotate_layer)
                state = dict(made.rotate_layer.named_parameters()) | {"parametrizations.weight.0.base": base}
                kept = {f"rotate_layer.{name}": tensor.detach().clone() for name, tensor in state.items()}
            else:
                kept = {}
            learned = made.learned_source
            if isinstance(learned, torch.nn.Parameter):
                kept["learned_source"] = learned.detach().clone()
            else:
                kept |= {f"learned_source.{name}": p.detach().clone() for name, p in learned.named_parameters()}
            if hasattr(made, "proj_layer"):
                kept |= {f"proj_layer.{name}": p.detach().clone() for name, p in made.proj_layer.named_parameters()}
            hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
            cotangent = torch.randn(ROWS, HIDDEN)
            output = made(hidden)
            (output * cotangent).sum().backward()
            gradients = {f"gradient.{n}": p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
            found = {"hidden": hidden.detach(), "cotangent": cotangent, "output": output.detach()}
            found |= {f"weight.{name}": tensor for name, tensor in kept.items()} | gradients
            found["gradient.hidden"] = hidden.grad
            tensors |= {f"{family}.{activation}.{name}": tensor.contiguous() for name, tensor in found.items()}
    return tensors


CASES = {
    "tied": ("loreft", [0, 1], "f2+l2", True),
    "untied": ("loreft", [0, 1], "f3+l3", False),
    "last": ("direft", [1], "l1", True),
    "first": ("noreft", [0], "f3", True),
}
# Long enough that pyreft pads no position: its data collator shifts padded positions by one token.
LENGTHS = (6, 7, 9)
TOKENS = 11


def models() -> dict[str, torch.Tensor]:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    llama = LlamaForCausalLM(config).eval()
    tensors = {f"llama.{name}": tensor.clone() for name, tensor in llama.state_dict().items()}
    ids = torch.randint(0, 40, (len(LENGTHS), TOKENS))
    tensors["ids"] = ids
    tensors["lengths"] = torch.tensor(LENGTHS)
    for case, (family, layers, positions, tied) in CASES.items():
        places = layers if tied else [*layers, *layers]  # pyreft: all prefixes, then all suffixes
        made = [module(family, "linear") for _ in places]
        representations = [
            {"layer": layer, "component": "block_output", "low_rank_dimension": RANK, "intervention": intervention}
            for layer, intervention in zip(places, made, strict=True)
        ]
        model = pyreft.get_reft_model(llama, pyreft.ReftConfig(representations=representations), set_device=False)
        model.eval()
        logits = []
        for row, length in enumerate(LENGTHS):
            locations = get_intervention_locations(
                last_position=length, positions=positions, num_interventions=len(places), share_weights=tied
            )
            _, output = model(
                {"input_ids": ids[row : row + 1]},
                unit_locations={"sources->base": (None, [[location] for location in locations])},
            )
            logits.append(output.logits[0].detach())
        tensors[f"{case}.logits"] = torch.stack(logits)
        for index, intervention in enumerate(made):
            for name, tensor in effective(intervention).items():
                tensors[f"{case}.{index}.{name}"] = tensor
    return tensors


def effective(made: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {"W": made.learned_source.weight, "b": made.learned_source.bias}
    if hasattr(made, "rotate_layer"):
        found["Rt"] = made.rotate_layer.weight
    else:
        found |= {"W2": made.proj_layer.weight, "b2": made.proj_layer.bias}
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def positions() -> list[dict[str, object]]:
    rows = []
    for notation in ("f1+l1", "f7+l7", "f3+l5", "f0+l1", "l1", "l4", "f4", "f2+l0"):
        for length in (2, 3, 4, 5, 8, 13, 14, 15, 40):
            arguments = {"last_position": length, "positions": notation, "num_interventions": 2}
            tied = get_intervention_locations(**arguments, share_weights=True)
            untied = get_intervention_locations(**arguments, share_weights=False)
            rows.append({"positions": notation, "n_prompt": length, "tied": tied[0], "untied": untied})
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    HERE.mkdir(exist_ok=True)
    save_file(families(), HERE / "families.safetensors")
    save_file(models(), HERE / "models.safetensors")
    (HERE / "positions.json").write_text(json.dumps(positions(), indent=0) + "\n")
