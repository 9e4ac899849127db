"""The client for asyncio: the methods of `Client`, to be awaited.

async with AsyncClient() as client:
job = await client.train("reviews.jsonl", name="sentiment")
await job.wait(progress=True)
answer = await client.chat("Is this good? ...", model=job.fine_tuned_model)
async with await client.stream("Once upon a time") as pieces: ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack

import httpx
from tenacity import AsyncRetrying

from reftserve.client import calls
from reftserve.client.calls import Call, ClassifyOptions, GenerationOptions, Messages, TrainingOptions
from reftserve.client.evals import AsyncEvals
from reftserve.client.event_reader import EventReader
from reftserve.client.exceptions import ConnectionFailed, Unavailable
from reftserve.client.jobs import AsyncJob
from reftserve.client.retries import reconnect_policy, retry_policy
from reftserve.client.schemas import (
    ChatCompletion,
    Classification,
    Completion,
    DataReport,
    Deleted,
    FileObject,
    FineTuningJob,
    InterventionHistory,
    InterventionInfo,
    InterventionVersion,
    Model,
)
from reftserve.client.streams import AsyncTextStream
from reftserve.client.transport import DEFAULT_URL, MAX_RETRIES, TIMEOUT, answered, checked, headers, opened

T = TypeVar("T")
TrainingFile = str | Path | FileObject


class AsyncClient:
    """A connection to a ReftServe server, and an asynchronous context manager that closes it.

    url: without `/v1`. api_key: sent as a bearer token. max_retries: of 429, 503 and, where a call is idempotent,
    of broken connections. Methods raise what `reftserve.client.exceptions` draws.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float = TIMEOUT,
        max_retries: int = MAX_RETRIES,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=headers(api_key), timeout=timeout)
        self._max_retries = max_retries
        self._base_model: str | None = None
        self.files = AsyncFiles(self)
        self.jobs = AsyncJobs(self)
        self.models = AsyncModels(self)
        self.interventions = AsyncInterventions(self)
        self.evals = AsyncEvals(self)

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> Completion:
        """How a text, or token ids, go on."""
        return await self.send(calls.generate(calls.completion_body(await self._model(options), prompt, options)))

    async def chat(self, messages: Messages, **options: Unpack[GenerationOptions]) -> ChatCompletion:
        """The next turn of a conversation; a string is one message of the user."""
        return await self.send(calls.chat(calls.chat_body(await self._model(options), messages, options)))

    async def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncTextStream:
        """The text of `generate(prompt)` or `chat(messages)`, piece by piece."""
        return await self._open(calls.streamed(calls.either(await self._model(options), prompt, messages, options)))

    async def classify(
        self,
        text: str | Sequence[str] | None = None,
        *,
        labels: Sequence[str],
        messages: Sequence[Any] | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Classification:
        """How likely each label is as the answer: to a text, or several; or to messages, one conversation or several.

        A label is the assistant's whole answer, or how a text goes on and ends, leading space included.
        """
        return await self.send(calls.classify(await self._model(options), text, messages, labels, options))

    async def train(
        self,
        training_file: TrainingFile,
        *,
        name: str,
        validation_file: TrainingFile | None = None,
        model: str | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[TrainingOptions],
    ) -> AsyncJob:
        """Train an intervention and publish it as the next version of `name`; see `Job.wait`.

        Files: a path, which is uploaded, or what `files.upload` gave, or its id (`file-...`).
        """
        call = calls.create_job(
            model or await self.base_model(),
            await self._file_id(training_file),
            name=name,
            validation_file=None if validation_file is None else await self._file_id(validation_file),
            seed=seed,
            metadata=metadata,
            **options,
        )
        return AsyncJob(self, await self.send(call))

    async def check_data(
        self,
        training_file: TrainingFile,
        *,
        validation_file: TrainingFile | None = None,
        model: str | None = None,
        seed: int | None = None,
        **options: Unpack[TrainingOptions],
    ) -> DataReport:
        """What `train` would learn from, and what should be looked at before; trains nothing.

        Files: as for `train`; what is uploaded stays.
        """
        call = calls.check_data(
            model or await self.base_model(),
            await self._file_id(training_file),
            validation_file=None if validation_file is None else await self._file_id(validation_file),
            seed=seed,
            **options,
        )
        return await self.send(call)

    async def base_model(self) -> str:
        """The base model's id."""
        if self._base_model is None:
            self._base_model = (await self.models.list())[0].id
        return self._base_model

    async def is_ready(self) -> bool:
        """Whether a server answers, with model, worker and database in place; asked once, without retries."""
        try:
            return (await self._answer(calls.readiness())).ready
        except (ConnectionFailed, Unavailable):
            return False

    async def send(self, call: Call[T]) -> T:
        """The answer to a call, after as many retries as it takes and is allowed."""
        return await AsyncRetrying(**retry_policy(call, self._max_retries))(self._answer, call)

    async def open_events(self, reader: EventReader) -> httpx.Response:
        """The stream of a job's events from where `reader` stands; a server that is away is waited for."""
        return await AsyncRetrying(**reconnect_policy())(self._open_events_once, reader)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _answer(self, call: Call[T]) -> T:
        with opened(call) as arguments, answered():
            response = await self._http.request(call.method, call.path, **arguments)
        return call.read(checked(response))

    async def _open(self, call: Call[None]) -> AsyncTextStream:
        return AsyncTextStream(await AsyncRetrying(**retry_policy(call, self._max_retries))(self._open_once, call))

    async def _open_once(self, call: Call[None]) -> httpx.Response:
        with opened(call) as arguments, answered():
            request = self._http.build_request(call.method, call.path, **arguments)
            response = await self._http.send(request, stream=True)
            if response.is_error:
                await response.aread()
        return checked(response)

    async def _open_events_once(self, reader: EventReader) -> httpx.Response:
        return await self._open_once(reader.next_call())

    async def _model(self, options: GenerationOptions | ClassifyOptions) -> str:
        return options.get("model") or await self.base_model()

    async def _file_id(self, file: TrainingFile) -> str:
        if isinstance(file, FileObject):
            return file.id
        return file if calls.is_file_id(file) else (await self.files.upload(file)).id


class AsyncFiles:
    """`client.files`: data sets and results."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def upload(
        self, file: str | Path | bytes, *, purpose: str = "fine-tune", filename: str | None = None
    ) -> FileObject:
        """Upload a path, or bytes; a data set is validated row by row."""
        return await self._client.send(calls.upload_file(file, purpose, filename))

    async def list(self, *, purpose: str | None = None) -> list[FileObject]:
        """All files, newest first."""
        return await self._client.send(calls.list_files(purpose))

    async def get(self, file_id: str) -> FileObject:
        """One file."""
        return await self._client.send(calls.get_file(file_id))

    async def content(self, file_id: str) -> bytes:
        """A file's bytes."""
        return await self._client.send(calls.file_content(file_id))

    async def delete(self, file_id: str) -> Deleted:
        """Delete a file."""
        return await self._client.send(calls.delete_file(file_id))


class AsyncJobs:
    """`client.jobs`: training runs."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, *, after: str | None = None, limit: int = 20) -> list[FineTuningJob]:
        """Jobs, newest first; `after` continues behind a job's id."""
        page = await self._client.send(calls.list_jobs(after, limit))
        return page.data

    async def get(self, job_id: str) -> AsyncJob:
        """One job, to wait for or watch."""
        return AsyncJob(self._client, await self._client.send(calls.get_job(job_id)))


class AsyncModels:
    """`client.models`: what `model` can name."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[Model]:
        """The base first, then every intervention."""
        return await self._client.send(calls.list_models())


class AsyncInterventions:
    """`client.interventions`: published interventions, their versions and aliases."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[InterventionInfo]:
        """All, by name."""
        return await self._client.send(calls.list_interventions())

    async def get(self, name: str) -> InterventionInfo:
        """One, with its versions and aliases."""
        return await self._client.send(calls.get_intervention(name))

    async def version(self, name: str, version: int | str = "latest") -> InterventionVersion:
        """A version, by number or alias, with its manifest."""
        return await self._client.send(calls.get_version(name, version))

    async def history(self, name: str, version: int | str = "latest") -> InterventionHistory:
        """How a version was trained, step by step, in columns.

        Raises NotFound when its artifact tells nothing of that.
        """
        return await self._client.send(calls.get_history(name, version))

    async def upload(self, name: str, artifact: str | Path) -> InterventionVersion:
        """Publish an artifact, a folder or a zip of one, as the next version of `name`."""
        return await self._client.send(calls.upload_intervention(name, artifact))

    async def download(self, name: str, folder: str | Path, *, version: int | str = "latest") -> Path:
        """Write a version's artifact into a folder: manifest.json, edits.safetensors, perhaps history.json."""
        return await self._client.send(calls.download_intervention(name, version, folder))

    async def delete(self, name: str, version: int | str | None = None, *, force: bool = False) -> Deleted:
        """Delete one version, or all of them.

        force: even while running requests hold it; they still finish. Raises Conflict otherwise.
        """
        return await self._client.send(calls.delete_intervention(name, version, force=force))

    async def alias(self, name: str, alias: str, version: int) -> InterventionInfo:
        """Point an alias at a version."""
        return await self._client.send(calls.set_alias(name, alias, version))

    async def delete_alias(self, name: str, alias: str) -> InterventionInfo:
        """Remove an alias."""
        return await self._client.send(calls.delete_alias(name, alias))
