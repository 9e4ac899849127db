"""The training worker: a process of its own that takes queued jobs and carries them to their end, through crashes.

Started by the server (`python -m reftserve.server.training.worker`, settings as JSON in the first line of standard
input; when standard input ends the server has gone and so does the worker), or apart from it by `reftserve worker`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from dbos import DBOS, SetWorkflowID
from filelock import FileLock, Timeout

from reftserve.server.base_model import Base, load_model, open_base, resolve_device, resolve_dtype
from reftserve.server.errors import Conflict, ServerError
from reftserve.server.registry.store import Store, open_store
from reftserve.server.settings import LOG_FORMAT, Settings
from reftserve.server.training.data import count_examples
from reftserve.server.training.durable import MAX_RECOVERIES, QUEUE, WORKFLOW, configure
from reftserve.server.training.job_log import JobLog
from reftserve.server.training.run import CANCELLED, Runs

POLL_S = 0.2
HEARTBEAT_S = 1.0
HEARTBEAT_FILE = "worker.heartbeat"
LOCK_WAIT_S = 10.0
NICENESS = 5


def main() -> None:
    """Entry point of the supervised process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this process
    settings = Settings.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    run(settings)


def run(settings: Settings) -> None:
    """Work until the process is ended.

    Raises Conflict when another worker has the data folder, NotFound when there is no base model.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    settings.data.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.data / "worker.lock")
    try:
        # A predecessor that has just lost its server needs a moment to go.
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout as cause:
        raise Conflict(f"another worker has the data folder {settings.data}") from cause
    os.nice(NICENESS)
    if settings.worker_threads is not None:
        torch.set_num_threads(settings.worker_threads)
    base = open_base(settings)
    store = open_store(settings, base.fingerprint, count_examples)
    configure(settings)
    workflow = _register(_runs(settings, store, base))
    DBOS.launch()
    queue = DBOS.register_queue(QUEUE, worker_concurrency=1, polling_interval_sec=POLL_S)
    threading.Thread(target=_beat, args=(settings.data / HEARTBEAT_FILE,), name="heartbeat", daemon=True).start()
    log = JobLog(store.database)
    enqueued: set[str] = set()
    while True:
        for job_id in log.queued():
            # The same id again is the same workflow: enqueueing twice, or after a restart, does nothing.
            if job_id not in enqueued:
                with SetWorkflowID(job_id):
                    queue.enqueue(workflow, job_id)
                enqueued.add(job_id)
        time.sleep(POLL_S)


def _runs(settings: Settings, store: Store, base: Base) -> Runs:
    device = resolve_device(settings.device)
    model = load_model(base.folder, resolve_dtype(settings.dtype, device), device)
    return Runs(store, base, model, settings.data / "jobs", checkpoint_steps=settings.checkpoint_steps)


def _register(runs: Runs):  # type: ignore[no-untyped-def]
    # DBOS recovers jobs outside their queue, so its limit alone would let a recovered and a new one run together.
    one_at_a_time = threading.Lock()

    @DBOS.step(name="begin")
    def begin(job_id: str) -> int:
        return runs.begin(job_id)

    @DBOS.step(name="advance")
    def advance(job_id: str, step: int) -> int:
        return runs.advance(job_id, step)

    @DBOS.step(name="publish")
    def publish(job_id: str) -> str:
        return runs.publish(job_id)

    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=MAX_RECOVERIES)
    def train(job_id: str) -> str | None:
        with one_at_a_time:
            try:
                total = begin(job_id)
                done = 0 if total != CANCELLED else CANCELLED
                while CANCELLED < done < total:
                    done = advance(job_id, done)
                return publish(job_id) if done != CANCELLED else None
            except ServerError as cause:
                # The job's own fault: its row says so, and nobody needs a traceback.
                runs.fail(job_id, cause)
                return None
            except Exception as cause:
                runs.fail(job_id, cause)
                raise

    return train


def _beat(file: Path) -> None:
    while True:
        file.touch()
        time.sleep(HEARTBEAT_S)


def _exit_with_parent() -> None:
    while sys.stdin.read(4096):
        pass
    # Jobs are durable: what this process was doing, the next one does again from the last checkpoint.
    os._exit(0)


if __name__ == "__main__":
    main()
