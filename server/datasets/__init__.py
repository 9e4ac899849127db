"""Data sets: from an uploaded file to what a trainer takes, with a report on the way.

file     file_store.py keeps it; reading.py detects its format; json_rows.py and tables.py yield its rows
row      examples.py: which rows there are, and the Examples in them; source_location.py says where a row stands
Example  encoding.py: its token ids, as serving renders them
set      splits.py: training, validation, test;  label_detection.py: whether targets are classes;  report.py
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
