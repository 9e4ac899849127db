"""Write docs/settings.md from the settings class; with --check, say instead whether the page is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from reftserve.server.settings import GROUPS
from reftserve.server.settings_reference import Setting, settings_reference

PAGE = Path(__file__).with_name("settings.md")
HEAD = """\
<!-- Made by `make docs` from server/settings.py; edit that file. -->
# Settings

A setting comes from one of three places. In rising precedence:

1. a TOML file, named by `--config` or `REFTSERVE_CONFIG`: `kv_cache_bytes = "2GiB"`
2. an environment variable, `REFTSERVE_` and the name in capitals: `REFTSERVE_KV_CACHE_BYTES=2GiB`
3. a flag of `reftserve serve`, `reftserve worker` or `reftserve doctor`: `--kv-cache-bytes 2GiB`

So a variable changes a container that mounts a file. `--help` shows which settings have a flag. `reftserve doctor`
checks what the machine gives: folders, limits, port, proxies, database and model.

- Sizes are bytes, or a number with a unit: `512MiB`, `2GiB`; `2GB` is 2,000,000,000 bytes.
- A switch is `true` or `false`; as a flag it is `--worker` or `--no-worker`.
- An empty variable is not given. `~` in a path is the home folder.
- An unknown name, and a settings file that does not exist, is refused at start, with near names.
- Kubernetes sets variables in pods when a service is called `reftserve`, such as `REFTSERVE_PORT=tcp://10.0.0.1:80`. A
  variable with such a name and such a value is ignored, and the log names it; to set the port there, use `--port` or a
  file, or `enableServiceLinks: false`.
- Settings cannot change while the server runs. Child processes get them from the server.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD]
    settings = settings_reference().values()
    for group, section in GROUPS.items():
        rows = "\n".join(_row(setting) for setting in settings if setting.group == group)
        table = f"| setting | variable | type | default | meaning |\n| --- | --- | --- | --- | --- |\n{rows}"
        parts.append(f"## {group}\n\n{section.__doc__}\n\n{table}\n")
    return "\n".join(parts)


def _row(setting: Setting) -> str:
    kind = ", ".join(setting.choices) or setting.type
    return f"| `{setting.name}` | `{setting.variable}` | {kind} | {setting.default} | {setting.meaning} |"


def main() -> None:
    """Write the page, or check it and exit with 1 when it is out of date."""
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/settings.md is not what server/settings.py says: run `make docs`")


if __name__ == "__main__":
    main()
