"""Data sets: from an uploaded file to the examples that a trainer takes.

file_store         uploads and job results
reading            a file's format and its rows (json_rows, tables), each with its source_location
examples           a row's fields and the Examples that it holds
label_detection    whether the targets are class labels
encoding           an Example's token ids, as serving renders them
splits             training, validation and test parts
report             a summary and warnings, before a job is queued
"""

from reftserve.server.datasets.encoding import EncodedExample, encode
from reftserve.server.datasets.examples import Example, Instruction
from reftserve.server.datasets.label_detection import label_set
from reftserve.server.datasets.reading import count_examples, dataset_hash, read_examples
from reftserve.server.datasets.report import EncodedFile, encode_file, make_report
from reftserve.server.datasets.source_location import SourceLocation
from reftserve.server.datasets.splits import MIN_EXAMPLES, Splits, split

__all__ = [
    "MIN_EXAMPLES",
    "EncodedExample",
    "EncodedFile",
    "Example",
    "Instruction",
    "SourceLocation",
    "Splits",
    "count_examples",
    "dataset_hash",
    "encode",
    "encode_file",
    "label_set",
    "make_report",
    "read_examples",
    "split",
]
