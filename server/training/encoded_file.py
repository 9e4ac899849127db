"""Encoded examples in a file, in safetensors' format.

token_ids   [tokens] int32         prompt and completion of each example, one example after the other
lengths     [examples, 2] int32    tokens of the prompt, tokens of the completion
rows        [examples] int64       number of the example's row in the uploaded file; the metadata has its unit
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from reftserve.server.datasets import EncodedExample, SourceLocation


def write_encoded(file: Path, examples: Sequence[EncodedExample]) -> None:
    """Write examples that all have locations of one unit; there is at least one."""
    locations = [example.location for example in examples if example.location is not None]
    ids = chain.from_iterable(chain(example.prompt_ids, example.completion_ids) for example in examples)
    tensors: dict[str, NDArray[Any]] = {
        "token_ids": np.fromiter(ids, np.int32),
        "lengths": np.array([(len(e.prompt_ids), len(e.completion_ids)) for e in examples], np.int32),
        "rows": np.array([location.number for location in locations], np.int64),
    }
    # save_file raises no OSError on a full disk.
    file.write_bytes(save(tensors, {"unit": locations[0].unit}))


def read_encoded(file: Path) -> list[EncodedExample]:
    """Return the examples of a file that `write_encoded` wrote."""
    with safe_open(file, "numpy") as opened:
        unit: Any = opened.metadata()["unit"]
        token_ids, lengths, rows = (opened.get_tensor(name) for name in ("token_ids", "lengths", "rows"))
    ends = np.cumsum(lengths.sum(axis=1))
    examples = []
    for end, (n_prompt, n_completion), row in zip(ends.tolist(), lengths.tolist(), rows.tolist(), strict=True):
        ids = token_ids[end - n_prompt - n_completion : end].tolist()
        examples.append(EncodedExample(tuple(ids[:n_prompt]), tuple(ids[n_prompt:]), SourceLocation(unit, row)))
    return examples
