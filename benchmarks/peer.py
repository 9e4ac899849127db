"""Run a script of `peers/` in its environment, which `peers/setup.sh` makes."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import workload as w

PEERS = Path(__file__).parent / "peers"


def run_peer(environment: str, script: str, job: dict[str, object]) -> list[str]:
    """Run the script, and return its RESULT lines without that word. Exit with its errors if there are none."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        python = w.ROOT / ".peers" / environment / "bin" / "python"
        # Without this environment's paths: its modules may have the same names.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([python, PEERS / script, file.name], capture_output=True, text=True, check=False, env=own)
    results = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not results:
        raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
    return results
