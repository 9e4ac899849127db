"""One job's steps, each done again as after a crash: nothing is published, stored or ended twice."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from api_data import chat_lines

from reftserve.client.schemas import FineTuningJobCreate
from reftserve.server.base_model import Base, load_model, open_base
from reftserve.server.registry.store import Store, open_store
from reftserve.server.settings import Settings
from reftserve.server.training.data import count_examples
from reftserve.server.training.job_log import JobLog
from reftserve.server.training.jobs import JobService
from reftserve.server.training.run import CANCELLED, Runs

OWNER = "default"


class Workplace:
    def __init__(self, model_folder: Path, data: Path) -> None:
        settings = Settings(model=str(model_folder), data=data)
        self.base: Base = open_base(settings)
        self.store: Store = open_store(settings, self.base.fingerprint, count_examples)
        self.jobs = JobService(self.store, self.base)
        self.log = JobLog(self.store.database)
        model = load_model(self.base.folder, torch.float32, torch.device("cpu"))
        self.runs = Runs(self.store, self.base, model, data / "jobs", checkpoint_steps=10)

    def create(self) -> str:
        file = self.store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(chat_lines(24)))
        reft = {"layers": [1], "rank": 1, "hyperparameters": {"n_epochs": 2, "batch_size": 4}}
        body = {"model": self.base.name, "training_file": file.id, "suffix": "tone"}
        request = FineTuningJobCreate.model_validate({**body, "method": {"type": "reft", "reft": reft}})
        return self.jobs.create(OWNER, request).id


@pytest.fixture
def workplace(tiny_llama_folder: Path, tmp_path: Path) -> Workplace:
    return Workplace(tiny_llama_folder, tmp_path)


def test_publishing_again_after_a_crash_gives_the_same_version(workplace: Workplace) -> None:
    job_id = workplace.create()
    assert workplace.runs.begin(job_id) == 10
    assert workplace.runs.advance(job_id, 0) == 10
    assert workplace.runs.publish(job_id) == workplace.runs.publish(job_id) == "tone@1"
    job = workplace.log.get(job_id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", "tone@1")
    assert [version.version for version in workplace.store.interventions.get(OWNER, "tone").versions] == [1]
    assert len(workplace.store.files.list_all(OWNER, purpose="fine-tune-results")) == 1


def test_a_job_that_was_killed_between_publishing_and_ending_ends_with_what_it_published(workplace: Workplace) -> None:
    job_id = workplace.create()
    workplace.runs.begin(job_id)
    workplace.runs.advance(job_id, 0)
    end, workplace.runs._log.end = workplace.runs._log.end, lambda *_, **__: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        workplace.runs.publish(job_id)
    workplace.runs._log.end = end  # type: ignore[method-assign]
    assert workplace.runs.publish(job_id) == "tone@1"
    assert workplace.log.get(job_id).result_files == [
        file.id for file in workplace.store.files.list_all(OWNER, purpose="fine-tune-results")
    ]


def test_a_cancelled_job_stays_cancelled_whatever_step_is_done_again(workplace: Workplace) -> None:
    job_id = workplace.create()
    workplace.runs.begin(job_id)
    workplace.jobs.cancel(OWNER, job_id)
    assert workplace.runs.advance(job_id, 0) == CANCELLED
    assert workplace.runs.advance(job_id, 0) == CANCELLED
    assert workplace.runs.begin(job_id) == CANCELLED
    assert workplace.log.get(job_id).status == "cancelled"


def test_the_first_event_is_that_the_job_was_created(workplace: Workplace) -> None:
    events, more = workplace.jobs.events(OWNER, workplace.create(), after=None, limit=10)
    assert [event.message.split()[0] for event in events] == ["Created"]
    assert not more


def test_jobs_wait_in_the_order_in_which_they_came(workplace: Workplace) -> None:
    created = [workplace.create() for _ in range(8)]
    assert workplace.log.queued() == created
    assert [job.id for job in workplace.jobs.list_page(OWNER, after=None, limit=20)[0]] == created[::-1]
