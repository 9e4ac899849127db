"""Write the drawing of the rooms into docs/architecture.md, from the import contracts; --check compares instead."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = (
    "<!-- rooms: made by `make docs` from pyproject.toml and the packages' docstrings -->",
    "<!-- end of rooms -->",
)
LAYERS = "inside the server: each room stands on those below it"
NAME_WIDTH = 20


def drawing() -> str:
    """Return the block: each layer of the server, from the top down, then the other contracts."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["name"] == LAYERS)
    rows = [line for layer in layers for line in _layer(layer.split(" | "))]
    others = [f"- {contract['name']}" for contract in contracts if contract["name"] != LAYERS]
    return "\n".join([BEGIN, "```", *rows, "```", "", "import-linter holds this drawing, and:", "", *others, END])


def _layer(modules: list[str]) -> list[str]:
    rows = [f"{module:<{NAME_WIDTH}}{_summary(module)}" for module in modules]
    return ["─" * 110, *rows]


def _summary(module: str) -> str:
    """Return the first line of a module's docstring."""
    path = ROOT / "server" / module
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n", 1)[0]


def main() -> None:
    """Write the drawing into the page, or check it and exit with 1 when it is out of date."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    drawn = before + drawing() + after
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(drawn, encoding="utf-8")
    elif drawn != page:
        sys.exit("the drawing in docs/architecture.md is not what the import contracts say: run `make docs`")


if __name__ == "__main__":
    main()
