"""`reftserve jobs watch` draws in a terminal, prints a line per event elsewhere, and Ctrl-C ends only the watching."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from jobs_api import JobsApi, jobs_api, step
from rich.console import Console

from reftserve.client.schemas import FineTuningEvent
from reftserve.client.watch import JobView

REFTSERVE = Path(sys.executable).parent / "reftserve"


@pytest.fixture(scope="module")
def api(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsApi]:
    with jobs_api(tiny_llama_folder, tmp_path_factory.mktemp("jobs")) as api:
        yield api


def trained(api: JobsApi, status: str | None) -> str:
    job = api.add_job()
    api.add_events(
        job,
        "Training 4 parameters",
        step(1),
        step(2, valid_loss=0.7, valid_loss_stderr=0.05, valid_exact_match=0.25),
        step(3),
    )
    if status is not None:
        api.add_events(job, f"The job {status}", status=status)
    return job


def piped(api: JobsApi, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(REFTSERVE), "--url", api.url, *words], capture_output=True, text=True, timeout=60, check=False
    )


class Terminal:
    def __init__(self, *words: str) -> None:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        self.process = subprocess.Popen(
            [str(REFTSERVE), *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            # As a shell does; SIGINT may be ignored if these tests run in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        self.shown = ""
        self._reader = threading.Thread(target=self._read, args=(ours,))
        self._reader.start()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            assert self._reader.is_alive(), self.shown
            time.sleep(0.05)

    def end(self) -> int:
        code = self.process.wait(30)
        self._reader.join(10)
        return code

    def _read(self, terminal: int) -> None:
        with open(terminal, "rb", buffering=0) as file:
            try:
                while chunk := file.read(4096):
                    self.shown += chunk.decode(errors="replace")
            except OSError:
                return  # on Linux: the other side is closed


def test_in_a_terminal_watch_draws_status_figures_and_curve_until_the_job_ends(api: JobsApi) -> None:
    job = trained(api, None)
    terminal = Terminal("--url", api.url, "jobs", "watch", job)
    terminal.wait_for("step 3/10")
    for expected in (job, "tone", "1,234 tokens/s", "learning rate 4.00e-03", "0:00:07 to go"):
        terminal.wait_for(expected)
    terminal.wait_for("loss 0.3333, held-out loss 0.7 ± 0.05, held-out exact_match 0.25")
    terminal.wait_for("●")
    assert any(0x2800 < ord(character) <= 0x28FF for character in terminal.shown)
    api.add_events(job, step(10), "Published tone@1", status="succeeded")
    assert terminal.end() == 0
    assert "step 10/10" in terminal.shown
    assert "Published tone@1" in terminal.shown


def test_without_a_terminal_watch_prints_a_line_per_event_then_the_job(api: JobsApi) -> None:
    job = trained(api, "succeeded")
    lines = piped(api, "jobs", "watch", job).stdout.splitlines()
    assert lines[0].startswith("Created job")
    assert lines[1:5] == [
        "Training 4 parameters",
        "step 1/10: loss 1, learning rate 4.00e-03, 1,234 tokens/s, 0:00:09 to go",
        "step 2/10: loss 0.5, held-out loss 0.7 ± 0.05, held-out exact_match 0.25, learning rate 4.00e-03, "
        "1,234 tokens/s, 0:00:08 to go",
        "step 3/10: loss 0.3333, learning rate 4.00e-03, 1,234 tokens/s, 0:00:07 to go",
    ]
    assert lines[5] == "The job succeeded"
    assert any(line.split() == ["status", "succeeded"] for line in lines[6:])
    objects = [json.loads(line) for line in piped(api, "--json", "jobs", "watch", job).stdout.splitlines()]
    assert [found["object"] for found in objects] == ["fine_tuning.job.event"] * 6 + ["fine_tuning.job"]


def test_a_job_that_does_not_succeed_is_an_error(api: JobsApi) -> None:
    done = piped(api, "jobs", "watch", trained(api, "failed"))
    assert done.returncode == 1
    assert "The job failed" in done.stdout
    assert done.stderr.startswith("error: ")


def test_ctrl_c_ends_the_watching_not_the_job(api: JobsApi) -> None:
    job = trained(api, None)
    terminal = Terminal("--url", api.url, "jobs", "watch", job)
    terminal.wait_for("step 3/10")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert f"job {job} goes on; follow it with: reftserve jobs watch {job}" in terminal.shown
    assert "Traceback" not in terminal.shown
    assert '"status":"validating_files"' in piped(api, "--json", "jobs", "show", job).stdout.replace(" ", "")


class Still:
    id, status, data = "ftjob-1", "running", SimpleNamespace(suffix="tone")


def test_a_non_finite_loss_is_shown_and_left_out_of_the_curve() -> None:
    view = JobView(Still())  # type: ignore[arg-type]
    for number, loss in ((1, 1.0), (2, None), (3, 0.5)):
        metrics = {**step(number), "train_loss": loss}
        view.add(FineTuningEvent(id="e", created_at=0, level="info", message="", type="metrics", data=metrics))
        if loss is None:
            assert "loss nan" in drawn(view)
    assert "loss 0.5" in drawn(view)
    assert "nan" not in drawn(view)


def drawn(view: JobView) -> str:
    console = Console(width=60, file=io.StringIO())
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]
