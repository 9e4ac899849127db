"""Data sets: from an uploaded file to what a trainer takes, with a report of what is in it on the way.

file     reading: which format, and from it rows (json_rows, tables)
row      examples: what a row may say, and the Examples that it holds; labels: whether their targets are classes
Example  encoding: its token ids, as serving renders them
         splits: training, validation and test;  report: what is in all that, before a job is queued
"""

from reftserve.server.datasets.encoding import EncodedExample, encode
from reftserve.server.datasets.examples import Example, Instruction
from reftserve.server.datasets.label_detection import label_set
from reftserve.server.datasets.reading import count_examples, dataset_hash, read_examples
from reftserve.server.datasets.report import make_report
from reftserve.server.datasets.source_location import SourceLocation
from reftserve.server.datasets.splits import MIN_EXAMPLES, Splits, split

__all__ = [
    "MIN_EXAMPLES",
    "EncodedExample",
    "Example",
    "Instruction",
    "SourceLocation",
    "Splits",
    "count_examples",
    "dataset_hash",
    "encode",
    "label_set",
    "make_report",
    "read_examples",
    "split",
]
