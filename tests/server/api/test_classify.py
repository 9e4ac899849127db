"""/v1/classify scores label sets by log-likelihood, checked against a plain forward pass of each label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from api_data import BASE
from label_oracle import LabelOracle, download
from running_server import RunningServer

TOLERANCE = 2e-3
LABELS = ["yes", "no", "no way", "the quick brown fox jumps"]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "is the dog lazy?"}]
MANY = [{"role": "user", "content": "a"}] * 256
THOUSAND = [f"label {number}" for number in range(1000)]
LONG = "the lazy dog jumps over the quick brown fox " * 3


@pytest.fixture(scope="module")
def oracle(tiny_llama_folder: Path) -> LabelOracle:
    return LabelOracle(tiny_llama_folder)


def classify(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/classify", json={"model": BASE, "labels": LABELS, **fields})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_a_text_is_classified_by_the_likelihood_of_each_label(http: httpx.Client, oracle: LabelOracle) -> None:
    answer = classify(http, input=LONG)
    expected = [oracle.text(LONG, label) for label in LABELS]
    (item,) = answer["data"]
    assert item["logprobs"] == pytest.approx(expected, abs=TOLERANCE)
    assert item["probs"] == pytest.approx(torch.tensor(expected).softmax(0).tolist(), abs=TOLERANCE)
    assert item["label"] == LABELS[expected.index(max(expected))]
    assert (item["index"], item["num_classes"]) == (0, 4)
    assert (answer["object"], answer["model"]) == ("list", BASE)


def test_a_conversation_is_classified_as_serving_renders_it(http: httpx.Client, oracle: LabelOracle) -> None:
    (item,) = classify(http, messages=MESSAGES)["data"]
    assert item["logprobs"] == pytest.approx([oracle.chat(MESSAGES, label) for label in LABELS], abs=TOLERANCE)


def test_interventions_are_named_as_in_chat_and_edit_the_prompt_alone(
    http: httpx.Client, oracle: LabelOracle, trained: str, tmp_path: Path
) -> None:
    intervention = download(http, trained, tmp_path)
    named = classify(http, messages=MESSAGES, model=trained)["data"][0]["logprobs"]
    scaled = classify(http, messages=MESSAGES, interventions=[{"name": "greeter", "version": 1, "scale": 0.5}])
    plain = classify(http, messages=MESSAGES)["data"][0]["logprobs"]
    for found, uses in ((named, [(intervention, 1.0)]), (scaled["data"][0]["logprobs"], [(intervention, 0.5)])):
        expected = [oracle.chat(MESSAGES, label, *uses) for label in LABELS]
        assert found == pytest.approx(expected, abs=TOLERANCE)
        assert found != pytest.approx(plain, abs=TOLERANCE)


def test_many_inputs_are_answered_in_their_order(http: httpx.Client, oracle: LabelOracle) -> None:
    texts = [f"the fox {number} is" for number in range(20)]
    answer = classify(http, input=texts)
    assert [item["index"] for item in answer["data"]] == list(range(20))
    for text, item in zip(texts, answer["data"], strict=True):
        assert item["logprobs"] == pytest.approx([oracle.text(text, label) for label in LABELS], abs=TOLERANCE)
    chats = classify(http, messages=[MESSAGES, MESSAGES[1:]])["data"]
    assert chats[1]["logprobs"] == pytest.approx([oracle.chat(MESSAGES[1:], label) for label in LABELS], abs=TOLERANCE)


def test_normalized_labels_compare_by_their_mean_token(http: httpx.Client) -> None:
    (item,) = classify(http, input=LONG, normalize="tokens")["data"]
    means = torch.tensor(item["logprobs"]) / torch.tensor(item["tokens"])
    assert item["probs"] == pytest.approx(means.softmax(0).tolist(), abs=1e-6)


def test_the_prompt_is_computed_once_for_all_labels(http: httpx.Client, server: RunningServer) -> None:
    before = server.metric("reftserve_engine_prompt_tokens_total")
    usage = classify(http, input=LONG, labels=[f"label {n}" for n in range(300)], cache_salt="once")["usage"]
    computed = server.metric("reftserve_engine_prompt_tokens_total") - before
    assert computed == usage["prompt_tokens"]
    assert usage["completion_tokens"] > 300 * 2
    again = classify(http, input=LONG, cache_salt="once")["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert again == (usage["prompt_tokens"] - 1) // 32 * 32


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": "a", "messages": MESSAGES}, "input", "either input or messages"),
        ({}, "input", "either input or messages"),
        ({"input": "a", "labels": ["one"]}, "labels", "at least 2"),
        ({"input": "a", "labels": ["one", ""]}, "labels.1", "at least 1 character"),
        ({"input": "a", "labels": ["one", "two", "one"]}, "labels", "'one' is given twice"),
        ({"input": ["a", ""]}, "input", "input 1 has no tokens"),
        ({"input": ["a"] * 257}, "input", "at most 256"),
        ({"input": "fox " * 600}, "input", "at most 512"),
        ({"messages": [MANY] * 8, "labels": THOUSAND}, "messages", "64 for each message included"),
        ({"input": "a", "model": "nothing-like-it"}, "model", "no intervention 'nothing-like-it'"),
        ({"input": "a", "temperature": 1}, "temperature", "unknown field"),
    ],
)
def test_an_invalid_request_is_refused_with_the_reason(
    http: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    response = http.post("/v1/classify", json={"model": BASE, "labels": LABELS, **fields})
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
