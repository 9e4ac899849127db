"""Users of a server under attack: they upload, train, pause, resume and chat, and remember what was acknowledged."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from api_data import chat_lines

from reftserve.client import Client
from reftserve.client.exceptions import Conflict, ConnectionFailed, ReftServeError

LIVING_JOBS = 3
PAUSE_S = 0.15
RECIPE = {"layers": [1], "rank": 1, "dropout": 0.1, "n_epochs": 12, "batch_size": 4}
QUESTION = "say yes 1"


@dataclass
class Acknowledged:
    files: dict[str, bytes] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)
    interventions: dict[str, str] = field(default_factory=dict)


class Visitor(threading.Thread):
    """A thread of requests. expected: errors that it may meet; any other ends it as its `failure`."""

    def __init__(self, client: Client, expected: type[ReftServeError]) -> None:
        super().__init__(daemon=True)
        self.failure: Exception | None = None
        self.requests = 0
        self.refused: list[ReftServeError] = []
        self.client = client
        self._expected = expected
        self._gone = threading.Event()

    def run(self) -> None:
        while not self._gone.wait(PAUSE_S):
            self.requests += 1
            try:
                self.act(self.requests)
            except self._expected as cause:
                self.refused.append(cause)
            except Exception as cause:
                self.failure = cause
                return

    def leave(self) -> None:
        self._gone.set()
        self.join()

    def act(self, number: int) -> None:
        raise NotImplementedError


class Chats(Visitor):
    """Asks one question again and again. answer: the right one. answered_at: moments, by time.monotonic."""

    def __init__(self, client: Client, answer: str) -> None:
        super().__init__(client, ReftServeError)
        self.answered_at: list[float] = []
        self.wrong: list[str] = []
        self._answer = answer

    def act(self, number: int) -> None:
        found = ask(self.client)
        self.answered_at.append(time.monotonic())
        if found != self._answer:
            self.wrong.append(f"a chat was answered with {found!r}")


class Users(Visitor):
    """Upload, publish, train, pause and resume."""

    def __init__(
        self,
        client: Client,
        training_file: str,
        artifact: Path,
        expected: type[ReftServeError] = ConnectionFailed,
    ) -> None:
        super().__init__(client, expected)
        self.acknowledged = Acknowledged()
        self._training_file = training_file
        self._artifact = artifact

    def act(self, number: int) -> None:
        if number % 5 == 0:
            self._let_rest_or_go_on()
        elif number % 3 == 0:
            content = chat_lines(10 + number)
            self.acknowledged.files[self.client.files.upload(content).id] = content
        elif number % 3 == 1:
            version = self.client.interventions.upload("uploaded", self._artifact)
            self.acknowledged.interventions[version.id] = version.content_hash
        elif sum(job.finished_at is None for job in self.client.jobs.list(limit=100)) < LIVING_JOBS:
            self.acknowledged.jobs.append(train(self.client, self._training_file, f"trained-{number % 2}"))

    def _let_rest_or_go_on(self) -> None:
        for job in self.client.jobs.list(limit=100):
            # The job may have ended since it was listed.
            with suppress(Conflict):
                if job.status == "paused":
                    self.client.jobs.get(job.id).resume()
                elif job.status == "running":
                    self.client.jobs.get(job.id).pause()


def ask(client: Client) -> str:
    return client.chat(QUESTION, temperature=0, max_tokens=8).text


def train(client: Client, training_file: str, name: str) -> str:
    return client.train(training_file, name=name, seed=9, **RECIPE).id  # type: ignore[arg-type]
