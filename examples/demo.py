"""The main job from end to end (`make demo`): serve, upload, train, and generate with and without the intervention.

Exits with 0 when the intervention is clearly better than the base on held-out reviews.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reftserve.client import Client, Job

HERE = Path(__file__).parent
TRAINING, HELD_OUT = HERE / "sentiment.train.jsonl", HERE / "sentiment.heldout.jsonl"
NAME = "sentiment"
SHOWN = 6
CLEARLY_BETTER = 0.2
START_TIMEOUT_S = 180.0

console = Console(width=110, highlight=False)


def main() -> int:
    """Run the demo; the exit code."""
    began = time.monotonic()
    with server() as client:
        job = train(client)
        scores = client.interventions.version(NAME, "latest").manifest["provenance"]["scores"]
        base, intervened = scores["base"]["exact_match"], scores["intervention"]["exact_match"]
        compare(client, job)
        report(client, base, intervened)
    better = intervened >= base + CLEARLY_BETTER
    verdict = "[green]clearly better than the base[/]" if better else "[red]not better than the base[/]"
    console.print(f"\nThe intervention is {verdict}. {time.monotonic() - began:.0f} seconds in all.")
    if better:
        console.print("Serve it: [bold].venv/bin/reftserve serve[/], then name it as the model of any OpenAI client.")
    return 0 if better else 1


@contextmanager
def server() -> Iterator[Client]:
    """Start a server on a free port, with the data folder that `reftserve serve` uses too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = Path("reftserve-data") / "demo.log"
    log.parent.mkdir(exist_ok=True)
    console.print(f"Starting the server (its log is {log}) ...")
    command = [str(Path(sys.executable).parent / "reftserve"), "serve", "--port", str(port)]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            with Client(f"http://127.0.0.1:{port}") as client:
                wait_until_ready(client, process, log)
                yield client
        finally:
            process.terminate()


def wait_until_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until model and database are there; exit with the log's end when the server gives up."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server ended with code {process.returncode}:\n{log.read_text()[-2000:]}")
        if client.is_ready():
            return
        time.sleep(0.3)
    sys.exit(f"the server was not ready after {START_TIMEOUT_S:.0f} seconds; see {log}")


def train(client: Client) -> Job:
    """Upload both files, train, and show progress until the intervention is published."""
    training, held_out = client.files.upload(TRAINING), client.files.upload(HELD_OUT)
    console.print(f"Uploaded {training.examples} examples to train on and {held_out.examples} held out. Training ...")
    job = client.train(training, name=NAME, validation_file=held_out, seed=0)
    job.wait(progress=True)
    console.print(f"Published [bold]{job.fine_tuned_model}[/].")
    return job


def compare(client: Client, job: Job) -> None:
    """Show the base's and the intervened answers to the same held-out prompts, side by side."""
    table = Table(title="Held-out reviews", show_lines=True)
    table.add_column("review", ratio=5)
    table.add_column("right", ratio=1)
    table.add_column("base model", ratio=4, style="yellow")
    table.add_column(job.fine_tuned_model or NAME, ratio=1, style="green")
    for line in HELD_OUT.read_text("utf-8").splitlines()[:SHOWN]:
        question, answer = json.loads(line)["messages"]
        messages = [{"role": "user", "content": question["content"]}]
        plain = client.chat(messages, temperature=0, max_tokens=40).text
        edited = client.chat(messages, model=job.fine_tuned_model, temperature=0, max_tokens=40).text
        table.add_row(question["content"].rpartition("Review: ")[2], answer["content"], plain.strip(), edited.strip())
    console.print(table)


def report(client: Client, base: float, intervened: float) -> None:
    """Print scores on the held-out examples that selected nothing, and the intervention's size."""
    version = client.interventions.version(NAME, "latest")
    counts = version.manifest["provenance"]["examples"]
    console.print(
        f"Right answers, word for word, on {counts['test']} held-out reviews that neither trained nor selected: "
        f"base [yellow]{base:.0%}[/], intervention [green]{intervened:.0%}[/]."
    )
    console.print(f"The intervention has {version.parameters:,} parameters and takes {version.bytes:,} bytes.")


if __name__ == "__main__":
    sys.exit(main())
