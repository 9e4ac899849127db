"""Make the demo's data set from the Stanford Sentiment Treebank: `python examples/make_dataset.py FOLDER`, which holds
sst2.train.txt and sst2.test.txt with lines `LABEL text`, label 0 or 1. Takes 150 training and 60 held-out sentences of
6 to 30 words, half of each label, as chats.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
LABELS = {"0": "negative", "1": "positive"}
INSTRUCTION = "Is this film review positive or negative? Answer with one word.\n\nReview: "
SEED = 7


def main(folder: Path) -> None:
    """Write sentiment.train.jsonl and sentiment.heldout.jsonl beside this file."""
    write(HERE / "sentiment.train.jsonl", sample(folder / "sst2.train.txt", 150))
    write(HERE / "sentiment.heldout.jsonl", sample(folder / "sst2.test.txt", 60))


def sample(source: Path, count: int) -> list[tuple[str, str]]:
    """Return `count` (label, sentence) pairs, half of either label, in random order."""
    rng = random.Random(SEED)  # noqa: S311 - a sample, not a secret
    rows = [line.split(" ", 1) for line in source.read_text("utf-8").splitlines()]
    chosen: list[tuple[str, str]] = []
    for label in LABELS:
        texts = [text.strip() for found, text in rows if found == label and 6 <= len(text.split()) <= 30]
        chosen += [(label, text) for text in rng.sample(texts, count // 2)]
    rng.shuffle(chosen)
    return chosen


def write(target: Path, rows: list[tuple[str, str]]) -> None:
    """Write one chat per line."""
    with target.open("w", encoding="utf-8") as file:
        for label, text in rows:
            messages = [
                {"role": "user", "content": INSTRUCTION + text},
                {"role": "assistant", "content": LABELS[label]},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
