"""Data sets: from an uploaded file to the examples that a trainer takes.

file_store         uploads and job results
check              the check of an upload, in a process of its own (check_process) with limits
reading            a file's format and its rows (unpacking, text_encoding; json_rows, csv_rows, parquet_rows)
parquet_types      the columns that a Parquet file may have
rows               a row's fields and the Examples that it holds (conversations, field_checks, foreign_rows, columns)
limits             bounds on what is read;  source_location: a row's place in its file
label_detection    whether the targets are class labels
encoding           an Example's token ids, as serving renders them
splits             training, validation and test parts
report             a summary and warnings, before a job is queued
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reftserve.server.datasets.encoding import EncodedExample, encode
    from reftserve.server.datasets.examples import ChatPrompt, Example, Instruction, Turn
    from reftserve.server.datasets.label_detection import label_set
    from reftserve.server.datasets.reading import count_examples, dataset_hash, read_examples
    from reftserve.server.datasets.report import EncodedFile, encode_file, make_report
    from reftserve.server.datasets.source_location import SourceLocation
    from reftserve.server.datasets.splits import MIN_EXAMPLES, Splits, split

# Imported when they are used: each upload starts a process, which needs the readers and not the tokenizer.
_MODULES = {
    "encoding": ("EncodedExample", "encode"),
    "examples": ("ChatPrompt", "Example", "Instruction", "Turn"),
    "label_detection": ("label_set",),
    "reading": ("count_examples", "dataset_hash", "read_examples"),
    "report": ("EncodedFile", "encode_file", "make_report"),
    "source_location": ("SourceLocation",),
    "splits": ("MIN_EXAMPLES", "Splits", "split"),
}

__all__ = [
    "MIN_EXAMPLES",
    "ChatPrompt",
    "EncodedExample",
    "EncodedFile",
    "Example",
    "Instruction",
    "SourceLocation",
    "Splits",
    "Turn",
    "count_examples",
    "dataset_hash",
    "encode",
    "encode_file",
    "label_set",
    "make_report",
    "read_examples",
    "split",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
