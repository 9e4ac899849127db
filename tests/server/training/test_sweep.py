"""A sweep halves its trials by rank, publishes the first, and resumes as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_llama
from training_data import examples, plan
from workspace import Workspace

from reftserve.interventions import NonFiniteError, Positions
from reftserve.server.datasets import Splits
from reftserve.server.training.activation_cache import ActivationCache, Arena
from reftserve.server.training.sweep import Sweep, rungs
from reftserve.server.training.trainer import Trainer
from reftserve.server.training.varlen import VarlenModel

SPLITS = Splits(train=examples(12, 1), validation=examples(4, 2), test=examples(4, 3))
RATES = [1e-6, 0.02, 1e-5, 1e-7, 0.01]


@pytest.fixture(scope="module")
def cache() -> ActivationCache:
    cache = ActivationCache(VarlenModel(tiny_llama().requires_grad_(False)), 1, [Positions.parse("l1")], Arena(1 << 20))
    cache.fill(SPLITS.train + SPLITS.validation)
    return cache


def new_sweep(cache: ActivationCache, rates: list[float] = RATES, **options: int) -> Sweep:
    runs = [plan(positions="l1", tied=True, n_epochs=8, learning_rate=rate) for rate in rates]
    return Sweep([Trainer(cache, SPLITS, run, seed=3) for run in runs], **options)


def run(sweep: Sweep, until: int) -> None:
    while sweep.step < until and not sweep.has_ended:
        sweep.advance()
        if sweep.validates:
            sweep.validate()


@pytest.mark.parametrize(
    ("steps", "trials", "expected"),
    [(32, 8, {4: 4, 8: 2, 16: 1}), (32, 5, {4: 3, 8: 2, 16: 1}), (32, 1, {}), (2, 8, {1: 1})],
)
def test_the_worse_half_is_dropped_after_each_doubling_of_the_steps(
    steps: int, trials: int, expected: dict[int, int]
) -> None:
    assert rungs(steps, trials) == expected


def test_no_trial_is_dropped_before_the_learning_rate_has_risen() -> None:
    assert rungs(150, 16, first=15) == {15: 8, 18: 4, 37: 2, 75: 1}
    assert rungs(150, 64, first=15) == {15: 8, 18: 4, 37: 2, 75: 1}


def test_remaining_steps_count_each_trial_until_it_is_dropped(cache: ActivationCache) -> None:
    sweep, done = new_sweep(cache), 0
    expected = sweep.remaining_steps
    while not sweep.has_ended:
        done += len(sweep.running)
        sweep.advance()
        if sweep.validates:
            sweep.validate()
        assert done + sweep.remaining_steps == expected
    assert expected == 5 * 4 + 3 * 4 + 2 * 8 + 16


def test_the_best_trial_remains_and_the_table_has_the_steps_of_each(cache: ActivationCache) -> None:
    sweep = new_sweep(cache)
    run(sweep, sweep.total_steps)
    assert sweep.has_ended
    assert sweep.leader.plan.learning_rate in (0.02, 0.01)
    table = sweep.table
    assert sorted(row["trial"] for row in table) == [0, 1, 2, 3, 4]
    assert [row["steps"] for row in table] == [32, 16, 8, 4, 4]
    assert table[0]["trial"] == RATES.index(sweep.leader.plan.learning_rate), "the leader comes first"
    best = {f"valid_{name}" if name != "step" else "best_step": value for name, value in sweep.leader.best.items()}  # type: ignore[union-attr]
    assert best.items() <= table[0].items(), "with the scores that it is ranked by"


def test_a_resumed_sweep_ends_as_an_uninterrupted_one(cache: ActivationCache, tmp_path: Path) -> None:
    whole, first, second = new_sweep(cache), new_sweep(cache), new_sweep(cache)
    run(whole, whole.total_steps)
    run(first, 10)
    first.save(tmp_path)
    second.load(tmp_path)
    assert second.step == 10
    run(second, second.total_steps)
    assert second.table == whole.table
    assert second.choices == whole.choices != []
    for one, other in zip(second.leader.best_edits(), whole.leader.best_edits(), strict=True):
        assert one.edit.content_hash == other.edit.content_hash


def make_infinite(trainer: Trainer) -> None:
    for parameter in trainer.intervention.parameters():
        parameter.data.fill_(float("nan"))


def test_a_diverged_trial_is_dropped_and_does_not_change_the_others(cache: ActivationCache) -> None:
    sweep, others = new_sweep(cache, [0.02, 0.01]), new_sweep(cache, [0.01])
    sweep.advance()
    make_infinite(sweep.running[0].trainer)
    run(sweep, sweep.total_steps)
    run(others, others.total_steps)
    assert [(row["trial"], row.get("diverged", False)) for row in sweep.table] == [(1, False), (0, True)]
    assert sweep.leader.best == pytest.approx(others.leader.best, rel=1e-4)


def test_the_best_weights_of_a_diverged_trial_may_still_win(cache: ActivationCache, tmp_path: Path) -> None:
    sweep, same = new_sweep(cache, [0.02, 1e-7]), new_sweep(cache, [0.02, 1e-7])
    run(sweep, sweep.steps_per_epoch)
    best = dict(sweep.leader.best or {})
    make_infinite(sweep.leader)
    sweep.advance()
    assert [trial.number for trial in sweep.running] == [1], "it takes no more steps"
    sweep.save(tmp_path)
    same.load(tmp_path)
    for each in (sweep, same):
        run(each, each.total_steps)
        assert (each.leader.best, each.diverged) == (best, True)
        assert each.table[0]["diverged"] is True
        assert all(placed.edit.U.isfinite().all() for placed in each.leader.best_edits())


def test_a_diverged_trial_does_not_displace_a_running_one(cache: ActivationCache) -> None:
    sweep = new_sweep(cache, [0.02, 0.01, 0.005, 1e-7])
    run(sweep, sweep.steps_per_epoch)
    ruined = min(sweep.running, key=lambda trial: trial.best_loss)
    make_infinite(ruined.trainer)
    run(sweep, sweep.total_steps // 4)
    assert ruined.diverged
    assert len(sweep.running) == 2, "half of four go on beside it"
    run(sweep, sweep.total_steps)
    assert sweep.step == sweep.total_steps


def test_a_non_finite_loss_is_never_the_best(cache: ActivationCache) -> None:
    sweep = new_sweep(cache, [0.02])
    for parameter in sweep.leader.intervention.parameters():
        parameter.data.mul_(1e30)
    with pytest.raises(NonFiniteError):
        sweep.validate()
    assert sweep.leader.best is None


def test_a_diverging_run_ends_with_its_best_earlier_weights(cache: ActivationCache) -> None:
    sweep = new_sweep(cache, [0.02])
    run(sweep, sweep.steps_per_epoch)
    make_infinite(sweep.leader)
    run(sweep, sweep.total_steps)
    assert (sweep.has_ended, sweep.diverged, (sweep.leader.best or {})["step"]) == (True, True, sweep.steps_per_epoch)


def test_a_sweep_fails_when_its_last_trial_diverged(cache: ActivationCache) -> None:
    sweep = new_sweep(cache, [0.02, 0.01])
    for trial in sweep.running:
        make_infinite(trial.trainer)
    with pytest.raises(NonFiniteError, match="finite"):
        sweep.validate()


def test_a_run_without_improvement_ends_early(cache: ActivationCache) -> None:
    sweep = new_sweep(cache, [1.0], patience=2)
    run(sweep, sweep.total_steps)
    assert sweep.has_ended
    assert sweep.step == sweep.leader.lowest_step + 2 * sweep.steps_per_epoch < sweep.total_steps


def test_a_sweep_is_one_job_with_its_table_in_the_provenance(tiny_llama_folder: Path, tmp_path: Path) -> None:
    workspace = Workspace(tiny_llama_folder, tmp_path)
    job_id = workspace.create(
        sweep={"layers": [[1], "all"], "positions": ["l1", "f1+l1"], "learning_rate": [1e-6, 1e-2]}
    )
    workspace.worker().work()
    assert workspace.job(job_id).status == "succeeded"
    manifest = workspace.first_version("tone").manifest
    table = manifest["provenance"]["sweep"]
    assert len(table) == 8
    best = table[0]
    assert best["steps"] == max(row["steps"] for row in table)
    assert (manifest["layers"], manifest["positions"]) == (best["layers"], best["positions"])
    assert manifest["provenance"]["hyperparameters"]["learning_rate"] == best["learning_rate"]
    shown = workspace.job(job_id).plan
    published = {name: value for name, value in shown.items() if name != "choices"} | {"sweep": []}
    assert published == manifest["provenance"]["hyperparameters"], "the job shows what was published"
    assert len(shown["sweep"]) == 8


def test_a_trial_with_a_non_finite_loss_never_leads(cache: ActivationCache) -> None:
    sweep = new_sweep(cache, [0.01, 0.02])
    run(sweep, sweep.steps_per_epoch)
    sweep.running[0].trainer.best = {"loss": float("nan"), "step": 1}
    assert sweep.leader is sweep.running[1].trainer


def with_losses(sweep: Sweep, *losses: list[float]) -> Sweep:
    for trial, each in zip(sweep.running, losses, strict=True):
        trial.trainer.best = {"loss": sum(each), "loss_stderr": 0.0, "step": 1}
        trial.trainer.lowest_losses = each
    return sweep


@pytest.mark.parametrize(
    ("losses", "leads"),
    [([0.9, 1.1, 1.0, 0.9], False), ([0.7, 0.6, 0.7, 0.8], True), ([1.5, 1.4, 1.6, 1.5], False)],
)
def test_a_prefix_trial_leads_only_if_it_is_better_by_more_than_the_error(losses: list[float], leads: bool) -> None:
    packed = VarlenModel(tiny_llama().requires_grad_(False))
    trials = []
    for positions in ("f1+l1", "l1"):
        cache = ActivationCache(packed, 1, [Positions.parse(positions)], Arena(1 << 20))
        trials.append(Trainer(cache, SPLITS, plan(positions=positions, tied=True), seed=3))
    sweep = with_losses(Sweep(trials), losses, [1.0, 1.0, 1.0, 1.0])
    assert (sweep.leader is trials[0]) is leads


def ranked_sweep(cache: ActivationCache, ranks: list[int]) -> Sweep:
    runs = [plan(positions="l1", tied=True, n_epochs=8, rank=rank, dropout=0.0) for rank in ranks]
    return Sweep([Trainer(cache, SPLITS, run, seed=3) for run in runs])


def test_halving_trials_of_equal_loss_keeps_the_cheapest_under_any_rounding(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rounding in (-1e-4, 1e-4):
        sweep = ranked_sweep(cache, [4, 1, 2, 3])
        while sweep.step < sweep.total_steps // 4:
            sweep.advance()
        found = ([1.0 + rounding, 1.2, 0.8, 1.0], [1.2, 1.0, 1.0, 0.8], [0.9, 1.1, 1.1, 0.9], [3.0, 3.1, 2.9, 3.0])
        with_losses(sweep, *found)
        monkeypatch.setattr(Trainer, "validate", lambda trainer: trainer.best)
        sweep.validate()
        assert [trial.number for trial in sweep.running] == [1, 2], "the clearly worse goes first, then the dearest"
        choice = sweep.choices[0]
        assert (choice.ranked, choice.kept, choice.chosen) == ([1, 2, 0, 3], 2, 1)


def test_a_checkpoint_without_lowest_losses_is_rescored_with_its_best_weights(
    cache: ActivationCache, tmp_path: Path
) -> None:
    saved, loaded = new_sweep(cache, [0.02]), new_sweep(cache, [0.02])
    run(saved, 2 * saved.steps_per_epoch)
    saved.save(tmp_path)
    meta = json.loads((tmp_path / "trial-0.json").read_text())
    (tmp_path / "trial-0.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "lowest_losses"}))
    loaded.load(tmp_path)
    best = saved.leader.score(SPLITS.validation, saved.leader.best_edits()).losses
    assert loaded.leader.lowest_losses == pytest.approx(best, rel=1e-5)
    assert len(loaded.leader.lowest_losses) == len(SPLITS.validation)


def test_the_choice_of_a_sweep_is_in_the_jobs_plan_and_the_provenance(tiny_llama_folder: Path, tmp_path: Path) -> None:
    workspace = Workspace(tiny_llama_folder, tmp_path)
    job_id = workspace.create(sweep={"rank": [1, 2, 4, 8]})
    workspace.worker().work()
    choices = workspace.job(job_id).plan["choices"]
    assert [choice["kept"] for choice in choices] == [2, 1], "one for each halving"
    last, table = choices[-1], workspace.first_version("tone").manifest["provenance"]
    assert last["chosen"] == table["sweep"][0]["trial"]
    assert table["choices"] == choices
    assert last["reason"].startswith(("trial", "the validation loss of trial", "there is one validation example"))
