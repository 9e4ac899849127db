"""`reftserve eval`: compare the base and interventions on a data set."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from reftserve.client._sync.evals import POLL_S, Run
from reftserve.client.cli_output import parse_use, session
from reftserve.client.schemas import Eval

ARGUMENTS = {"accuracy": "labels", "exact_match": "normalize", "contains": "text", "regex": "pattern"}


def evaluate(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="Data set, or the id of an uploaded file")],
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            help="loss, perplexity, exact_match[=squad], f1, accuracy[=label,label...], contains[=text] or "
            "regex=pattern; repeatable; default: loss and exact_match"
        ),
    ] = None,
    intervention: Annotated[
        list[str] | None,
        typer.Option(help="name[@version][*scale]; + composes several; repeatable, one run each"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The eval's name")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Limit of a generated answer")] = None,
) -> None:
    """Score the base and each intervention on a data set, and compare them. Exits with 1 when a run fails."""
    here = session(context)
    criteria = [_criterion(text) for text in criterion or ["loss", "exact_match"]]
    compositions = [[], *([parse_use(part) for part in text.split("+")] for text in intervention or [])]
    created = here.client.evals.create(file, criteria, name=name)
    runs = [
        here.client.evals.run(created.id, interventions=uses or None, max_tokens=max_tokens) for uses in compositions
    ]
    _wait(runs)
    compared = here.client.evals.get(created.id)
    if here.as_json:
        print(json.dumps(compared.model_dump(mode="json")))
    else:
        here.show_table(*_comparison(compared))
    if any(run.status != "completed" for run in compared.runs):
        raise typer.Exit(1)


def _criterion(text: str) -> dict[str, Any]:
    kind, given, argument = text.partition("=")
    if not given:
        return {"type": kind}
    if kind not in ARGUMENTS:
        raise typer.BadParameter(f"{text!r}: {kind} takes no argument; {', '.join(ARGUMENTS)} do")
    return {"type": kind, ARGUMENTS[kind]: argument.split(",") if kind == "accuracy" else argument}


def _wait(runs: list[Run]) -> None:
    with Console(stderr=True).status("evaluating") as status:
        for run in runs:
            while not run.refresh().has_ended:
                counts = run.data.result_counts
                done = counts.passed + counts.failed + counts.errored
                status.update(f"{run.data.name}: {done} of {counts.total}")
                time.sleep(POLL_S)


def _comparison(compared: Eval) -> tuple[list[str], list[list[str]]]:
    names = [str(criterion["name"]) for criterion in compared.testing_criteria]
    rows = []
    for run in compared.runs:
        state = run.status if run.error is None else f"{run.status}: {run.error.message}"
        rows.append([run.name, *(_score(run.scores[name]) for name in names), str(run.result_counts.errored), state])
    return ["RUN", *map(str.upper, names), "ERRORS", "STATUS"], rows


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"
