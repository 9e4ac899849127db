"""The trainer learns, resumes exactly, never changes the base, and scores greedy decoding."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from training_data import examples, plan

from reftserve.interventions import NonFiniteError, Positions, model_checksum
from reftserve.server.datasets import EncodedExample, Splits
from reftserve.server.training.activation_cache import ActivationCache, Arena
from reftserve.server.training.plan import Plan
from reftserve.server.training.scores import Score
from reftserve.server.training.trainer import Trainer
from reftserve.server.training.varlen import VarlenModel


@pytest.fixture(scope="module")
def model() -> VarlenModel:
    return VarlenModel(tiny_llama().requires_grad_(False))


SPLITS = Splits(train=examples(11, 1), validation=examples(4, 2), test=examples(4, 3))


def new_trainer(model: VarlenModel, plan: Plan, seed: int = 0) -> Trainer:
    cache = ActivationCache(model, min(plan.layers), Positions.parse(plan.positions).split(), Arena(1 << 20))
    cache.fill(SPLITS.train + SPLITS.validation)
    return Trainer(cache, SPLITS, plan, seed=seed)


def train(trainer: Trainer, until: int) -> None:
    while trainer.step < until:
        trainer.advance()
        if trainer.step % trainer.steps_per_epoch == 0:
            trainer.validate()


def test_training_lowers_the_loss_and_never_touches_the_base(model: VarlenModel) -> None:
    before = model_checksum(model.model)
    trainer = new_trainer(model, plan(dropout=0.0, n_epochs=30), seed=0)
    base = trainer.evaluate(SPLITS.train, [])
    train(trainer, trainer.total_steps)
    assert trainer.evaluate(SPLITS.train, trainer.intervention.lower())["loss"] < 0.5 * base["loss"]
    assert model_checksum(model.model) == before
    assert all(parameter.grad is None for parameter in model.model.parameters())


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(model: VarlenModel, tmp_path: Path, stop: int) -> None:
    whole = new_trainer(model, plan(), seed=4)
    train(whole, whole.total_steps)
    first = new_trainer(model, plan(), seed=4)
    train(first, stop)
    first.save(tmp_path)
    second = new_trainer(model, plan(), seed=4)
    second.load(tmp_path)
    assert second.step == stop
    train(second, second.total_steps)
    assert second.best == whole.best
    assert second.trained_tokens == whole.trained_tokens
    for one, other in zip(second.best_edits(), whole.best_edits(), strict=True):
        assert one.edit.content_hash == other.edit.content_hash


class Scored(Trainer):
    def script(self, *scores: tuple[float, float]) -> Scored:
        self.scores = iter(scores)
        return self

    def score(self, *_: object) -> Score:
        return Given(*next(self.scores))


class Given(Score):
    def __init__(self, loss: float, error: float) -> None:
        super().__init__(losses=[loss])
        self.given = {"loss": loss, "loss_stderr": error}

    def means(self) -> dict[str, float]:
        return self.given


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([(0.5, 0.1), (0.4, 0.1), (0.45, 0.1)], 3),  # newer and within the error
        ([(0.5, 0.1), (0.4, 0.01), (0.45, 0.01)], 2),  # clearly worse
        ([(0.4, 0.06), (0.45, 0.06), (0.5, 0.06)], 2),  # within the error of the previous, not of the best
        ([(0.4, 0.0), (0.4, 0.0), (0.41, 0.0)], 2),
    ],
)
def test_the_newest_weights_are_kept_unless_their_loss_is_worse_by_more_than_its_error(
    model: VarlenModel, scores: list[tuple[float, float]], kept: int
) -> None:
    plain = new_trainer(model, plan(), seed=0)
    trainer = Scored(plain.cache, plain.splits, plain.plan, seed=0).script(*scores)
    states = []
    for _ in scores:
        trainer.advance()
        trainer.validate()
        states.append([placed.edit.content_hash for placed in trainer.intervention.lower()])
    assert trainer.best is not None
    assert trainer.best["step"] == kept
    assert trainer.lowest_losses == [min(loss for loss, _ in scores)], "trials are compared by their lowest loss"
    assert [placed.edit.content_hash for placed in trainer.best_edits()] == states[kept - 1]


def test_a_non_finite_loss_leaves_the_best_weights_unchanged(model: VarlenModel) -> None:
    plain = new_trainer(model, plan(), seed=0)
    trainer = Scored(plain.cache, plain.splits, plain.plan, seed=0).script((0.4, 0.1), (math.nan, math.nan))
    best = trainer.validate()
    with pytest.raises(NonFiniteError, match="validation loss"):
        trainer.validate()
    assert trainer.best == {**best, "step": 0}


def test_weight_decay_leaves_the_orthonormal_matrix_orthonormal(model: VarlenModel) -> None:
    trainer = new_trainer(model, plan(weight_decay=0.5), seed=0)
    train(trainer, 5)
    for placed in trainer.intervention.lower():
        torch.testing.assert_close(placed.edit.U @ placed.edit.U.T, torch.eye(2), atol=1e-5, rtol=0)


def test_every_example_is_seen_once_an_epoch_with_any_seed(model: VarlenModel) -> None:
    for seed in range(5):
        trainer = new_trainer(model, plan(), seed=seed)
        batches = trainer._epoch_batches(seed)
        assert sorted(i for batch in batches for i in batch) == list(range(11))
        assert len(batches) == trainer.steps_per_epoch


@pytest.mark.parametrize("positions", ["l1", "f2+l2"])
def test_the_losses_of_a_score_are_in_the_order_of_its_examples(model: VarlenModel, positions: str) -> None:
    trainer = new_trainer(model, plan(positions=positions), seed=0)
    asked = [*examples(9, 5, tail=3), *SPLITS.train[:3]]
    edits = trainer.intervention.lower()
    together = trainer.score(asked, edits)
    assert together.counts == [len(each.completion_ids) for each in asked]
    alone = [trainer.score([each], edits).losses[0] for each in asked]
    assert together.losses == pytest.approx(alone, rel=1e-4)


def test_exact_match_counts_examples_answered_word_for_word_by_greedy_decoding(model: VarlenModel) -> None:
    prompt = SPLITS.test[0].prompt_ids
    ids = tiny_llama().generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=-1)
    greedy = tuple(ids[0, len(prompt) :].tolist())
    trainer = new_trainer(model, plan(), seed=0)
    wrong = (*greedy[:2], (greedy[2] + 1) % 300)
    score = trainer.evaluate([EncodedExample(prompt, greedy), EncodedExample(prompt, wrong)], [])
    assert score["exact_match"] == 0.5
    assert score["token_accuracy"] == pytest.approx(5 / 6)


def test_the_learning_rate_warms_up_and_then_decays_to_zero(model: VarlenModel) -> None:
    trainer = new_trainer(model, plan(n_epochs=5, warmup_ratio=0.2), seed=0)
    rates = [trainer.advance().learning_rate for _ in range(trainer.total_steps)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.01)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.002
