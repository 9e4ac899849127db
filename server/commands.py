"""The commands `serve`, `worker` and `doctor`, which the client's CLI adds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from reftserve.server.base.model_errors import BaseModelError
from reftserve.server.errors import ServerError
from reftserve.server.settings import LOG_FORMAT, Settings
from reftserve.server.settings_reference import takes_settings
from reftserve.server.settings_sources import SettingsError, service_links

logger = logging.getLogger(__name__)
app = typer.Typer()
console = Console()


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command: an error that the user can fix becomes one line on standard error and exit code 1."""

    @wraps(command)
    def run(**flags: Any) -> None:
        try:
            command(**flags)
        except ModuleNotFoundError as cause:
            _fail(f"{cause}; pip install 'reftserve[server]'", cause)
        except OSError as cause:
            _fail(": ".join(filter(None, (cause.filename, cause.strerror or str(cause)))), cause)
        except (ServerError, BaseModelError) as cause:
            _fail(str(cause), cause)
        except SettingsError as cause:
            _fail(f"settings: {cause}", cause)

    return run


def _fail(reason: str, cause: Exception) -> NoReturn:
    Console(stderr=True).print("[red]error:[/]", escape(reason), highlight=False, soft_wrap=True)
    raise typer.Exit(1) from cause


COMMON = ("model", "data", "config", "device")


@app.command()
@explained
@takes_settings(
    *COMMON,
    "host",
    "port",
    "root_path",
    "allowed_hosts",
    "cors_origins",
    "database_url",
    "blob_url",
    "worker",
    "served_model_name",
    "dtype",
    "quantization",
    "override_fingerprint",
    "engine_threads",
    "kv_cache_bytes",
    "prefix_cache",
    "max_batch_tokens",
    "max_sequences",
    "bank_bytes",
    "worker_threads",
    "worker_niceness",
    "max_queue",
    "max_wait_s",
    "shutdown_grace_s",
)
def serve(settings: Settings) -> None:
    """Serve a base model and its interventions over HTTP.

    Settings come from a TOML file, the environment and these flags, in order of rising precedence (docs/settings.md).
    """
    _begin(settings)
    from reftserve.server.main import serve as run_server

    run_server(settings)


@app.command()
@explained
@takes_settings(
    *COMMON,
    "database_url",
    "blob_url",
    "dtype",
    "worker_threads",
    "worker_niceness",
    "worker_yields",
    "activation_cache_bytes",
    "activation_cache_disk_bytes",
)
def worker(settings: Settings) -> None:
    """Run a separate training worker on the server's data folder. Several workers share the jobs."""
    _begin(settings)
    from reftserve.server.training.worker import run

    run(settings)


@app.command()
@explained
@takes_settings(*COMMON, "host", "port", "database_url", "blob_url")
def doctor(
    settings: Settings,
    *,
    store: Annotated[bool, typer.Option("--store", help="Compare the database with the stored files instead")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="With --store: register stored interventions that no row names")
    ] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Hash the base model's files instead")] = False,
) -> None:
    """Check that this machine can serve, one line for each check; exit with code 1 when one fails."""
    if store or rebuild or deep:
        raise typer.Exit(1 if _faults(settings, store=store or rebuild, rebuild=rebuild, deep=deep) else 0)
    from reftserve.server.doctor import checks, examine

    failed = False
    for name, check in checks().items():
        if failed and name == "torch":
            outcome, found = "left", "not checked, because another check failed"
        else:
            outcome, found = examine(check, settings)
        failed |= outcome == "wrong"
        colour = {"ok": "green", "wrong": "red"}.get(outcome, "yellow")
        console.print(f"[{colour}]{outcome:<6}[/]{name}: {escape(found)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


def _faults(settings: Settings, *, store: bool, rebuild: bool, deep: bool) -> int:
    from reftserve.server.store_doctor import examine

    faults = 0
    for line in examine(settings, store=store, rebuild=rebuild, deep=deep):
        faults += line.is_fault
        word = "[red]wrong[/]" if line.is_fault else "[green]ok[/]   "
        console.print(f"{word} {escape(line.text)}", highlight=False, soft_wrap=True)
    return faults


def _begin(settings: Settings) -> None:
    """Make the checks that take less than a second, before the slow imports. Raises ServerError, BaseModelError."""
    from reftserve.server.base.folder import check_base
    from reftserve.server.environment import check_environment

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    if links := service_links(os.environ):
        logger.info("ignored, because Kubernetes sets these variables for a service: %s", ", ".join(links))
    check_environment(settings)
    check_base(settings)


if __name__ == "__main__":
    app()
