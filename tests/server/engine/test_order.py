"""The scheduling order: priority, preemption and timeouts."""

from __future__ import annotations

import time
from pathlib import Path

from engine_oracle import Run, make_engine, request, run_until_done

from reftserve.server.engine.engine import PRIORITY_STEP_S

PROMPT = list(range(5, 25))


def finished_in_order(run: Run) -> list[str]:
    return list(run.finished)


def test_requests_of_one_priority_are_served_in_order_of_arrival(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=1)
    for name in "abc":
        engine.submit(request(name, PROMPT, max_tokens=3))
    assert finished_in_order(run_until_done(engine)) == ["a", "b", "c"]
    engine.close()


def test_a_lower_number_goes_first(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=1)
    for name, priority in (("late", 5), ("normal", 0), ("urgent", -3)):
        engine.submit(request(name, PROMPT, max_tokens=3, priority=priority))
    assert finished_in_order(run_until_done(engine)) == ["urgent", "normal", "late"]
    engine.close()


def test_no_request_starves_because_waiting_raises_its_priority(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=1)
    engine.submit(request("patient", PROMPT, max_tokens=3, priority=1))
    patient = engine.scheduler.waiting.first(time.monotonic())
    patient.order = (patient.order[0] - 2 * PRIORITY_STEP_S, patient.order[1])  # it arrived two steps earlier
    engine.submit(request("new", PROMPT, max_tokens=3, priority=0))
    assert finished_in_order(run_until_done(engine)) == ["patient", "new"]
    engine.close()


def test_when_blocks_run_out_the_last_request_in_order_is_preempted(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, blocks=18)
    engine.submit(request("late", PROMPT, max_tokens=40, priority=1))
    run = Run()
    run.take(engine.step().outputs)
    engine.submit(request("urgent", PROMPT[::-1], max_tokens=40, priority=-1))
    run_until_done(engine, run)
    assert engine.stats().preemptions > 0
    assert finished_in_order(run) == ["urgent", "late"]
    assert {len(tokens) for tokens in run.tokens.values()} == {40}
    engine.close()


def test_a_request_ends_with_an_error_when_its_time_is_up(tiny_llama_folder: Path) -> None:
    engine = make_engine(tiny_llama_folder, max_sequences=1)
    engine.submit(request("running", PROMPT, max_tokens=200, timeout_s=0.05))
    engine.submit(request("waiting", PROMPT, max_tokens=2, timeout_s=0.05))
    engine.submit(request("patient", PROMPT, max_tokens=2, timeout_s=60))
    run = Run()
    run.take(engine.step().outputs)
    time.sleep(0.06)
    run_until_done(engine, run)
    assert {name: run.finished[name].finish_reason for name in run.finished} == {
        "running": "timeout",
        "waiting": "timeout",
        "patient": "length",
    }
    assert "1 tokens" in (run.finished["running"].error or "")
    assert engine.stats().kv_blocks_used == 0
    engine.close()
