"""Measure the memory of the server, its engine and its worker: `python benchmarks/memory.py`.

The server is idle after its first answers, then has a job at its peak. From /proc/PID/smaps: RSS counts every page that
a process maps, USS those that no other process maps, PSS 1/n of a page that n processes map, so that it adds up.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import workload as w
from politeness import begin_job, end_job, gaps

from reftserve.client import Client
from reftserve.server.base.tokenizer import load_tokenizer

sys.path.append(str(w.ROOT / "tests" / "support"))

from running_server import RunningServer, running_server

MODULES = {"engine": "reftserve.server.engine.process", "worker": "reftserve.server.training.worker"}
EXAMPLES = 24
COMPLETION = "It was a long night, and the light never went out. " * 4
STREAMS, SERVE_S, SAMPLE_S = 4, 5.0, 0.5
SETTLED_S, IDLE_PERCENT = 5.0, 5.0
PARTS = ("*.safetensors", "*.weights", "other files", "anonymous")
COLUMNS = ("RSS", "USS", "PSS", *PARTS)

Sizes = Counter[str]


def sizes(process: psutil.Process) -> Sizes:
    found: Sizes = Counter()
    part = ""
    for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # a mapping's first line: addresses, permissions, offset, device, inode, path
            part = _part(" ".join(rest[4:]))
        elif first == "Pss:":
            found["PSS"] += int(rest[0]) << 10
            found[part] += int(rest[0]) << 10
        elif first == "Rss:":
            found["RSS"] += int(rest[0]) << 10
        elif first in ("Private_Clean:", "Private_Dirty:"):
            found["USS"] += int(rest[0]) << 10
    return found


def _part(path: str) -> str:
    if not path.startswith("/"):
        return "anonymous"
    kind = f"*{Path(path.removesuffix(' (deleted)')).suffix}"
    return kind if kind in PARTS else "other files"


class Watch:
    """The processes of a server, with the sizes of each at its largest PSS."""

    def __init__(self, server: RunningServer) -> None:
        self._processes = {"api": psutil.Process(server.process.pid)}
        self._processes |= {name: server.child(module) for name, module in MODULES.items()}

    def now(self) -> dict[str, Sizes]:
        """Return current sizes by process."""
        return {name: sizes(process) for name, process in self._processes.items()}

    def settled(self) -> dict[str, Sizes]:
        """Return sizes once all processes are idle; a worker drops a cancelled job after its current step."""
        while any(process.cpu_percent(SETTLED_S) > IDLE_PERCENT for process in self._processes.values()):
            pass
        return self.now()

    @contextmanager
    def peaks(self) -> Iterator[dict[str, Sizes]]:
        """Yield each process's sizes at its peak, updated until the context ends."""
        largest = self.now()
        is_over = threading.Event()

        def sample() -> None:
            while not is_over.wait(SAMPLE_S):
                for name, found in self.now().items():
                    largest[name] = max(largest[name], found, key=lambda each: each["PSS"])

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield largest
        finally:
            is_over.set()
            thread.join()


def data_set(folder: Path, tokens: int) -> Path:
    """Make examples of about this many tokens, with different prompts and completions of about 50 tokens."""
    tokenizer = load_tokenizer(w.MODEL)
    file = folder / "long.jsonl"
    with file.open("w") as lines:
        for prompt in w.prompts(EXAMPLES, tokens - 62, tokens - 62):
            asked = {"role": "user", "content": tokenizer.decode(prompt)}
            lines.write(json.dumps({"messages": [asked, {"role": "assistant", "content": COMPLETION}]}) + "\n")
    return file


def show(title: str, found: dict[str, Sizes]) -> None:
    print(f"\n| {title}, MB | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    for name, row in [*found.items(), ("together", sum(found.values(), Counter()))]:
        print(f"| {name} | {' | '.join(f'{row[column] / 1e6:.0f}' for column in COLUMNS)} |")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--positions", nargs="+", default=["l1", "f7+l7"], help="a job of each, rank 4, all layers")
    arguments.add_argument("--tokens", type=int, default=512, help="of an example")
    arguments.add_argument("--batch-size", type=int, default=10)
    arguments.add_argument("--seconds", type=float, default=20.0, help="of each job after its first step")
    arguments.add_argument("--quantization", choices=["none", "int8"], default="none")
    args = arguments.parse_args()
    env = {"REFTSERVE_QUANTIZATION": args.quantization}
    with tempfile.TemporaryDirectory() as scratch, running_server(w.MODEL, Path(scratch) / "data", env=env) as server:
        client, watch = Client(server.url), Watch(server)
        file = data_set(Path(scratch), args.tokens)
        gaps(server, STREAMS, SERVE_S)
        idle = watch.settled()
        show("idle", idle)
        for where in args.positions:
            with watch.peaks() as largest:
                job = begin_job(client, server, where, file, args.batch_size)
                time.sleep(args.seconds)
            show(f"a job at {where}, peak", largest)
            end_job(job)
            rows = (largest["worker"], watch.settled()["worker"])
            over = [(row["PSS"] - idle["worker"]["PSS"]) / 1e6 for row in rows]
            print(f"\nworker over idle: {over[0]:.0f} MB at its peak, {over[1]:.0f} MB afterwards")


if __name__ == "__main__":
    main()
