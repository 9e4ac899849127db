"""Evals through the API: scores equal those of each item alone, and runs are compared."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_data import BASE
from eval_data import chats, created, ended, items, scores, started, upload
from label_oracle import LabelOracle, download
from running_server import RunningServer

from reftserve.server.evaluation.text_metrics import exact_match, f1

TOLERANCE = 2e-3
VOWEL_BEFORE_N = "[aeiou]n"
CRITERIA: list[dict[str, Any]] = [
    {"type": "loss"},
    {"type": "perplexity"},
    {"type": "accuracy"},
    {"type": "exact_match"},
    {"type": "f1"},
    {"type": "contains", "text": "a", "name": "has an a"},
    {"type": "regex", "pattern": VOWEL_BEFORE_N},
]


@pytest.fixture(scope="module")
def oracle(tiny_llama_folder: Path) -> LabelOracle:
    return LabelOracle(tiny_llama_folder)


def greedy(http: httpx.Client, model: str, messages: list[dict[str, str]]) -> str:
    body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
    return str(http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("name", ["base", "intervention"])
def test_scores_equal_those_of_each_item_alone(
    http: httpx.Client, oracle: LabelOracle, trained: str, tmp_path: Path, name: str
) -> None:
    uses = [] if name == "base" else [(download(http, trained, tmp_path), 1.0)]
    model = BASE if name == "base" else trained
    rows = chats(10)
    run = ended(http, started(http, created(http, rows, *CRITERIA), model=model))
    assert run["status"] == "completed", run
    found = items(http, run)
    losses, tokens, right, outputs, matches, overlaps = [], [], [], [], [], []  # type: ignore[var-annotated]
    for row, item in zip(rows, found, strict=True):
        *messages, last = row["messages"]
        answer = last["content"]
        logprobs = {label: oracle.chat(messages, label, *uses) for label in ("no", "yes")}
        outputs.append(greedy(http, model, messages))
        by_name = {result["name"]: result for result in item["results"]}
        losses.append(-logprobs[answer])
        tokens.append(by_name["loss"]["tokens"])
        right.append(logprobs[answer] == max(logprobs.values()))
        matches.append(exact_match(outputs[-1], answer))
        overlaps.append(f1(outputs[-1], answer))
        assert item["sample"]["output"] == outputs[-1]
        assert by_name["loss"]["score"] == pytest.approx(losses[-1] / tokens[-1], abs=TOLERANCE)
        assert by_name["accuracy"]["label"] == max(logprobs, key=logprobs.__getitem__)
    expected = {
        "loss": sum(losses) / sum(tokens),
        "accuracy": sum(right) / 10,
        "exact_match": sum(matches) / 10,
        "f1": sum(overlaps) / 10,
        "has an a": sum("a" in output for output in outputs) / 10,
        "regex": sum(bool(re.search(VOWEL_BEFORE_N, output)) for output in outputs) / 10,
    }
    summary = scores(run)
    for criterion, score in expected.items():
        assert summary[criterion] == pytest.approx(score, abs=TOLERANCE), criterion
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
    assert all(0 < summary[criterion] < 1 for criterion in ("accuracy", "has an a", "regex")), "some of each"


def test_an_answer_equal_to_the_reference_matches(http: httpx.Client) -> None:
    rows = chats(6)
    for row in rows[::2]:
        question, answer = row["messages"]
        answer["content"] = greedy(http, BASE, [question])
    rows[4]["messages"][1]["content"] += "."
    squad = {"type": "exact_match", "normalize": "squad", "name": "squad"}
    run = ended(http, started(http, created(http, rows, {"type": "exact_match"}, squad, {"type": "f1"})))
    by_item = [[result["score"] for result in item["results"]] for item in items(http, run)]
    assert by_item == [[1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert scores(run) == {"exact_match": 1 / 3, "squad": 0.5, "f1": 0.5}


def test_texts_are_scored_as_texts(http: httpx.Client, oracle: LabelOracle) -> None:
    rows = [{"prompt": f"fox {number} is", "completion": " quick" if number % 2 else " lazy"} for number in range(6)]
    run = ended(http, started(http, created(http, rows, {"type": "loss"}, {"type": "accuracy"})))
    for row, item in zip(rows, items(http, run), strict=True):
        loss, accuracy = item["results"]
        expected = {label: oracle.text(row["prompt"], label) for label in (" quick", " lazy")}
        assert loss["score"] * loss["tokens"] == pytest.approx(-expected[row["completion"]], abs=TOLERANCE)
        assert accuracy["label"] == max(expected, key=expected.__getitem__)
        assert item["sample"]["output"] is None


def test_runs_of_an_eval_are_compared(http: httpx.Client, trained: str) -> None:
    eval_id = created(http, chats(6), {"type": "loss"})
    plain = started(http, eval_id)
    named = started(http, eval_id, model=trained)
    half = started(http, eval_id, interventions=[{"name": "greeter", "scale": 0.5}])
    for run in (plain, named, half):
        ended(http, run)
    compared = http.get(f"/v1/evals/{eval_id}").json()
    assert [run["name"] for run in compared["runs"]] == [BASE, "greeter@1", "greeter@1*0.5"]
    assert [run["id"] for run in compared["runs"]] == [plain["id"], named["id"], half["id"]]
    assert len({scores(run)["loss"] for run in compared["runs"]}) == 3
    assert http.get(f"/v1/evals/{eval_id}/runs").json()["data"] == compared["runs"]
    assert http.get("/v1/evals", params={"limit": 1}).json()["data"] == [compared]


def test_a_run_keeps_the_versions_its_names_meant_at_creation(http: httpx.Client, trained: str) -> None:
    run = started(http, created(http, chats(2), {"type": "loss"}), interventions=[{"name": "greeter"}])
    assert run["interventions"] == [{"name": "greeter", "version": 1, "scale": 1.0}]
    assert ended(http, run)["status"] == "completed"


def test_a_failed_item_has_its_reason_and_counts_in_no_score(http: httpx.Client) -> None:
    rows = chats(3)
    rows[1]["messages"][0]["content"] = "fox " * 600
    run = ended(http, started(http, created(http, rows, {"type": "loss"}, {"type": "contains", "text": "never"})))
    assert run["result_counts"] == {"total": 3, "passed": 0, "failed": 2, "errored": 1}
    (item,) = items(http, run, status="error")
    assert item["datasource_item_id"] == 1
    assert "at most 512" in item["sample"]["error"]["message"]
    others = [item["results"][0] for item in items(http, run, status="fail")]
    assert scores(run)["loss"] == pytest.approx(
        sum(each["score"] * each["tokens"] for each in others) / sum(each["tokens"] for each in others)
    )


def test_openais_client_reads_evals_runs_and_items(server: RunningServer, http: httpx.Client) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    source: Any = {"type": "file", "file_id": upload(http, chats(5))}
    made = client.evals.create(name="greetings", data_source_config=source, testing_criteria=[{"type": "contains"}])  # type: ignore[list-item, typeddict-item]
    assert client.evals.retrieve(made.id).name == "greetings"
    data_source: Any = {"type": "completions", "model": BASE, "sampling_params": {"max_completion_tokens": 4}}
    run = client.evals.runs.create(made.id, data_source=data_source, name="plain")
    ended(http, {"eval_id": made.id, "id": run.id, "status": run.status})
    done = client.evals.runs.retrieve(run.id, eval_id=made.id)
    assert (done.status, done.name, done.result_counts.total) == ("completed", "plain", 5)
    first = client.evals.runs.output_items.list(run.id, eval_id=made.id, limit=2)
    assert [item.datasource_item_id for item in first] == [0, 1, 2, 3, 4], "page after page"
    with pytest.raises(openai.ConflictError):
        client.evals.runs.cancel(run.id, eval_id=made.id)
    assert client.evals.runs.delete(run.id, eval_id=made.id).deleted
    assert client.evals.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.evals.retrieve(made.id)


def test_a_cancelled_run_keeps_its_items_and_the_next_run_starts(http: httpx.Client) -> None:
    eval_id = created(http, chats(2000), {"type": "exact_match"})
    run, waiting = started(http, eval_id, max_tokens=64), started(http, eval_id, max_tokens=1)
    canceled = http.post(f"/v1/evals/{eval_id}/runs/{waiting['id']}/cancel").json()
    assert canceled["status"] == "canceled"
    while not items(http, run):
        pass
    http.post(f"/v1/evals/{eval_id}/runs/{run['id']}/cancel")
    after = ended(http, started(http, created(http, chats(2), {"type": "loss"})))
    assert after["status"] == "completed"
    stopped = http.get(f"/v1/evals/{eval_id}/runs/{run['id']}").json()
    assert stopped["status"] == "canceled"
    assert 0 < len(items(http, run, limit=1000)) < 1000
    assert items(http, waiting) == []
    assert http.delete(f"/v1/evals/{eval_id}").json()["deleted"]


@pytest.mark.parametrize(
    ("criteria", "param", "words"),
    [
        ([], "testing_criteria", "at least 1"),
        ([{"type": "best"}], "testing_criteria.0", "'best'"),
        ([{"type": "regex"}], "testing_criteria.0.pattern", "missing"),
        ([{"type": "regex", "pattern": "(a"}], "testing_criteria.0.pattern", "unclosed"),
        ([{"type": "exact_match", "normalize": "tokens"}], "testing_criteria.0.normalize", "'squad'"),
        ([{"type": "f1", "labels": ["a", "b"]}], "testing_criteria.0.labels", "unknown field"),
        ([{"type": "accuracy", "labels": ["a", "b"]}], "testing_criteria.0.labels", "none of the labels"),
    ],
)
def test_an_invalid_eval_is_refused_with_the_reason(
    http: httpx.Client, criteria: list[dict[str, Any]], param: str, words: str
) -> None:
    source = {"type": "file", "file_id": upload(http, chats(2))}
    response = http.post("/v1/evals", json={"data_source_config": source, "testing_criteria": criteria})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_item_pages_continue_after_an_item_of_the_same_run(http: httpx.Client) -> None:
    run = ended(http, started(http, created(http, chats(3), {"type": "loss"})))
    first, second, third = items(http, run)
    assert items(http, run, after=second["id"]) == [third]
    prefix = first["id"].removesuffix("0")
    assert items(http, run, after=f"{prefix}999999999") == []
    path = f"/v1/evals/{run['eval_id']}/runs/{run['id']}/output_items"
    for after in (f"{prefix}{10**21}", f"{prefix}-1", prefix, "outputitem_x_1", first["id"].removeprefix("output"), ""):
        response = http.get(path, params={"after": after})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "after"), after


def test_a_missing_file_model_eval_or_run_is_not_found(http: httpx.Client) -> None:
    eval_id = created(http, chats(2), {"type": "loss"})
    source = {"type": "file", "file_id": "file-none"}
    missing = http.post("/v1/evals", json={"data_source_config": source, "testing_criteria": [{"type": "loss"}]})
    assert missing.json()["error"]["param"] == "data_source_config.file_id"
    unknown = http.post(f"/v1/evals/{eval_id}/runs", json={"data_source": {"model": "nothing-like-it"}})
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert http.get("/v1/evals/eval_none").status_code == 404
    assert http.get(f"/v1/evals/{eval_id}/runs/evalrun_none").status_code == 404
    assert http.get(f"/v1/evals/{eval_id}/runs/evalrun_none/output_items").status_code == 404
