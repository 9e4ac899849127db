"""The client: one method for each task of a user, and the resources as attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Unpack

import httpx

from reftserve.client._async.connection import AsyncConnection
from reftserve.client._async.evals import AsyncEvals
from reftserve.client._async.files import AsyncFiles
from reftserve.client._async.interventions import AsyncInterventions
from reftserve.client._async.jobs import AsyncJob, AsyncJobs
from reftserve.client._async.models import AsyncModels
from reftserve.client._async.streams import AsyncTextStream
from reftserve.client.address import DEFAULT_URL
from reftserve.client.calls import generation
from reftserve.client.calls.call import Call
from reftserve.client.calls.files import DataFile
from reftserve.client.calls.generation import ClassifyOptions, GenerationOptions, Messages
from reftserve.client.calls.jobs import TrainingOptions, check_data, create_job
from reftserve.client.calls.models import readiness
from reftserve.client.concurrency import coroutine_method
from reftserve.client.exceptions import ConnectionFailed, Unavailable
from reftserve.client.schemas import ChatCompletion, Classification, Completion, DataReport
from reftserve.client.transport import MAX_RETRIES, TIMEOUT

T = TypeVar("T")


class AsyncClient:
    """A connection to a ReftServe server; raises the exceptions that `reftserve.client.exceptions` draws.

    url: with or without scheme and `/v1`. api_key: sent as a bearer token. max_retries: after 429 and 503, and after a
    broken connection if the call is idempotent.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float = TIMEOUT,
        max_retries: int = MAX_RETRIES,
    ) -> None:
        self._connection = AsyncConnection(url, api_key, timeout, max_retries)
        self.files = AsyncFiles(self._connection)
        self.jobs = AsyncJobs(self._connection)
        self.models = AsyncModels(self._connection)
        self.interventions = AsyncInterventions(self._connection)
        self.evals = AsyncEvals(self._connection, self.files, self.models)

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> Completion:
        """Continue a text, or token ids."""
        return await self.send(generation.generate(await self._model(options), prompt, options))

    async def chat(self, messages: Messages, **options: Unpack[GenerationOptions]) -> ChatCompletion:
        """Answer a conversation. A string is one user message."""
        return await self.send(generation.chat(await self._model(options), messages, options))

    async def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncTextStream:
        """Return the text of `generate(prompt)` or `chat(messages)` piece by piece. Raises ValueError for n > 1."""
        generation.refuse_several_answers(options)
        call = generation.stream(await self._model(options), prompt, messages, options)
        return AsyncTextStream(await self._connection.open(call))

    async def classify(
        self,
        text: str | Sequence[str] | None = None,
        *,
        labels: Sequence[str],
        messages: Sequence[Any] | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Classification:
        """Return each label's probability as the answer to one or several texts or conversations.

        labels: whole answers of the assistant for messages; whole continuations, leading space included, for texts.
        """
        return await self.send(generation.classify(await self._model(options), text, messages, labels, options))

    async def train(
        self,
        training_file: DataFile,
        *,
        name: str,
        validation_file: DataFile | None = None,
        model: str | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[TrainingOptions],
    ) -> AsyncJob:
        """Train an intervention and publish it as the next version of `name`.

        Returns at once; the job then checks its data. The job's `wait` raises JobEnded if these cannot be learned.
        Files: a path, which wins over an id and is uploaded unless the server has that content under that name; the
        result of `files.upload`; or its id, `file-...`.
        """
        training, validation = await self._ids_of(training_file, validation_file)
        call = create_job(
            model or await self.models.base(),
            training,
            options,
            name=name,
            validation_file=validation,
            seed=seed,
            metadata=metadata,
        )
        return AsyncJob(self._connection, await self.send(call))

    async def check_data(
        self,
        training_file: DataFile,
        *,
        validation_file: DataFile | None = None,
        model: str | None = None,
        seed: int | None = None,
        **options: Unpack[TrainingOptions],
    ) -> DataReport:
        """Report on the data that `train` would use, and keep uploaded files. Trains nothing. Files: as for `train`."""
        training, validation = await self._ids_of(training_file, validation_file)
        call = check_data(model or await self.models.base(), training, options, validation_file=validation, seed=seed)
        return await self.send(call)

    @coroutine_method
    async def base_model(self) -> str:
        """The base model's id."""
        return await self.models.base()

    async def is_ready(self) -> bool:
        """Return whether a server answers and its model and database are there. Does not retry."""
        try:
            return (await self._connection.send_once(readiness())).ready
        except (ConnectionFailed, Unavailable):
            return False

    async def send(self, call: Call[T]) -> T:
        """Return the answer to a call, after retries where they are safe."""
        return await self._connection.send(call)

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _model(self, options: GenerationOptions | ClassifyOptions) -> str:
        return options.get("model") or await self.models.base()

    async def _ids_of(self, training_file: DataFile, validation_file: DataFile | None) -> tuple[str, str | None]:
        training = await self.files.id_of(training_file)
        return training, None if validation_file is None else await self.files.id_of(validation_file)
