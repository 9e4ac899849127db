"""The commands that need the server extra: `serve`, `worker`, `doctor`. The client's CLI loads them when installed."""

from __future__ import annotations

import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from reftserve.server.errors import ServerError
from reftserve.server.settings import Settings

app = typer.Typer()
console = Console()

Model = Annotated[str | None, typer.Option(help="Hugging Face id, or a folder with a model in its format")]
Data = Annotated[Path | None, typer.Option(help="Folder for database, artifacts, files and models")]
Config = Annotated[Path | None, typer.Option(help="TOML file with any of the settings")]
Host = Annotated[str | None, typer.Option()]
Port = Annotated[int | None, typer.Option(help="0 takes a free port")]
NoWorker = Annotated[bool, typer.Option("--no-worker", help="Run `reftserve worker` apart")]


@app.command()
def serve(
    model: Model = None,
    data: Data = None,
    host: Host = None,
    port: Port = None,
    config: Config = None,
    no_worker: NoWorker = False,
) -> None:
    """Serve a base model and its interventions over HTTP."""
    with _explained():
        settings = _settings(
            model=model, data=data, host=host, port=port, config=config, worker=False if no_worker else None
        )
        from reftserve.server.base.folder import resolve_model_folder

        resolve_model_folder(settings)  # before all that takes longer
        from reftserve.server.main import serve as run_server

        run_server(settings)


@app.command()
def worker(model: Model = None, data: Data = None, config: Config = None) -> None:
    """Run a training worker apart from the server, on the same data folder; several share the jobs."""
    with _explained():
        settings = _settings(model=model, data=data, config=config)
        from reftserve.server.base.folder import resolve_model_folder

        resolve_model_folder(settings)  # before torch, which takes seconds
        from reftserve.server.training.worker import run

        run(settings)


@app.command()
def doctor(model: Model = None, data: Data = None, port: Port = None, config: Config = None) -> None:
    """Check that this machine can serve; exits with 1 when something is in the way."""
    with _explained():
        settings = _settings(model=model, data=data, port=port, config=config)
    checks: list[tuple[str, Callable[[Settings], str]]] = [
        ("python", lambda _: platform.python_version()),
        ("base model", _check_model),
        ("data folder", _check_data),
        ("port", _check_port),
        ("torch", _check_torch),  # last: it takes seconds
    ]
    failed = 0
    for name, check in checks:
        if failed and check is _check_torch:
            console.print("[yellow]left[/]  torch: not checked while something else is wrong")
            break
        try:
            console.print(f"[green]ok[/]    {name}: {check(settings)}", highlight=False)
        except (ServerError, OSError, ImportError) as cause:
            failed += 1
            console.print(f"[red]wrong[/] {name}: {cause}", highlight=False)
    raise typer.Exit(1 if failed else 0)


def _settings(**flags: Any) -> Settings:
    try:
        return Settings.from_flags(**flags)
    except ValidationError as cause:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in cause.errors())
        raise ServerError(f"settings: {wrong}") from cause


@contextmanager
def _explained() -> Iterator[None]:
    """A reason in one line instead of a traceback for what users can mend."""
    try:
        yield
    except ModuleNotFoundError as cause:
        Console(stderr=True).print(f"[red]error:[/] {cause}; pip install 'reftserve\\[server]'", highlight=False)
        raise typer.Exit(1) from cause
    except ServerError as cause:
        Console(stderr=True).print(f"[red]error:[/] {cause.message}", highlight=False)
        raise typer.Exit(1) from cause


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
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    return f"{settings.host}:{settings.port} is free"


if __name__ == "__main__":
    app()
