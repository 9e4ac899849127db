"""Our trainer's loss curve equals pyreft 0.1.0's for the same weights, data, order and hyperparameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_data import plan
from transformers import LlamaConfig, LlamaForCausalLM

from reftserve.interventions import Positions
from reftserve.server.datasets import EncodedExample, Splits
from reftserve.server.training.activation_cache import ActivationCache, Arena
from reftserve.server.training.trainer import Trainer
from reftserve.server.training.varlen import VarlenModel

REFERENCE = load_file(Path(__file__).parents[2] / "references" / "pyreft" / "training.safetensors")
CASES = {"last": ([1], "l1", 0.0), "tied": ([0, 1, 2], "f2+l2", 0.1), "all_layers_last": ([0, 1, 2], "l1", 0.1)}
TOLERANCE = 1e-3
BATCH, EPOCHS = 4, 10


def below(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in REFERENCE.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def packed() -> VarlenModel:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(below("llama."))
    return VarlenModel(model.eval().requires_grad_(False))


@pytest.mark.parametrize("case", CASES)
def test_the_losses_of_fifty_steps_equal_those_of_pyrefts_trainer(packed: VarlenModel, case: str) -> None:
    layers, positions, warmup = CASES[case]
    n_prompt = int(REFERENCE["n_prompt"])
    data = [EncodedExample(tuple(row[:n_prompt]), tuple(row[n_prompt:])) for row in REFERENCE["ids"].tolist()]
    run = plan(
        layers=layers,
        positions=positions,
        rank=3,
        tied=True,
        dropout=0.0,
        n_epochs=EPOCHS,
        batch_size=BATCH,
        learning_rate=4e-3,
        warmup_ratio=warmup,
        weight_decay=0.0,
    )
    cache = ActivationCache(packed, min(layers), [Positions.parse(positions)], Arena(1 << 20))
    cache.fill(data)
    trainer = Trainer(cache, Splits(train=data, validation=data, test=data), run, seed=0)
    for number in range(len(layers)):
        state = below(f"{case}.{number}.")
        module = trainer.intervention.families[number]
        known = dict(module.named_parameters()) | dict(module.named_buffers())
        assert set(known) == set(state)
        with torch.no_grad():
            for name, tensor in known.items():
                tensor.copy_(state[name])
    losses = []
    for batch in REFERENCE[f"{case}.batches"].tolist():
        trainer.batch = lambda batch=batch: [data[i] for i in batch]  # type: ignore[method-assign, misc]
        losses.append(trainer.advance().loss)
    expected = REFERENCE[f"{case}.losses"]
    assert len(losses) == len(expected) == 50
    assert expected[-5:].mean() < 0.95 * expected[:5].mean()
    torch.testing.assert_close(torch.tensor(losses), expected, atol=TOLERANCE, rtol=0)
