"""Write client/_sync, the blocking twin, from client/_async by unasync and ruff; with --check, fail if they differ."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import unasync

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TWIN = ROOT / "client/_async", ROOT / "client/_sync"
NAMES = {
    "_async": "_sync",
    "aclose": "close",
    "aclosing": "closing",
    "aiter_sse": "iter_sse",
    "aread": "read",
    # Their pairs are in client/concurrency.py.
    "async_sleep": "sleep",
    "coroutine_method": "plain_property",
}
HEADER = "# Generated from client/_async/{name} by `make generate`. Change that file instead.\n"


def main() -> None:
    """Write or check the twin, as the command line says."""
    twin = generate()
    if "--check" in sys.argv[1:]:
        committed = {path.name: path.read_text() for path in TWIN.glob("*.py")}
        different = sorted(name for name in twin.keys() | committed if twin.get(name) != committed.get(name))
        if different:
            sys.exit(f"client/_sync differs from client/_async in {', '.join(different)}; run `make generate`")
        return
    TWIN.mkdir(exist_ok=True)
    for path in TWIN.glob("*.py"):
        path.unlink()
    for name, text in twin.items():
        (TWIN / name).write_text(text)


def generate() -> dict[str, str]:
    """Return the text of each file of the twin, by the file's name."""
    sources = sorted(SOURCE.glob("*.py"))
    classes = {name for path in sources for name in re.findall(r"\bAsync[A-Z]\w*", path.read_text())}
    names = NAMES | {name: name.removeprefix("Async") for name in classes}
    with tempfile.TemporaryDirectory() as folder:
        unasync.unasync_files(list(map(str, sources)), [unasync.Rule(str(SOURCE), folder, names)])
        for path in Path(folder).iterdir():
            path.write_text(HEADER.format(name=path.name) + path.read_text())
        _ruff("check", "--quiet", "--select", "I", "--fix", folder)
        _ruff("format", "--quiet", folder)
        return {path.name: path.read_text() for path in Path(folder).iterdir() if path.suffix == ".py"}


def _ruff(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "ruff", *words, "--config", ROOT / "pyproject.toml"], check=True)  # noqa: S603


if __name__ == "__main__":
    main()
