"""A user's workflow on the real model: serve, upload, train, generate with and without, over HTTP and the client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running_server import running_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from reftserve.client import Client
from reftserve.interventions import attach, load_artifact

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples"
HELD_OUT = [json.loads(line)["messages"] for line in (EXAMPLES / "sentiment.heldout.jsonl").read_text().splitlines()]
# Enough for a difference; the demo trains on the whole set for all epochs.
TRAINED_ON = 80


@pytest.fixture(scope="module")
def client(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    data = tmp_path_factory.mktemp("real")
    with running_server(smollm2_folder, data) as server, Client(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def sentiment(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    lines = (EXAMPLES / "sentiment.train.jsonl").read_text().splitlines()[:TRAINED_ON]
    path = tmp_path_factory.mktemp("data") / "sentiment.jsonl"
    path.write_text("\n".join(lines))
    job = client.train(path, name="sentiment", seed=0, n_epochs=4).wait(timeout_s=400)
    return job.fine_tuned_model or ""


def answer(client: Client, question: str, model: str | None = None) -> str:
    return client.chat(question, model=model, temperature=0, max_tokens=12).text


def test_the_base_answers_a_question(client: Client) -> None:
    assert "Paris" in client.chat("What is the capital of France?", temperature=0, max_tokens=20).text


def test_an_intervention_trained_from_an_upload_answers_better(client: Client, sentiment: str) -> None:
    asked = [(question["content"], right["content"]) for question, right in HELD_OUT[:16]]
    base = sum(answer(client, question) == right for question, right in asked)
    edited = sum(answer(client, question, sentiment) == right for question, right in asked)
    assert base <= 2
    assert edited >= 10
    scores = client.interventions.version("sentiment").manifest["provenance"]["scores"]
    assert scores["intervention"]["exact_match"] > scores["base"]["exact_match"] + 0.3
    assert scores["intervention"]["loss"] < scores["base"]["loss"]


def test_the_intervention_is_a_thousandth_of_a_percent_and_does_not_affect_other_requests(
    client: Client, sentiment: str
) -> None:
    version = client.interventions.version("sentiment")
    assert version.parameters < 134_515_008 / 1000
    question = HELD_OUT[0][0]["content"]
    before = answer(client, question)
    assert answer(client, question, sentiment) != before
    assert answer(client, question) == before


def test_the_servers_answer_equals_that_of_attach(
    client: Client, sentiment: str, smollm2_folder: Path, tmp_path: Path
) -> None:
    """The reference runs one request at a time, with forward hooks on the plain float32 model."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    edits = load_artifact(client.interventions.download("sentiment", tmp_path / "sentiment")).edits
    questions = [question["content"] for question, _ in HELD_OUT[:3]] + ["Tell me about rivers."]
    for question in questions:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        for model_name, placed in ((None, ()), (sentiment, edits)):
            with torch.no_grad(), attach(model, placed, ids.shape[1]):
                out = model.generate(ids, max_new_tokens=12, do_sample=False)
            expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert answer(client, question, model_name) == expected
