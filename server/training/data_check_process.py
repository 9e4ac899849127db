"""The process that checks the data of one job: `python -P -m reftserve.server.training.data_check_process`.

It takes a CheckTask on standard input and answers with a CheckAnswer on standard output, both in JSON.
"""

from __future__ import annotations

import os
import resource
import sys

import msgspec

from reftserve.server.base.folder import Base, open_base
from reftserve.server.errors import InvalidRequest
from reftserve.server.training.data_check import CheckAnswer, CheckTask
from reftserve.server.training.preparation import prepare

NICENESS = 10  # the engine's and the HTTP process's work comes first


def main() -> None:
    """Check the data and print the answer."""
    task = CheckTask.model_validate_json(sys.stdin.read())
    os.nice(NICENESS)
    # A thread of the tokenizer that finds no memory would leave the main one waiting for it.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    base = open_base(task.settings)
    # RLIMIT_DATA counts what the process can write to; RLIMIT_AS would count mapped libraries too.
    resource.setrlimit(resource.RLIMIT_DATA, (task.memory_bytes, task.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.buffer.write(msgspec.json.encode(_answer(base, task)))


def _answer(base: Base, task: CheckTask) -> CheckAnswer:
    try:
        report = prepare(base, task.method, task.files, seed=task.seed).report
    except InvalidRequest as cause:
        return CheckAnswer(message=cause.message, param=cause.param, code=cause.code)
    except MemoryError:
        return CheckAnswer(
            message=f"checking the data takes more than {task.memory_bytes >> 20} MiB of memory; create the job, which "
            "checks its data in the background, or use a part",
            param="training_file",
            code="data_too_large",
        )
    return CheckAnswer(report=report.model_dump_json())


if __name__ == "__main__":
    main()
