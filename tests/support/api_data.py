"""Data sets and jobs for tests that use a server through OpenAI's client."""

from __future__ import annotations

import json
import time

import openai

BASE = "tiny-llama"


def chat_lines(count: int) -> bytes:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {'yes' if i % 2 else 'no'} {i}"},
                {"role": "assistant", "content": "yes" if i % 2 else "no"},
            ]
        }
        for i in range(count)
    ]
    return "\n".join(json.dumps(row) for row in rows).encode()


def finished(client: openai.OpenAI, job_id: str) -> openai.types.fine_tuning.FineTuningJob:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.2)
    raise AssertionError(f"job {job_id} has not ended: {client.fine_tuning.jobs.list_events(job_id)}")
