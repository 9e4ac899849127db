"""The history of a training run: complete if short, evenly thinned if long, checked on reading."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from published import make_artifact

from reftserve.interventions import History, ManifestError, load_artifact, load_history, pack, unpack

COLUMNS = {"step": [1, 2], "train_loss": [1.0, None], "learning_rate": [0.1, 0.2], "valid": {"loss": [None, 0.5]}}


def steps(count: int, *, epoch: int) -> list[dict[str, float]]:
    rows = [
        {"step": i, "train_loss": 1 / i, "learning_rate": 0.1, "total_steps": count, "tokens_per_second": 40 / 3}
        for i in range(1, count + 1)
    ]
    for row in rows[epoch - 1 :: epoch]:
        row["valid_loss"] = 2 / row["step"]
    return rows


def test_a_short_run_is_kept_whole_in_six_digits() -> None:
    history = History.of_steps(steps(60, epoch=20))
    assert history.step == list(range(1, 61))
    assert (history.train_loss[2], history.tokens_per_second[2]) == (0.333333, 13.3333)
    assert [i for i, value in zip(history.step, history.valid["loss"], strict=True) if value is not None] == [
        20,
        40,
        60,
    ]


@pytest.mark.parametrize(("count", "epoch"), [(1001, 100), (5000, 500), (100_000, 10), (2000, 1), (3000, 2)])
def test_a_long_run_is_thinned_evenly_and_keeps_its_scores(count: int, epoch: int) -> None:
    history = History.of_steps(steps(count, epoch=epoch))
    assert 450 <= len(history.step) <= 1000
    assert (history.step[0], history.step[-1]) == (1, count)
    assert max(after - before for before, after in pairwise(history.step)) <= count / 499 + 1
    scored = sum(value is not None for value in history.valid["loss"])
    assert scored >= min(count // epoch, 500)
    assert len(history.model_dump_json()) < 60_000


def test_non_finite_numbers_become_unknown() -> None:
    history = History.of_steps([{"step": 1, "train_loss": float("nan"), "learning_rate": 0.1}])
    assert history.train_loss == [None]
    assert History.parse(history.model_dump_json().encode()) == history
    assert History.of_steps([]).step == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": [1]}, "train_loss has 2 values, step has 1"),
        ({"valid": {"loss": [1.0]}}, "loss has 1 values"),
        ({"tokens_per_second": [1.0]}, "tokens_per_second has 1 values"),
        ({"surprise": 1}, "surprise"),
        ({"step": [1, "x"]}, "step.1"),
        ({"train_loss": [1.0, float("inf")]}, "history.json"),
        ({name: [1] * 1001 for name in ("step", "train_loss", "learning_rate")} | {"valid": {}}, "step: .*1000"),
        ({"valid": {str(i): [None, None] for i in range(33)}}, "valid: .*32"),
    ],
)
def test_an_invalid_history_file_is_refused_with_the_reason(change: dict[str, object], words: str) -> None:
    assert History.parse(json.dumps(COLUMNS).encode()).valid == {"loss": [None, 0.5]}
    with pytest.raises(ManifestError, match=words):
        History.parse(json.dumps({**COLUMNS, **change}).encode())


def test_an_artifact_may_have_a_history_or_none(tmp_path: Path) -> None:
    bare = make_artifact(tmp_path / "bare")
    assert load_history(bare) is None
    history = History.of_steps(steps(5, epoch=5))
    folder = make_artifact(tmp_path / "told", history=history)
    assert load_history(folder) == history
    assert load_artifact(folder).content_hash == load_artifact(bare).content_hash
    unpack(pack(folder), tmp_path / "copy")
    assert load_history(tmp_path / "copy") == history
    (folder / "history.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"history\.json: step"):
        unpack(pack(folder), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
