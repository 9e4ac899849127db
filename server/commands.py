"""The commands `serve`, `worker` and `doctor`, which the client's CLI adds."""

from __future__ import annotations

import platform
import shutil
import socket
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from reftserve.server.errors import ServerError
from reftserve.server.settings import Settings, SettingsError
from reftserve.server.settings_reference import takes_settings

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
        except ServerError as cause:
            _fail(cause.message, cause)
        except SettingsError as cause:
            _fail(f"settings: {cause}", cause)
        except ValidationError as cause:
            wrong = (
                f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in cause.errors()
            )
            _fail(f"settings: {'; '.join(wrong)}", cause)

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

    Settings come from the environment, a TOML file and these flags, in order of rising precedence (docs/settings.md).
    """
    from reftserve.server.base.folder import resolve_model_folder

    resolve_model_folder(settings)  # fail before the slow imports
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
    from reftserve.server.base.folder import resolve_model_folder

    resolve_model_folder(settings)
    from reftserve.server.training.worker import run

    run(settings)


@app.command()
@explained
@takes_settings(*COMMON, "host", "port")
def doctor(settings: Settings) -> None:
    """Check that this machine can serve; exit with code 1 when a check fails."""
    checks: list[tuple[str, Callable[[Settings], str]]] = [
        ("python", lambda _: platform.python_version()),
        ("base model", _check_model),
        ("data folder", _check_data),
        ("port", _check_port),
        ("torch", _check_torch),  # last, because the import takes seconds
    ]
    failed = 0
    for name, check in checks:
        if failed and check is _check_torch:
            console.print("[yellow]left[/]  torch: not checked, because another check failed")
            break
        try:
            console.print(f"[green]ok[/]    {name}: {check(settings)}", highlight=False)
        except (ServerError, OSError, ImportError) as cause:
            failed += 1
            console.print(f"[red]wrong[/] {name}: {cause}", highlight=False)
    raise typer.Exit(1 if failed else 0)


def _check_torch(settings: Settings) -> str:
    import torch

    from reftserve.server.base.model import resolve_device

    return f"{torch.__version__} on {resolve_device(settings.device)}, {torch.get_num_threads()} threads"


def _check_model(settings: Settings) -> str:
    from reftserve.server.base.folder import model_name, resolve_model_folder

    return f"{model_name(settings)} in {resolve_model_folder(settings)}"


def _check_data(settings: Settings) -> str:
    settings.data.mkdir(parents=True, exist_ok=True)
    probe = settings.data / ".probe"
    probe.touch()
    probe.unlink()
    free = shutil.disk_usage(settings.data).free
    return f"{settings.data.resolve()}, {free / 2**30:.1f} GiB free"


def _check_port(settings: Settings) -> str:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    return f"{settings.host}:{settings.port} is free"


if __name__ == "__main__":
    app()
