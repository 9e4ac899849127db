"""Our results against pyreft 0.1.0's, from files that `tests/references/make_pyreft_reference.py` makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reftserve.interventions import FAMILIES, Activation, Family, LowRankEdit, PlacedEdit, Positions, attach, compose

REFERENCES = Path(__file__).parents[1] / "references" / "pyreft"
FAMILY_FILE = load_file(REFERENCES / "families.safetensors")
MODEL_FILE = load_file(REFERENCES / "models.safetensors")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
OURS = {"rotate_layer": "rotate", "proj_layer": "projection"}
CASES = sorted({tuple(key.split(".")[:2]) for key in FAMILY_FILE})
SUBTRACTS_PROJECTION = {"loreft", "noreft"}


def our_name(name: str) -> str:
    head, _, rest = name.partition(".")
    return f"{OURS.get(head, head)}.{rest}" if rest else OURS.get(head, head)


def reference(family: str, activation: str) -> dict[str, Tensor]:
    prefix = f"{family}.{activation}."
    return {key.removeprefix(prefix): tensor for key, tensor in FAMILY_FILE.items() if key.startswith(prefix)}


def their_weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return pyreft's weights by our names. Its NodiReFT has a projection bias that the formula never reads."""
    return {our_name(k.removeprefix("weight.")): t for k, t in found.items() if k.startswith("weight.")}


def loaded(family: str, found: dict[str, Tensor]) -> Family:
    weights = their_weights(found)
    if family == "noreft":
        # W1 h + b1 - (W2 h + b2): our single bias is b1 - b2, with the gradient of b1.
        weights["learned_source.bias"] = weights["learned_source.bias"] - weights["projection.bias"]
    rank = next(t for name, t in weights.items() if name.startswith("learned_source")).shape[0]
    ours = FAMILIES[family](found["hidden"].shape[1], rank, dropout=0.5)
    known = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert set(weights) - set(known) == ({"projection.bias"} if family in ("noreft", "nodireft") else set())
    assert set(known) <= set(weights)
    with torch.no_grad():
        for name, tensor in known.items():
            tensor.copy_(weights[name])
    return ours.eval()


def test_the_references_cover_every_family() -> None:
    assert {family for family, _ in CASES} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_pyrefts(family: str) -> None:
    found = reference(family, "linear")
    ours = loaded(family, found)
    hidden = found["hidden"].clone().requires_grad_()
    output = ours(hidden)
    torch.testing.assert_close(output, found["output"], **TOLERANCE)
    (output * found["cotangent"]).sum().backward()
    torch.testing.assert_close(hidden.grad, found["gradient.hidden"], **TOLERANCE)
    for name, parameter in ours.named_parameters():
        theirs = next(
            t for key, t in found.items() if key.startswith("gradient.") and our_name(key[len("gradient.") :]) == name
        )
        torch.testing.assert_close(parameter.grad, theirs, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(ours.lower().apply(found["hidden"]), found["output"], **TOLERANCE)


@pytest.mark.parametrize(("family", "activation"), [case for case in CASES if case[1] != "linear"])
def test_the_outputs_of_an_edit_with_an_activation_equal_pyrefts(family: str, activation: str) -> None:
    # Families train only linear columns; an uploaded edit may have an activation at each column.
    found = reference(family, activation)
    weights = their_weights(found)
    W, b = weights["learned_source.weight"], weights["learned_source.bias"]
    if "projection.weight" in weights:
        U, b2 = weights["projection.weight"], weights["projection.bias"]
    else:
        U, b2 = loaded(family, found).lower().U, torch.zeros_like(b)
    edit = edit_of(W, b, U, Activation[activation.upper()])
    if family in SUBTRACTS_PROJECTION:
        edit = compose([edit, edit_of(-U, -b2, U)])
    torch.testing.assert_close(edit.apply(found["hidden"]), found["output"], **TOLERANCE)


@pytest.mark.parametrize("row", json.loads((REFERENCES / "positions.json").read_text()), ids=str)
def test_positions_equal_pyrefts(row: dict) -> None:  # type: ignore[type-arg]
    positions, n_prompt = Positions.parse(row["positions"]), row["n_prompt"]
    ours = positions.indices(n_prompt, 0, n_prompt).tolist()
    assert ours == [index for index in row["tied"] if index >= 0]
    parts = positions.split()
    if len(parts) == 2:
        for part, theirs in zip(parts, row["untied"], strict=True):
            assert part.indices(n_prompt, 0, n_prompt).tolist() == [index for index in theirs if index >= 0]


def edit_of(A: Tensor, b: Tensor, U: Tensor, activation: Activation = Activation.LINEAR) -> LowRankEdit:
    rank = A.shape[0]
    return LowRankEdit(A, b, U, torch.full((rank,), activation, dtype=torch.int8), torch.ones(rank))


def lowered(found: dict[str, Tensor], *, reads_projection: bool) -> LowRankEdit:
    W, b = found["W"], found["b"]
    U = found["W2"] if "W2" in found else found["Rt"].T.contiguous()
    A = W - U if reads_projection else W
    return edit_of(A, b - found["b2"] if "b2" in found else b, U)


def placed(case: str, positions: str, layers: list[int], *, tied: bool) -> list[PlacedEdit]:
    parts = [Positions.parse(positions)] if tied else Positions.parse(positions).split()
    edits = []
    # pyreft orders all prefixes before all suffixes.
    for index, (part, layer) in enumerate((part, layer) for part in parts for layer in layers):
        prefix = f"{case}.{index}."
        found = {key.removeprefix(prefix): tensor for key, tensor in MODEL_FILE.items() if key.startswith(prefix)}
        edits.append(PlacedEdit(layer, part, lowered(found, reads_projection=case != "last")))
    return edits


@pytest.mark.parametrize(
    ("case", "positions", "layers", "tied"),
    [
        ("tied", "f2+l2", [0, 1], True),
        ("untied", "f3+l3", [0, 1], False),
        ("last", "l1", [1], True),
        ("first", "f3", [0], True),
    ],
)  # the four families: LoReFT, LoReFT, DiReFT, NoReFT
def test_a_whole_model_answers_as_with_pyreft(case: str, positions: str, layers: list[int], *, tied: bool) -> None:
    weights = {k.removeprefix("llama."): t for k, t in MODEL_FILE.items() if k.startswith("llama.")}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    ).eval()
    model.load_state_dict(weights)
    with torch.no_grad(), attach(model, placed(case, positions, layers, tied=tied), MODEL_FILE["lengths"]):
        logits = model(MODEL_FILE["ids"]).logits
    torch.testing.assert_close(logits, MODEL_FILE[f"{case}.logits"], atol=1e-5, rtol=1e-5)
