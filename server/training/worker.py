"""The training worker is a separate process that takes jobs and runs them one after the other (`job_runner.py`).

The server starts it as `python -P -m reftserve.server.training.worker`. Standard input gives the settings and the
weights that the engine lends, one line of JSON each, and ends with the server; then the worker ends too. `reftserve
worker` starts further workers anywhere; leases assign the jobs.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec
import torch

from reftserve.server.base.folder import Base, open_base
from reftserve.server.base.kernel_choice import kernel_choice
from reftserve.server.base.lent_tensor import LentTensor
from reftserve.server.base.memory import trim_heap
from reftserve.server.base.model import resolve_device, resolve_dtype
from reftserve.server.base.weights import load_base
from reftserve.server.registry.store import Store, open_store
from reftserve.server.settings import HEARTBEAT_S, LOG_FORMAT, Settings
from reftserve.server.storage.leases import RENEWALS_PER_LEASE, Leases, worker_id
from reftserve.server.storage.outages import OUTAGES, Outages
from reftserve.server.storage.tables import Job
from reftserve.server.training.job_files import JobFiles
from reftserve.server.training.job_repository import JobRepository
from reftserve.server.training.job_runner import JobRunner
from reftserve.server.training.threads import Threads, set_mkl_deterministic
from reftserve.server.training.varlen import VarlenModel

logger = logging.getLogger(__name__)
POLL_S = 0.2
SWEEP_S = 60.0
EXIT_S = 5.0


def main() -> None:
    """Run the supervised process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this process
    settings = Settings.model_validate_json(sys.stdin.readline())
    lent = msgspec.json.decode(sys.stdin.readline(), type=list[LentTensor])
    threading.Thread(target=_exit_with_parent, name="parent-watch", daemon=True).start()
    run(settings, lent)


def run(settings: Settings, lent: Sequence[LentTensor] = ()) -> NoReturn:
    """Work until the process ends; SIGTERM frees the job at once. lent: weights of an engine that must outlive it."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    signal.signal(signal.SIGTERM, _exit)
    os.nice(settings.worker_niceness)
    set_mkl_deterministic()
    if settings.worker_threads is not None:
        torch.set_num_threads(settings.worker_threads)
    base = open_base(settings)
    store = open_store(settings, base.fingerprint)
    worker = worker_id()
    leases = Leases(store.database, Job, worker, lease_s=settings.lease_s)
    runs, files = open_job_runner(settings, store, base, leases, lent)
    heartbeat = threading.Thread(target=_beat, args=(settings, leases), name="heartbeat", daemon=True)
    heartbeat.start()
    logger.info("worker %s waits for jobs", worker)
    try:
        work_forever(runs, files, leases)
    finally:
        _release_at_exit(leases)


def open_job_runner(
    settings: Settings, store: Store, base: Base, leases: Leases[Job], lent: Sequence[LentTensor] = ()
) -> tuple[JobRunner, JobFiles]:
    """Load the base, and return the worker's job runner and job files."""
    device = resolve_device(settings.device)
    kernels = kernel_choice(settings.cpu_kernels, settings.weights_folder)
    model = load_base(
        base.folder,
        resolve_dtype(settings.dtype, device),
        device,
        kernels=kernels,
        shared=settings.weights_folder,
        lent=lent,
    )
    files = JobFiles(
        store.blobs,
        JobRepository(store.database),
        leases,
        max_bytes=settings.max_jobs_bytes,
        keep_s=settings.keep_jobs_s,
    )
    varlen = VarlenModel(model, kernels=kernels)
    if device.type == "cpu":
        logger.info(kernels.describe())
    if device.type == "cpu" and settings.worker_yields:
        Threads(torch.get_num_threads()).watch(model, varlen.layers)
    runs = JobRunner(
        store,
        base,
        varlen,
        files,
        checkpoint_steps=settings.checkpoint_steps,
        activation_cache_bytes=settings.activation_cache_bytes,
        activation_cache_disk_bytes=settings.activation_cache_disk_bytes,
        scratch=settings.data,
    )
    trim_heap()
    return runs, files


def work_forever(runs: JobRunner, files: JobFiles, leases: Leases[Job]) -> NoReturn:
    """Take and run jobs, and wait while the database cannot be used."""
    outages = Outages()
    while True:
        try:
            work(runs, files, leases)
        except OUTAGES as cause:
            runs.forget()
            trim_heap()
            outages.wait(cause)


def work(runs: JobRunner, files: JobFiles, leases: Leases[Job]) -> NoReturn:
    """Take and run jobs until one of `OUTAGES` is raised; the next call releases this process's leases."""
    leases.release(in_order=False)
    swept_at = -SWEEP_S
    while True:
        if time.monotonic() - swept_at > SWEEP_S:
            files.sweep()
            swept_at = time.monotonic()
        lease = leases.take()
        if lease is None:
            runs.forget()
            time.sleep(POLL_S)
        else:
            logger.info("took job %s, fence %d", lease.id, lease.fence)
            runs.execute(lease)


def _beat(settings: Settings, leases: Leases[Job]) -> NoReturn:
    pause_s = min(HEARTBEAT_S, settings.lease_s / RENEWALS_PER_LEASE)
    outages, is_new = Outages(), True
    while True:
        try:
            settings.heartbeat_file.touch()
            is_new = True
        except OSError as cause:
            if is_new:
                logger.warning("the worker's heartbeat cannot be written: %s", cause)
            is_new = False
        try:
            leases.renew()
        except OUTAGES as cause:
            # The next beat retries. If none succeeds in time, the lease is lost, and the run ends at its next write.
            outages.meet(cause)
        time.sleep(pause_s)


def _release_at_exit(leases: Leases[Job]) -> None:
    try:
        leases.release()
    except OUTAGES as cause:
        logger.warning("the worker's leases could not be released and expire by themselves: %s", str(cause))


def _exit(signum: int, frame: Any) -> NoReturn:
    sys.exit(0)


def _exit_with_parent() -> NoReturn:
    while sys.stdin.read(4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(EXIT_S)
    # A long operation blocks the exit. The lease expires, and another worker resumes from the last checkpoint.
    os._exit(0)


if __name__ == "__main__":
    main()
