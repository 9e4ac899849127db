"""`make chaos`: inject faults into a server with users, and print what each fault costs.

lost        acknowledged files, interventions and jobs that are gone, and jobs that failed without a reason to
wrong       bytes, weights or answers that differ from those of an undisturbed server
twice       versions published beyond one for each job
recovery    seconds from the end of the fault until a chat is answered and a job goes on (median, longest)

The faults run on a tiny random model, in a folder of their own. The full disk needs the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

import httpx
import psutil
from api_data import chat_lines
from published import make_artifact
from rich.console import Console
from rich.table import Table
from sqlalchemy import func, select
from tiny_models import tiny_llama, tiny_tokenizer
from users import Chats, Users, ask, train
from victims import Victim, free_port, serve, serve_slowly, wait_for_answer, work, work_slowly

from reftserve.client import Client
from reftserve.client.exceptions import Conflict, JobEnded, NotFound, ReftServeError
from reftserve.interventions import load_artifact
from reftserve.server.base.folder import open_base
from reftserve.server.settings import Settings
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Job, JobCheckpoint

TIMEOUT_S = 120
CHECKPOINT_STEPS = 5
MOMENT_S = 2.0  # some steps, a checkpoint, a validation, or the gap between two jobs
CALM_S = 3.0
FULL_S = 10.0
LOCKED_S = 40.0
SLOW_S = 20.0
DISK = "24m"
MAY_FAIL = ("storage_full",)  # codes of jobs that a fault ends rightly


@dataclass
class Truth:
    """What an undisturbed server does."""

    model: Path
    artifact: Path
    answer: str = ""
    content_hash: str = ""


@dataclass
class Row:
    """A line of the table."""

    fault: str
    requests: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    twice: int = 0
    recovery_s: list[float] = field(default_factory=list)
    note: str = ""


class Ground:
    """A server and two workers on one data folder, with users, and the row that they fill."""

    def __init__(self, fault: str, truth: Truth, folder: Path, *, slow: bool = False) -> None:
        self.row = Row(fault)
        self.truth = truth
        self.folder = folder
        self.settings = Settings(
            model=str(truth.model),
            data=folder / "data",
            port=free_port(),
            worker=False,
            checkpoint_steps=CHECKPOINT_STEPS,
            lease_s=2,
            cpu_kernels="never",
            engine_threads=1,
            worker_threads=1,
            kv_cache_bytes=1 << 20,
        )
        url = f"http://127.0.0.1:{self.settings.port}"
        self.url = url
        self.server = Victim(serve_slowly if slow else serve, self.settings, folder / "server.log")
        kind = work_slowly if slow else work
        self.workers = [Victim(kind, self.settings, folder / f"worker-{number}.log") for number in range(2)]
        wait_for_answer(url)
        self.client = Client(url, max_retries=0, timeout=60)
        wait_until(self.client.is_ready)
        self.database = Database(self.settings.resolved_database_url)
        self.training_file = self.client.files.upload(chat_lines(24)).id
        self.chats = Chats(Client(url, max_retries=0, timeout=60), truth.answer)
        self.users = Users(self.client, self.training_file, truth.artifact, ReftServeError)

    @property
    def victims(self) -> list[Victim]:
        return [self.server, *self.workers]

    def open(self) -> None:
        """Let the users in, and wait until jobs go on."""
        self.chats.start()
        self.users.start()
        wait_until(lambda: self.progress() > 0)

    def progress(self) -> int:
        """Return a number that grows whenever a job goes on or ends."""
        with self.database.reading() as session:
            checkpoints = session.scalar(select(func.count()).select_from(JobCheckpoint)) or 0
            ended = session.scalar(select(func.count()).where(Job.status.in_(Job.ENDED))) or 0
        return checkpoints + ended

    def recover(self) -> None:
        """Wait until a chat is answered and a job goes on, and note the seconds from now."""
        began, before = time.monotonic(), self.progress()
        wait_until(lambda: bool(self.chats.answered_at) and self.chats.answered_at[-1] > began)
        wait_until(lambda: self.progress() > before)
        self.row.recovery_s.append(time.monotonic() - began)

    def engine(self) -> psutil.Process:
        """Return the process of the engine."""
        wait_until(lambda: self._engine() is not None)
        found = self._engine()
        assert found is not None
        return found

    def _engine(self) -> psutil.Process | None:
        children = psutil.Process(self.server.process.pid).children(recursive=True)
        return next((each for each in children if "reftserve.server.engine.process" in each.cmdline()), None)

    def close(self) -> None:
        """Send the users home and check everything that was acknowledged."""
        for visitor in (self.chats, self.users):
            visitor.leave()
            self.row.requests += visitor.requests
            self.row.refused += len(visitor.refused)
            if visitor.failure is not None:
                self.row.wrong.append(repr(visitor.failure))
        self.row.wrong += self.chats.wrong
        self._check_files()
        self._check_jobs()

    def stop(self) -> None:
        """End all processes."""
        self.database.close()
        for victim in self.victims:
            if victim.process.is_alive():
                victim.process.terminate()
        for victim in self.victims:
            victim.process.join(20)
            if victim.process.is_alive():
                victim.kill()

    def _check_files(self) -> None:
        known = self.users.acknowledged
        for file_id, content in known.files.items():
            try:
                if self.client.files.content(file_id) != content:
                    self.row.wrong.append(file_id)
            except NotFound:
                self.row.lost.append(file_id)
        for reference, content_hash in known.interventions.items():
            self._check_artifact(reference, content_hash)

    def _check_artifact(self, reference: str, content_hash: str) -> None:
        name, version = reference.split("@")
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            try:
                folder = self.client.interventions.download(name, Path(scratch) / "artifact", version=version)
            except NotFound:
                self.row.lost.append(reference)
                return
            if load_artifact(folder).content_hash != content_hash:
                self.row.wrong.append(reference)

    def _check_jobs(self) -> None:
        jobs = {job.id: self.client.jobs.get(job.id) for job in self.client.jobs.list(limit=1000)}
        self.row.lost += [job_id for job_id in self.users.acknowledged.jobs if job_id not in jobs]
        published: list[str] = []
        for job in jobs.values():
            with suppress(Conflict):
                job.resume()
            try:
                job.wait(timeout_s=TIMEOUT_S)
            except JobEnded as cause:
                if cause.code not in MAY_FAIL:
                    self.row.lost.append(f"{job.id}: {cause.message}")
                continue
            published.append(str(job.fine_tuned_model))
            self._check_artifact(published[-1], self.truth.content_hash)
        versions = [v for i in self.client.interventions.list() if i.name.startswith("trained") for v in i.versions]
        self.row.twice = len(versions) - len(set(published))


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {TIMEOUT_S} s")
        time.sleep(0.02)


@contextmanager
def ground(fault: str, truth: Truth, folder: Path, *, slow: bool = False) -> Iterator[Ground]:
    folder.mkdir(parents=True, exist_ok=True)
    found = Ground(fault, truth, folder, slow=slow)
    try:
        yield found
    except Exception as cause:
        found.row.wrong.append(f"{type(cause).__name__}: {cause}")
    finally:
        found.stop()


def kills(kind: str, truth: Truth, folder: Path, moments: int) -> Row:
    draw = random.Random(kind)  # noqa: S311 - moments, not a secret
    with ground(f"kill -9 of {kind}, {moments} times", truth, folder) as here:
        here.open()
        for _ in range(moments):
            time.sleep(draw.uniform(0, MOMENT_S))
            if kind == "the engine":
                here.engine().kill()
            going = {
                "a worker": [draw.choice(here.workers)],
                "the engine": [],
                "the server": [here.server],
                "everything": here.victims,
            }[kind]
            for victim in going:
                victim.kill()
            for victim in going:
                victim.restart()
            here.recover()
        here.close()
    return here.row


def full_disk(truth: Truth, folder: Path) -> Row:
    disk = folder / "disk"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        return Row("full disk", note=f"not done: {mounted.stderr.decode().strip()}")
    try:
        with ground(f"full disk for {FULL_S:g} s", truth, disk) as here:
            here.open()
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 12))
            began = time.monotonic()
            time.sleep(FULL_S)
            chats = sum(moment > began for moment in here.chats.answered_at)
            alive = sum(worker.process.is_alive() for worker in here.workers)
            ready = httpx.get(f"{here.url}/ready", timeout=5).status_code
            here.row.note = f"{chats} chats, /ready {ready}, {alive} of 2 workers alive; deletion {_deletion(here)}"
            filler.unlink()
            here.recover()
            here.close()
        return here.row
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def _deletion(here: Ground) -> str:
    try:
        here.client.files.delete(here.client.files.upload(chat_lines(10)).id)
    except ReftServeError:
        files = list(here.users.acknowledged.files)
        try:
            here.client.files.delete(files[0])
            here.users.acknowledged.files.pop(files[0])
        except ReftServeError as cause:
            return f"refused: {cause}"
    return "works"


def lost_database(truth: Truth, folder: Path) -> Row:
    with ground("database lost", truth, folder) as here:
        here.open()
        time.sleep(CALM_S)
        here.chats.leave()
        here.users.leave()
        here.row.requests = here.chats.requests + here.users.requests
        for victim in here.victims:
            victim.kill()
        data = here.settings.data
        for file in data.glob("reftserve.db*"):
            file.unlink()
        blobs = [file for file in (data / "blobs").rglob("*") if file.is_file()]
        old = time.time() - 7200
        for path in (data / "blobs").rglob("*"):
            os.utime(path, (old, old))
        began = time.monotonic()
        for victim in here.victims:
            victim.restart()
        wait_until(lambda: not here.server.process.is_alive() or _answers(here.url))
        if here.server.process.is_alive():
            here.row.recovery_s.append(time.monotonic() - began)
            here.row.note = "starts empty and deletes nothing"
        else:
            here.row.note = f"refuses to start: {here.server.log.read_text().strip().splitlines()[-1][:150]}"
        time.sleep(CALM_S)
        here.row.lost = [str(file) for file in blobs if not file.exists() and "jobs" not in file.parts]
    return here.row


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1).is_success
    except httpx.TransportError:
        return False


def damaged_checkpoint(kind: str, truth: Truth, folder: Path) -> Row:
    with ground(f"newest checkpoint {kind}", truth, folder) as here:
        here.chats.start()
        here.users.acknowledged.jobs.append(train(here.client, here.training_file, "trained-0"))
        wait_until(lambda: here.progress() >= 3)
        for worker in here.workers:
            worker.kill()
        job_id = here.users.acknowledged.jobs[0]
        folders = (here.settings.data / "blobs" / "jobs" / job_id).glob("checkpoint-*")
        newest = max(folders, key=lambda path: int(path.name.split("-")[1]))
        file = newest / "trial-0.safetensors"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if kind == "flipped" else content[: len(content) // 2])
        for worker in here.workers:
            worker.restart()
        here.users.start()
        here.recover()
        here.close()
        warned = [event.message for event in here.client.jobs.get(job_id).events() if event.level == "warn"]
        here.row.note = "; ".join(warned)[:120]
    return here.row


def slow_store(truth: Truth, folder: Path) -> Row:
    with ground("each access to the store takes 0.5 s", truth, folder, slow=True) as here:
        here.open()
        time.sleep(SLOW_S)
        here.recover()
        gaps = [after - before for before, after in pairwise(here.chats.answered_at)]
        here.row.note = f"longest gap between chats {max(gaps):.2f} s"
        here.close()
    return here.row


def locked_database(truth: Truth, folder: Path) -> Row:
    with ground(f"database locked for {LOCKED_S:g} s", truth, folder) as here:
        here.open()
        lock = sqlite3.connect(here.settings.data / "reftserve.db", isolation_level=None, timeout=60)
        lock.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        time.sleep(LOCKED_S)
        lock.execute("ROLLBACK")
        lock.close()
        chats = sum(began < moment < began + LOCKED_S for moment in here.chats.answered_at)
        statuses = sorted({getattr(error, "status", 0) for error in here.users.refused})
        here.row.note = f"{chats} chats meanwhile; writes answered {statuses or 'nothing but success'}"
        here.recover()
        here.close()
    return here.row


def find_truth(folder: Path) -> Truth:
    """Make the model, and let an undisturbed server answer and train."""
    model = folder / "tiny-llama"
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    truth = Truth(model, folder / "artifact")
    make_artifact(truth.artifact, base=open_base(Settings(model=str(model), data=folder)).fingerprint)
    with ground("none", truth, folder / "calm") as here:
        truth.answer = ask(here.client)
        job = here.client.jobs.get(train(here.client, here.training_file, "undisturbed"))
        job.wait(timeout_s=TIMEOUT_S)
        truth.content_hash = here.client.interventions.version("undisturbed").content_hash
    if not truth.content_hash:
        raise SystemExit(f"no undisturbed run: {here.row.wrong}")
    return truth


def show(rows: list[Row]) -> None:
    table = Table(show_lines=False)
    for name in ("fault", "requests", "refused", "lost", "wrong", "twice", "recovery, s", "note"):
        table.add_column(name, overflow="fold")
    for row in rows:
        seconds = row.recovery_s
        recovery = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}" if seconds else "-"
        counts = (row.requests, row.refused, len(row.lost), len(row.wrong), row.twice)
        table.add_row(row.fault, *map(str, counts), recovery, row.note)
    Console(width=160).print(table)
    for row in rows:
        for what in (*row.lost, *row.wrong):
            print(f"{row.fault}: {what}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Inject faults and print what they cost")
    parser.add_argument("--moments", type=int, default=100, help="kills in all, a quarter of each kind")
    parser.add_argument("--only", nargs="*", default=[""], help="run the faults whose names contain one of these texts")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    each = max(1, options.moments // 4)
    faults: dict[str, Callable[[Truth, Path], Row]] = {
        f"kill {kind}": lambda truth, at, kind=kind: kills(kind, truth, at, each)  # type: ignore[misc]
        for kind in ("a worker", "the engine", "the server", "everything")
    }
    faults |= {
        "full disk": full_disk,
        "lost database": lost_database,
        "flipped checkpoint": lambda truth, at: damaged_checkpoint("flipped", truth, at),
        "truncated checkpoint": lambda truth, at: damaged_checkpoint("truncated", truth, at),
        "slow store": slow_store,
        "locked database": locked_database,
    }
    truth = find_truth(folder)
    rows = []
    for number, (name, fault) in enumerate(faults.items()):
        if any(text in name for text in options.only):
            print(f"{name} ...", flush=True)
            rows.append(fault(truth, folder / str(number)))
            show(rows[-1:])
    show(rows)
    bad = sum(len(row.lost) + len(row.wrong) + row.twice for row in rows)
    if not bad:
        shutil.rmtree(folder)
    else:
        print(f"the logs are in {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
