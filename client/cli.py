"""The command line, `reftserve`: a client of a running server, and the server extra's `serve`, `worker` and `doctor`.

Results go to standard output, messages to standard error. The exit code is 1 after a failure.
"""

from __future__ import annotations

import codecs
import io
import json
import locale
import os
import sys
from importlib.metadata import entry_points, version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from reftserve.client import cli_evals, cli_files, cli_interventions, cli_jobs
from reftserve.client._sync.streams import TextStream
from reftserve.client.address import DEFAULT_URL
from reftserve.client.calls.generation import GenerationOptions
from reftserve.client.cli_jobs import INTERRUPTED
from reftserve.client.cli_output import JSON_HELP, URL_HELP, Session, parse_use, session, takes_session_options
from reftserve.client.exceptions import ReftServeError, ResponseError

SERVER_COMMANDS = ("serve", "worker", "doctor")
INSTALL_HINT = "this command needs the server: pip install 'reftserve[server]'"

# One line says what to do about these; a traceback would not add to it.
FAILURES = (ReftServeError, OSError)

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
    url: Annotated[str, typer.Option(envvar="REFTSERVE_URL", help=URL_HELP)] = DEFAULT_URL,
    api_key: Annotated[str | None, typer.Option(envvar="REFTSERVE_API_KEY", show_envvar=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit")
    ] = False,
) -> None:
    """Set the options of every command."""
    context.obj = Session(url or DEFAULT_URL, api_key, as_json)
    context.call_on_close(context.obj.close)


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
    text = _standard_input() if prompt == "-" else prompt
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
    """Return the next message; None at the end of input, at Ctrl-C, and without a standard input."""
    if sys.stdin is None:
        return None
    is_terminal = sys.stdin.isatty()
    try:
        return input("> " if is_terminal else "")
    except (EOFError, KeyboardInterrupt):
        if is_terminal:
            print()
        return None


def _standard_input() -> str:
    try:
        return sys.stdin.read() if sys.stdin is not None else ""
    except UnicodeDecodeError as cause:
        raise typer.BadParameter(f"standard input is not {cause.encoding} at byte {cause.start}") from cause


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


for _app in (app, cli_files.app, cli_jobs.app, cli_interventions.app):
    for _command in _app.registered_commands:
        if _command.callback is not None:
            _command.callback = takes_session_options(_command.callback)


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


def _speak_utf8() -> None:
    """Start again in Python's UTF-8 mode if the locale is ASCII: file names, arguments and answers are UTF-8."""
    if sys.flags.utf8_mode or codecs.lookup(locale.getencoding()).name == "utf-8":
        return
    if codecs.lookup(locale.getencoding()).name == "ascii" and sys.executable:
        os.environ["PYTHONUTF8"] = "1"  # for the server's child processes
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - this program again
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main() -> None:
    """Run the command line; the entry point of the console script."""
    _speak_utf8()
    try:
        _add_server_commands()
        app()
    except FAILURES as cause:
        Console(stderr=True).print("[red]error:[/]", escape(_line(cause)), highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _line(failure: Exception) -> str:
    if isinstance(failure, OSError) and failure.strerror is not None:
        return ": ".join(str(part) for part in (failure.filename, failure.strerror) if part is not None)
    if isinstance(failure, ResponseError) and failure.url is not None:
        return f"{failure} (asked {failure.url})"
    return str(failure)
