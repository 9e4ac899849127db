"""The command line, `reftserve`: a client of a running server, and the server extra's `serve`, `worker` and `doctor`.

Results go to standard output, messages to standard error. The exit code is 1 after a failure.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points, version
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from reftserve.client import cli_evals, cli_files, cli_interventions, cli_jobs
from reftserve.client._sync.client import Client
from reftserve.client._sync.streams import TextStream
from reftserve.client.calls.generation import GenerationOptions
from reftserve.client.cli_output import Session, parse_use, session
from reftserve.client.exceptions import ReftServeError
from reftserve.client.transport import DEFAULT_URL

SERVER_COMMANDS = ("serve", "worker", "doctor")
INSTALL_HINT = "this command needs the server: pip install 'reftserve[server]'"

# One line says what to do about these; a traceback would not add to it.
FAILURES = (
    ReftServeError,
    httpx.InvalidURL,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    TimeoutError,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve and train LoReFT interventions of a language model.",
)
app.add_typer(cli_files.app, name="files")
app.add_typer(cli_jobs.app, name="jobs")
app.add_typer(cli_interventions.app, name="interventions")
app.command("train")(cli_jobs.train)
app.command("eval")(cli_evals.evaluate)

Model = Annotated[str | None, typer.Option(help="Base id, name, name@version or name@alias; default: the base")]
Use = Annotated[list[str] | None, typer.Option("--intervention", help="Compose name[@version][*scale]; repeatable")]
MaxTokens = Annotated[int | None, typer.Option(min=1)]
Temperature = Annotated[float | None, typer.Option(min=0)]
TopP = Annotated[float | None, typer.Option()]
Seed = Annotated[int | None, typer.Option()]
Stop = Annotated[list[str] | None, typer.Option(help="Stop string; repeatable")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("reftserve"))
        raise typer.Exit


@app.callback()
def connection(
    context: typer.Context,
    url: Annotated[str, typer.Option(envvar="REFTSERVE_URL", help="The server's address")] = DEFAULT_URL,
    api_key: Annotated[str | None, typer.Option(envvar="REFTSERVE_API_KEY", show_envvar=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results as JSON")] = False,
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit")
    ] = False,
) -> None:
    """Set the options of every command."""
    client = Client(url, api_key=api_key)
    context.obj = Session(client, as_json)
    context.call_on_close(client.close)


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input")],
    model: Model = None,
    intervention: Use = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Continue a text; print it as it is generated."""
    options = _options(model, intervention, max_tokens, temperature, top_p, seed, stop)
    text = sys.stdin.read() if prompt == "-" else prompt
    with session(context).client.stream(text, **options) as pieces:
        _print(pieces, as_json=session(context).as_json)


@app.command()
def chat(
    context: typer.Context,
    message: Annotated[str | None, typer.Argument(help="One message; default: a conversation")] = None,
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    model: Model = None,
    intervention: Use = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Chat with the base model or an intervention. An empty line or the end of input ends the conversation."""
    options = _options(model, intervention, max_tokens, temperature, top_p, seed, stop)
    history = [] if system is None else [{"role": "system", "content": system}]
    turn = message if message is not None else _ask()
    while turn:
        history.append({"role": "user", "content": turn})
        with session(context).client.stream(messages=history, **options) as pieces:
            _print(pieces, as_json=session(context).as_json)
        history.append({"role": "assistant", "content": pieces.text})
        turn = _ask() if message is None else None


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _options(
    model: str | None,
    interventions: list[str] | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: list[str] | None,
) -> GenerationOptions:
    return {
        "model": model,
        "interventions": [parse_use(text) for text in interventions or []] or None,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
    }


def _print(pieces: TextStream, *, as_json: bool) -> None:
    for piece in pieces:
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        usage = None if pieces.usage is None else pieces.usage.model_dump()
        print(json.dumps({"text": pieces.text, "finish_reason": pieces.finish_reason, "usage": usage}))
    else:
        print()


def _add_server_commands() -> None:
    """Add the server extra's commands, or ones that say how to install it."""
    try:
        for entry_point in entry_points(group="reftserve.commands"):
            app.registered_commands += entry_point.load().registered_commands
    except ImportError as cause:
        reason = str(cause)
        for name in SERVER_COMMANDS:
            app.command(name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
                lambda: _explain(f"{INSTALL_HINT} ({reason})")
            )


def _explain(message: str) -> None:
    Console(stderr=True).print("[red]error:[/]", escape(message), highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    _add_server_commands()
    try:
        app()
    except FAILURES as cause:
        Console(stderr=True).print("[red]error:[/]", escape(_line(cause)), highlight=False, soft_wrap=True)
        sys.exit(1)


def _line(failure: Exception) -> str:
    if isinstance(failure, OSError) and failure.filename is not None:
        return f"{failure.filename}: {failure.strerror}"
    return str(failure)
