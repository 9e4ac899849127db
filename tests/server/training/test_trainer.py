"""The trainer: learns, resumes exactly, never touches the base, scores what greedy decoding would do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM

from reftserve.interventions import attach, model_checksum
from reftserve.server.training.data import EncodedExample, Splits
from reftserve.server.training.evaluation import collate, completion_loss, forward
from reftserve.server.training.recipe import Plan
from reftserve.server.training.trainer import Trainer


def plan(**changes: object) -> Plan:
    fields = {
        "family": "loreft",
        "layers": [1, 2],
        "positions": "f2+l2",
        "rank": 2,
        "dropout": 0.1,
        "tied": False,
        "n_epochs": 4,
        "batch_size": 3,
        "learning_rate": 0.01,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_length": 64,
    }
    return Plan.model_validate({**fields, **changes})


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama().requires_grad_(False)


def examples(count: int, seed: int) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())

    return [EncodedExample(draw(2, 12), (7 + i % 2, 2)) for i in range(count)]


SPLITS = Splits(train=examples(11, 1), validation=examples(4, 2), test=examples(4, 3))


def train(trainer: Trainer, until: int) -> None:
    while trainer.step < until:
        trainer.advance()
        if trainer.ends_epoch:
            trainer.validate()


def test_training_lowers_the_loss_and_never_touches_the_base(model: LlamaForCausalLM) -> None:
    before = model_checksum(model)
    trainer = Trainer(model, SPLITS, plan(dropout=0.0, n_epochs=30), seed=0)
    base = trainer.evaluate(SPLITS.train, [])
    train(trainer, trainer.total_steps)
    assert trainer.evaluate(SPLITS.train, trainer.intervention.lower())["loss"] < 0.5 * base["loss"]
    assert model_checksum(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_resumed_from_a_checkpoint_ends_bit_for_bit_as_one_that_was_not(
    model: LlamaForCausalLM, tmp_path: Path, stop: int
) -> None:
    whole = Trainer(model, SPLITS, plan(), seed=4)
    train(whole, whole.total_steps)
    first = Trainer(model, SPLITS, plan(), seed=4)
    train(first, stop)
    first.save(tmp_path)
    second = Trainer(model, SPLITS, plan(), seed=4)
    second.load(tmp_path)
    assert second.step == stop
    train(second, second.total_steps)
    assert second.best == whole.best
    assert second.trained_tokens == whole.trained_tokens
    for one, other in zip(second.best_edits(), whole.best_edits(), strict=True):
        assert one.edit.content_hash == other.edit.content_hash


def test_weight_decay_leaves_the_orthonormal_matrix_orthonormal(model: LlamaForCausalLM) -> None:
    trainer = Trainer(model, SPLITS, plan(weight_decay=0.5), seed=0)
    train(trainer, 5)
    for placed in trainer.intervention.lower():
        torch.testing.assert_close(placed.edit.U @ placed.edit.U.T, torch.eye(2), atol=1e-5, rtol=0)


def test_every_example_is_seen_once_an_epoch_whatever_the_seed(model: LlamaForCausalLM) -> None:
    for seed in range(5):
        trainer = Trainer(model, SPLITS, plan(), seed=seed)
        batches = trainer._epoch_batches(seed)
        assert sorted(i for batch in batches for i in batch) == list(range(11))
        assert len(batches) == trainer.steps_per_epoch


def test_the_loss_of_a_padded_batch_is_that_of_its_rows(model: LlamaForCausalLM) -> None:
    trainer = Trainer(model, SPLITS, plan(dropout=0.0), seed=0)
    device = torch.device("cpu")
    batch = collate(SPLITS.train, device)
    with torch.no_grad(), attach(model, trainer.intervention, batch.n_prompt):
        together = completion_loss(forward(model, batch), batch.labels)
    alone = []
    for example in SPLITS.train:
        single = collate([example], device)
        with torch.no_grad(), attach(model, trainer.intervention, single.n_prompt):
            alone.append(completion_loss(forward(model, single), single.labels))
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)


def test_exact_match_counts_examples_that_greedy_decoding_answers_word_for_word(model: LlamaForCausalLM) -> None:
    prompt = SPLITS.test[0].prompt_ids
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=-1)
    greedy = tuple(ids[0, len(prompt) :].tolist())
    trainer = Trainer(model, SPLITS, plan(), seed=0)
    wrong = (*greedy[:2], (greedy[2] + 1) % 300)
    score = trainer.evaluate([EncodedExample(prompt, greedy), EncodedExample(prompt, wrong)], [])
    assert score["exact_match"] == 0.5
    assert score["token_accuracy"] == pytest.approx(5 / 6)


def test_the_learning_rate_warms_up_and_then_decays_to_nothing(model: LlamaForCausalLM) -> None:
    trainer = Trainer(model, SPLITS, plan(n_epochs=5, warmup_ratio=0.2), seed=0)
    rates = [trainer.advance().learning_rate for _ in range(trainer.total_steps)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.01)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.002
