"""Classification and evals with the Python client and the command line, against a running server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_data import BASE, chat_lines
from running_server import RunningServer

from reftserve.client import AsyncClient, BadRequest, Client, EvalRunEnded
from reftserve.client.schemas import ChatMessage

REFTSERVE = Path(sys.executable).parent / "reftserve"
LABELS = ["yes", "no"]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.url, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "set.jsonl"
    file.write_bytes(chat_lines(12))
    return file


def test_texts_and_conversations_are_classified(client: Client, trained: str) -> None:
    turns = [{"role": "user", "content": "say yes 1"}]
    typed = [ChatMessage(role="user", content="say yes 1")]
    one = client.classify("is it? ", labels=LABELS)
    assert one.model == BASE
    assert one.label == one.data[0].label == LABELS[one.data[0].probs.index(max(one.data[0].probs))]
    assert len(client.classify(["a", "b", "c"], labels=LABELS, normalize="tokens").data) == 3
    named = client.classify(messages=turns, labels=LABELS, model=trained).data[0].logprobs
    composed = client.classify(messages=typed, labels=LABELS, interventions=[trained])
    assert composed.data[0].logprobs == pytest.approx(named, abs=1e-3)
    assert len(client.classify(messages=[turns, turns], labels=LABELS).data) == 2
    with pytest.raises(BadRequest, match="either input or messages"):
        client.classify(labels=LABELS)


def test_base_and_interventions_are_compared(client: Client, trained: str, data: Path) -> None:
    made = client.evals.create(data, ["loss", {"type": "contains", "text": "a"}], name="greetings")
    runs = [
        client.evals.run(made.id),
        client.evals.run(made.id, model=trained, name="trained", max_tokens=4),
        client.evals.run(made.id, interventions=[{"name": "greeter", "scale": 0.5}], max_tokens=4),
    ]
    for run in runs:
        assert run.wait(timeout_s=60).status == "completed"
    compared = client.evals.get(made.id)
    assert [run.name for run in compared.runs] == [BASE, "trained", "greeter@1*0.5"]
    assert [run.scores for run in compared.runs] == [run.scores for run in runs]
    assert compared.id in [each.id for each in client.evals.list()]
    items = list(runs[1].items())
    assert [item.datasource_item_id for item in items] == list(range(12))
    assert all(item.sample.output is not None for item in items)
    client.evals.delete_run(made.id, runs[1].id)
    assert len(client.evals.get(made.id).runs) == 2
    assert client.evals.delete(made.id).deleted


def test_waiting_for_a_cancelled_run_raises(client: Client, data: Path) -> None:
    made = client.evals.create(data, ["exact_match"])
    blocking = client.evals.run(made.id, max_tokens=100)
    run = client.evals.run(made.id)
    with pytest.raises(TimeoutError, match="it goes on"):
        run.wait(timeout_s=0, poll_s=0.01)
    assert run.cancel().status == "canceled"
    with pytest.raises(EvalRunEnded, match="was canceled"):
        client.evals.get_run(made.id, run.id).wait()
    blocking.wait()


def test_the_asynchronous_client_does_the_same(server: RunningServer, data: Path) -> None:
    async def talk() -> None:
        async with AsyncClient(server.url, max_retries=0) as client:
            answer = await client.classify("is it? ", labels=LABELS)
            assert answer.label in LABELS
            made = await client.evals.create(data, ["loss"])
            run = await client.evals.run(made.id)
            await run.wait(timeout_s=60)
            assert (await client.evals.get(made.id)).runs[0].scores == run.scores
            assert len([item async for item in run.items()]) == 12
            assert [each.id for each in await client.evals.list(limit=1)] == [made.id]
            await client.evals.delete_run(made.id, (await client.evals.get_run(made.id, run.id)).id)
            await client.evals.delete(made.id)

    asyncio.run(talk())


def evaluated(server: RunningServer, *words: str, code: int = 0) -> str:
    environment = {**os.environ, "REFTSERVE_URL": server.url}
    command = [str(REFTSERVE), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_command_line_prints_base_and_interventions_side_by_side(
    server: RunningServer, trained: str, data: Path
) -> None:
    criteria = ["--criterion", "loss", "--criterion", "accuracy=yes,no", "--criterion", "exact_match=squad"]
    words = [str(data), *criteria, "--intervention", trained, "--intervention", "greeter*0.5", "--max-tokens", "4"]
    lines = evaluated(server, "eval", *words).splitlines()
    assert lines[0].split() == ["RUN", "LOSS", "ACCURACY", "EXACT_MATCH", "ERRORS", "STATUS"]
    assert [line.split()[0] for line in lines[1:]] == [BASE, "greeter@1", "greeter@1*0.5"]
    assert all(line.split()[-1] == "completed" for line in lines[1:])
    shown = json.loads(evaluated(server, "--json", "eval", *words))
    assert [criterion.get("normalize") for criterion in shown["testing_criteria"]] == [None, "none", "squad"]
    assert [f"{run['per_testing_criteria_results'][0]['score']:.4g}" for run in shown["runs"]] == [
        line.split()[1] for line in lines[1:]
    ]


def test_the_command_line_reports_the_error(server: RunningServer, data: Path) -> None:
    assert "takes no argument" in evaluated(server, "eval", str(data), "--criterion", "f1=yes", code=2)
    assert "unclosed group" in evaluated(server, "eval", str(data), "--criterion", "regex=(a", code=1)
