"""The blocking client is generated from the asyncio one."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

from reftserve.client import AsyncClient, Client

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_blocking_client_is_the_generated_one() -> None:
    command = [sys.executable, ROOT / ".ci/generate_sync_client.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_both_clients_have_the_same_methods_and_only_one_awaits() -> None:
    def methods(client: type) -> dict[str, object]:
        return {name: value for name, value in vars(client).items() if not name.startswith("_")}

    assert methods(Client).keys() == methods(AsyncClient).keys()
    assert all(inspect.iscoroutinefunction(method) for method in methods(AsyncClient).values())
    assert not any(inspect.iscoroutinefunction(method) for method in methods(Client).values())
    assert isinstance(Client.base_model, property)
