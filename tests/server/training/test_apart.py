"""Server and worker run apart: `reftserve serve --no-worker`, and `reftserve worker` on the same data folder."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
from api_data import BASE, chat_lines, finished
from running_server import running_server


def test_a_worker_of_its_own_takes_the_jobs_of_a_server_without_one(tiny_llama_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reftserve.server.commands", "worker"]
    command += ["--model", str(tiny_llama_folder), "--data", str(tmp_path)]
    with running_server(tiny_llama_folder, tmp_path, worker=False) as server:
        assert httpx.get(f"{server.url}/ready").json()["worker"] is False
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
        file = client.files.create(file=("set.jsonl", chat_lines(24)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, suffix="apart")
        time.sleep(1)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as worker:
            try:
                assert finished(client, job.id).fine_tuned_model == "apart@1"
                assert httpx.get(f"{server.url}/ready").json()["worker"] is True
                second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
                assert second.returncode == 1
                assert "another worker has the data folder" in second.stderr
            finally:
                worker.terminate()
