"""Admission refuses requests that would wait too long, by measured costs and the client's share of the places."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reftserve.server.engine.messages import EngineStats, Ready, SamplingParams, Submit, TokenOutput
from reftserve.server.errors import Overloaded
from reftserve.server.inference.admission import RESERVED_S, Admission, TokenCosts

READY = Ready(max_context=2048, device="cpu", dtype="float32", max_sequences=4, block_size=16)
IDLE = EngineStats(*[0] * 11, full_s=0.0, full_prompt_tokens=0, full_generated_tokens=0)
IDLE = msgspec.structs.replace(IDLE, kv_blocks_total=1000)
PROMPT, ANSWER = 100, 50
SECONDS = 1.0  # of the engine's time for a request: 100 * 0.002 + 50 * 0.016
MEASURED = msgspec.structs.replace(IDLE, prompt_tokens=1)


@dataclass
class Server:
    """Requests in an engine that computes a prompt token in 2 ms and generates one in 16 ms."""

    admission: Admission
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def measure(self) -> EngineStats:
        """Let the admission see two kinds of steps of a full engine; return the statistics."""
        stats = MEASURED
        for prompt, generated in ((500, 10), (0, 64)):
            stats = msgspec.structs.replace(
                stats,
                full_s=stats.full_s + prompt * 0.002 + generated * 0.016,
                full_prompt_tokens=stats.full_prompt_tokens + prompt,
                full_generated_tokens=stats.full_generated_tokens + generated,
            )
            self.admission.expected_wait_s("", 1, READY, stats)
        return stats

    def wait(self, client: str, count: int = 1) -> Callable[[TokenOutput], None]:
        """Put requests into the queue; return the last one's `advance`."""
        for _ in range(count):
            submit = Submit("id", [1] * PROMPT, SamplingParams(max_tokens=ANSWER), client=client)
            advance = self.stack.enter_context(self.admission.track(submit))
        return advance

    def run(self, client: str, count: int) -> None:
        for _ in range(count):
            self.wait(client)(TokenOutput("id", [1]))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(Admission(max_queue=1000, max_wait_s=10.0))
    with server.stack:
        yield server


def test_nothing_is_refused_before_the_engine_was_full_once(server: Server) -> None:
    server.wait("a", 500)
    server.admission.reserve("a", 1, READY, IDLE)


def test_a_request_that_finds_a_place_waits_for_prompts_only(server: Server) -> None:
    stats = server.measure()
    server.run("a", 2)
    server.wait("a")
    assert server.admission.expected_wait_s("a", 1, READY, stats) == pytest.approx(PROMPT * 0.002)


def test_a_request_waits_for_those_ahead_of_it_beyond_the_places(server: Server) -> None:
    stats = server.measure()
    server.run("a", 4)
    server.wait("a", 6)
    assert server.admission.expected_wait_s("a", 1, READY, stats) == pytest.approx(7 * SECONDS)
    server.admission.reserve("a", 3, READY, stats)
    with pytest.raises(Overloaded, match=r"after about 14 s, and 10 s is the limit") as refused:
        server.admission.reserve("a", 5, READY, stats)
    assert refused.value.retry_after_s == pytest.approx(4.0)


def test_admitted_requests_count_before_they_reach_the_engine(server: Server) -> None:
    stats = server.measure()
    server.run("a", 4)
    server.wait("a")
    places = server.admission.reserve("a", 8, READY, stats)
    with pytest.raises(Overloaded):
        server.admission.reserve("a", 2, READY, stats)
    server.admission.reserve("quiet", 1, READY, stats)
    submit = Submit("id", [1] * PROMPT, SamplingParams(max_tokens=ANSWER), client="a")
    for _ in range(8):
        with server.admission.track(submit, places):
            pass
    server.admission.reserve("a", 1, READY, stats)


def test_places_of_requests_that_never_came_are_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.admission.reserve("a", 1000, READY, IDLE)
    with pytest.raises(Overloaded):
        server.admission.reserve("a", 1, READY, IDLE)
    later = time.monotonic() + RESERVED_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    server.admission.reserve("a", 1000, READY, IDLE)


def test_another_clients_flood_does_not_shut_a_client_out(server: Server) -> None:
    stats = server.measure()
    server.run("flood", 4)
    server.wait("flood", 100)
    server.admission.reserve("quiet", 2, READY, stats)
    with pytest.raises(Overloaded):
        server.admission.reserve("flood", 1, READY, stats)


def test_a_small_cache_means_fewer_places(server: Server) -> None:
    stats = msgspec.structs.replace(server.measure(), kv_blocks_total=20)  # two requests of 150 tokens
    server.run("a", 2)
    server.wait("a", 1)
    assert server.admission.expected_wait_s("a", 1, READY, stats) == pytest.approx(2 * SECONDS)


def test_cached_prompts_cost_nothing(server: Server) -> None:
    stats = server.measure()
    server.run("a", 4)
    server.wait("a", 1)
    cached = msgspec.structs.replace(stats, cached_prompt_tokens=stats.prompt_tokens)
    fewer = server.admission.expected_wait_s("a", 1, READY, cached)
    assert fewer == pytest.approx(2 * (PROMPT * 0.001 + ANSWER * 0.016))


def test_short_answers_shorten_the_wait(server: Server) -> None:
    stats = server.measure()
    for _ in range(500):
        with server.admission.track(Submit("id", [1], SamplingParams(max_tokens=ANSWER))) as advance:
            advance(TokenOutput("id", [1] * 5, "length"))
    server.run("a", 4)
    server.wait("a", 1)
    assert server.admission.expected_wait_s("a", 1, READY, stats) < 0.5 * 2 * SECONDS


def test_more_requests_than_the_queue_holds_are_refused(server: Server) -> None:
    server.wait("a", 1000)
    with pytest.raises(Overloaded, match=r"1000 requests wait or run, and 1000 is the limit"):
        server.admission.reserve("b", 1, READY, IDLE)


def test_requests_that_left_are_not_counted() -> None:
    server = Server(Admission(max_queue=10, max_wait_s=10.0))
    with server.stack:
        server.wait("a", 5)
        server.run("b", 5)
    server.admission.reserve("a", 10, READY, IDLE)


@given(st.floats(1e-5, 1e-1), st.floats(1e-5, 1e-1), st.lists(st.tuples(st.integers(0, 512), st.integers(0, 64))))
def test_costs_are_those_of_the_steps(prompt_s: float, generated_s: float, steps: list[tuple[int, int]]) -> None:
    costs = TokenCosts()
    assert costs.get() is None
    for prompt, generated in [(512, 0), (0, 64), *steps]:
        costs.add(prompt, generated, prompt * prompt_s + generated * generated_s)
    found = costs.get()
    assert found is not None
    exact = found == pytest.approx((prompt_s, generated_s), rel=1e-3)
    between = min(prompt_s, generated_s) * 0.999 <= found[0] == found[1] <= max(prompt_s, generated_s) * 1.001
    assert exact or between
