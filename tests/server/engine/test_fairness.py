"""Clients share the engine's places fairly, whatever one of them sends."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from engine_oracle import Run, make_engine, request, run_until_done
from hypothesis import given
from hypothesis import strategies as st

from reftserve.server.engine.engine import Engine
from reftserve.server.engine.fair_queue import REMEMBERED_CLIENTS, FairQueue
from reftserve.server.engine.messages import SamplingParams, Submit
from reftserve.server.engine.sequence import Sequence

PROMPT = list(range(5, 25))


def flood(engine: Engine, client: str, count: int, *, max_tokens: int = 40) -> None:
    for index in range(count):
        engine.submit(request(f"{client}-{index}", PROMPT, max_tokens=max_tokens, client=client))


def running(engine: Engine) -> Counter[str]:
    return Counter(sequence.client for sequence in engine.scheduler.running)


def test_a_short_request_does_not_wait_for_another_clients_flood(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=4)
    flood(engine, "flood", 12)
    run = Run()
    for _ in range(3):
        run.take(engine.step().outputs)
    assert running(engine) == {"flood": 4}
    engine.submit(request("short", PROMPT[::-1], max_tokens=1, client="quiet"))
    run.take(engine.step().outputs)
    assert "short" in run.finished
    run_until_done(engine, run)
    assert {len(run.tokens[f"flood-{index}"]) for index in range(12)} == {40}, "a preempted answer goes on"
    engine.close()


def test_a_preempted_answer_has_the_same_tokens(tiny_llama_folder: Path) -> None:
    alone, shared = (make_engine(tiny_llama_folder, max_sequences=2) for _ in range(2))
    for engine in (alone, shared):
        flood(engine, "flood", 2)
    expected = run_until_done(alone).tokens
    run = Run()
    for _ in range(5):
        run.take(shared.step().outputs)
    shared.submit(request("short", PROMPT[::-1], max_tokens=3, client="quiet"))
    run_until_done(shared, run)
    assert shared.stats().preemptions == 1
    assert {name: run.tokens[name] for name in expected} == expected
    for engine in (alone, shared):
        engine.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_two_floods_share_the_places_equally(tiny_llama_folder: Path, overlap: bool) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=4, overlap=overlap)
    flood(engine, "first", 12)
    run = Run()
    for _ in range(3):
        run.take(engine.step().outputs)
    flood(engine, "second", 12)
    for _ in range(2):  # a step may be in flight
        run.take(engine.step().outputs)
    while sum(name.startswith("first") for name in run.finished) < 12:
        run.take(engine.step().outputs)
        assert running(engine)["second"] >= 1
    assert sum(name.startswith("second") for name in run.finished) >= 8, "the first one began with four in hand"
    run_until_done(engine, run)
    assert len(run.finished) == 24
    engine.close()


def test_a_client_that_asks_alone_preempts_none_of_its_own_requests(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=2)
    flood(engine, "only", 6)
    run_until_done(engine)
    assert engine.stats().preemptions == 0
    engine.close()


def test_a_clients_next_request_goes_before_the_later_answers_of_a_large_one(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=1)
    for index in range(4):
        engine.submit(request(f"many-{index}", PROMPT, max_tokens=2, sibling=index))
    engine.submit(request("one", PROMPT, max_tokens=2))
    assert list(run_until_done(engine).finished) == ["many-0", "one", "many-1", "many-2", "many-3"]
    engine.close()


def test_requests_whose_moment_has_not_come_take_nobodys_place(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=1)
    engine.submit(request("user", PROMPT, max_tokens=9, client="user"))
    run = Run()
    run.take(engine.step().outputs)
    for index in range(3):
        engine.submit(request(f"later-{index}", PROMPT, max_tokens=2, client="evaluations", priority=6))
    run_until_done(engine, run)
    assert engine.stats().preemptions == 0
    assert next(iter(run.finished)) == "user"
    engine.close()


def sequence(client: str, number: int, tokens: int = 10) -> Sequence:
    submit = Submit(f"{client}-{number}", [1] * tokens, SamplingParams(max_tokens=0), client=client)
    return Sequence.from_submit(submit, (0.0, number))


def served(queue: FairQueue) -> Sequence:
    """Admit the next sequence."""
    first = queue.first(now=1.0)
    queue.remove(first)
    queue.charge(first)
    return first


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=60))
def test_while_all_wait_clients_receive_equal_tokens(arrivals: list[tuple[str, int]]) -> None:
    queue, left = FairQueue(), Counter(client for client, _ in arrivals)
    for number, (client, tokens) in enumerate(arrivals):
        queue.arrive(sequence(client, number, tokens))
    received: Counter[str] = Counter()
    largest = max(tokens for _, tokens in arrivals)
    while queue:
        first = served(queue)
        received[first.client] += len(first.token_ids)
        left[first.client] -= 1
        waiting = [client for client, count in left.items() if count]
        assert all(received[first.client] - received[other] <= largest for other in waiting)


def test_a_client_that_returns_has_saved_nothing_up() -> None:
    queue = FairQueue()
    queue.arrive(sequence("quiet", 0))
    queue.leave(served(queue))
    for number in range(1, 8):
        queue.arrive(sequence("busy", number))
    for _ in range(4):
        served(queue)
    for number in (10, 11, 12):
        queue.arrive(sequence("quiet", number))
    assert Counter(served(queue).client for _ in range(4)) == {"busy": 2, "quiet": 2}


def test_a_client_that_was_busy_alone_does_not_pay_for_it_later() -> None:
    queue = FairQueue()
    for number in range(100):
        queue.arrive(sequence("early", number))
        queue.leave(served(queue))
    for number in range(100, 120):
        queue.arrive(sequence("newcomer", number))
    queue.arrive(sequence("early", 200))
    assert "early" in [served(queue).client for _ in range(2)]


def test_counters_of_idle_clients_are_forgotten_in_time() -> None:
    queue = FairQueue()
    for number in range(2 * REMEMBERED_CLIENTS):
        queue.arrive(sequence(f"client {number}", number))
        queue.leave(served(queue))
    assert queue.num_clients <= REMEMBERED_CLIENTS
