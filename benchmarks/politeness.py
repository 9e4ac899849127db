"""Measure how much a training job slows down serving: `python benchmarks/politeness.py`.

Prints the median time between a stream's tokens with and without a job, and the job's speed alone and during the
streams. With `--beginning` the job has not reached its first step: it reads its data and fills its cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import workload as w

from reftserve.client import Client, Job

sys.path.append(str(w.ROOT / "tests" / "support"))

from running_server import RunningServer, running_server

PROMPT = "Write a long story about a lighthouse keeper who learns to"
DATA = w.ROOT / "examples" / "sentiment.train.jsonl"
WARM_UP_S = 5.0


def gaps(server: RunningServer, streams: int, seconds: float) -> list[float]:
    found: list[float] = []
    stop_at = time.perf_counter() + seconds

    def one() -> None:
        client = Client(server.url)
        while time.perf_counter() < stop_at:
            with client.stream(PROMPT, max_tokens=200, temperature=0, ignore_eos=True) as pieces:
                last = None
                for _ in pieces:
                    now = time.perf_counter()
                    if last is not None:
                        found.append(now - last)
                    last = now
                    if now > stop_at:
                        break

    threads = [threading.Thread(target=one) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def queue_job(client: Client, positions: str, data: Path = DATA, batch_size: int = 10) -> Job:
    """Queue a job of rank 4 at all layers that runs until it is cancelled."""
    plan = {"layers": "all", "positions": positions, "rank": 4, "n_epochs": 1000, "batch_size": batch_size}
    return client.train(data, name="polite", **plan)


def begin_job(client: Client, server: RunningServer, positions: str, data: Path = DATA, batch_size: int = 10) -> Job:
    job = queue_job(client, positions, data, batch_size)
    while steps_done(server, job) == 0:
        time.sleep(0.2)
    return job


def end_job(job: Job) -> None:
    job.cancel()
    while not job.refresh().has_ended:
        time.sleep(0.1)


def many_rows(folder: Path, count: int) -> Path:
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    path = folder / "many.jsonl"
    with path.open("w") as file:
        for number in range(count):
            question, answer = rows[number % len(rows)]["messages"]
            numbered = {**question, "content": f"{number}. {question['content']}"}
            file.write(json.dumps({"messages": [numbered, answer]}) + "\n")
    return path


def steps_done(server: RunningServer, job: Job) -> int:
    newest = httpx.get(f"{server.url}/v1/fine_tuning/jobs/{job.id}/events", params={"limit": 20}).json()["data"]
    return max((event["data"]["step"] for event in newest if "step" in (event["data"] or {})), default=0)


def measure_steps(
    client: Client, server: RunningServer, positions: str, streams: int, seconds: float
) -> tuple[float, float, float]:
    job = begin_job(client, server, positions)
    rates: list[float] = []
    beside: list[float] = []
    for busy in (False, True):
        before, began = steps_done(server, job), time.perf_counter()
        if busy:
            beside = gaps(server, streams, seconds)
        else:
            time.sleep(seconds)
        rates.append((steps_done(server, job) - before) / (time.perf_counter() - began))
    end_job(job)
    return statistics.median(beside), rates[0], rates[1]


def measure_beginning(
    client: Client, server: RunningServer, positions: str, streams: int, seconds: float, data: Path
) -> float:
    job = queue_job(client, positions, data)
    while job.refresh().status != "running":
        time.sleep(0.2)
    beside = statistics.median(gaps(server, streams, seconds))
    if steps_done(server, job):
        raise SystemExit(f"the job took its first step within {seconds:g} s: --rows wants more")
    end_job(job)
    return beside


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--streams", type=int, default=4)
    arguments.add_argument("--seconds", type=float, default=60, help="of each measurement; a job's steps take long")
    arguments.add_argument("--positions", default="f7+l7", help="of the job")
    arguments.add_argument("--niceness", type=int, help="of the worker; default: the setting's")
    arguments.add_argument("--beginning", action="store_true", help="measure beside a job before its first step")
    arguments.add_argument("--rows", type=int, default=4000, help="of the data of such a job")
    args = arguments.parse_args()
    env = {} if args.niceness is None else {"REFTSERVE_WORKER_NICENESS": str(args.niceness)}
    between: dict[str, list[float]] = {"no job": [], "a job": []}
    rates: dict[str, list[float]] = {"alone": [], "beside the streams": []}
    with tempfile.TemporaryDirectory() as data, running_server(w.MODEL, Path(data), env=env) as server:
        client = Client(server.url)
        many = many_rows(Path(data), args.rows) if args.beginning else None
        gaps(server, args.streams, WARM_UP_S)
        for _ in range(args.runs):
            between["no job"].append(statistics.median(gaps(server, args.streams, args.seconds)))
            common = client, server, args.positions, args.streams, args.seconds
            if many is not None:
                between["a job"].append(measure_beginning(*common, many))
                continue
            beside, *both = measure_steps(*common)
            between["a job"].append(beside)
            for values, rate in zip(rates.values(), both, strict=True):
                values.append(rate)
    moment = ", before its first step" if args.beginning else ""
    print(
        f"{args.streams} streams; a job of {args.positions} at all layers{moment}; median of {args.runs}; {w.machine()}"
    )
    gap = {name: statistics.median(values) for name, values in between.items()}
    for name, value in gap.items():
        print(f"{name:20} {1000 * value:7.1f} ms between tokens")
    for name, values in rates.items():
        if values:
            print(f"the job {name:20} {statistics.median(values):6.2f} steps/s")
    print(f"with a job / without = {gap['a job'] / gap['no job']:.2f}")


if __name__ == "__main__":
    main()
