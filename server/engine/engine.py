"""The engine: requests in, tokens out, one step at a time. Single-threaded; the process around it does the talking.

submit ─► (loader) ─► scheduler.add          step():  collect loads
cancel ─► scheduler.finish                            schedule ─► runner.step ─► sample ─► outputs
"""

from __future__ import annotations

from collections import defaultdict

from reftserve.server.engine.errors import RequestRefused
from reftserve.server.engine.kv_cache import BlockAllocator
from reftserve.server.engine.loader import Loader
from reftserve.server.engine.messages import EngineStats, StepOutput, Submit, TokenOutput
from reftserve.server.engine.runner import Runner
from reftserve.server.engine.sampler import sample
from reftserve.server.engine.scheduler import Batch, Scheduler
from reftserve.server.engine.sequence import Sequence, Status

NOT_FINITE = "the logits are not finite: an edit overflows; lower its scale, or train it with a lower learning rate"


class Engine:
    """Continuous batching of requests with any mixture of interventions over one frozen model."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        host_bytes: int = 1 << 30,
        prefix_cache: bool = True,
    ) -> None:
        self.runner = runner
        self.loader = Loader(host_bytes)
        self.scheduler = Scheduler(
            BlockAllocator(runner.cache.num_blocks, runner.cache.block_size),
            runner.bank,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            prefix_cache=prefix_cache,
        )
        self._sequences: dict[str, Sequence] = {}
        self._awaiting: defaultdict[str, list[Sequence]] = defaultdict(list)
        self._outputs: list[TokenOutput] = []
        self._steps = self._prompt_tokens = self._cached_prompt_tokens = self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something now."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._outputs)

    @property
    def is_loading(self) -> bool:
        """Whether an intervention is on its way from disk, so that a step may soon have work."""
        return self.loader.pending

    def submit(self, submit: Submit) -> None:
        """Take a request; what comes of it, an error too, is in the outputs of later steps."""
        sequence = Sequence.from_submit(submit)
        self._sequences[submit.request_id] = sequence
        for ref in sequence.refs:
            intervention = self.loader.get(ref.content_hash)
            if intervention is not None:
                sequence.loaded[ref.content_hash] = intervention
            else:
                self._awaiting[ref.content_hash].append(sequence)
                self.loader.request(ref)
        if sequence.is_loaded:
            self._enqueue(sequence)

    def cancel(self, request_id: str) -> None:
        """Drop a request and free what it holds; one that is unknown or over is no error."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, TokenOutput(request_id, [], "cancelled"))

    def step(self) -> StepOutput:
        """Collect loads, compute one batch, sample; everything that ended or got a token is in the output."""
        self._collect_loads()
        batch = self.scheduler.schedule()
        if batch.chunks:
            self._advance(batch)
        outputs, self._outputs = self._outputs, []
        return StepOutput(outputs, self.stats())

    def stats(self) -> EngineStats:
        """Gauges and counters."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(self._sequences) - len(scheduler.running),
            kv_blocks_used=scheduler.allocator.num_blocks - scheduler.allocator.num_free,
            kv_blocks_total=scheduler.allocator.num_blocks,
            bank_rows_used=self.runner.bank.rows_used,
            bank_rows_total=self.runner.bank.num_rows - 1,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.preemptions,
        )

    def close(self) -> None:
        """End the loader's thread."""
        self.loader.close()

    def _advance(self, batch: Batch) -> None:
        logits = self.runner.step(batch)
        sampling = []
        for chunk in batch.chunks:
            self.scheduler.advance(chunk)
            self._prompt_tokens += max(0, min(chunk.stop, chunk.sequence.n_prompt) - chunk.start)
            if chunk.samples:
                sampling.append(chunk.sequence)
        if sampling:
            tokens = sample(logits, [s.sampling for s in sampling], [len(s.token_ids) for s in sampling])
            for sequence, token in zip(sampling, tokens, strict=True):
                if token is None:
                    self._end(sequence, TokenOutput(sequence.request_id, [], "error", NOT_FINITE))
                else:
                    self._emit(sequence, token)
        self._steps += 1

    def _emit(self, sequence: Sequence, token: int) -> None:
        cached = sequence.n_cached or 0
        if sequence.n_generated == 0:
            self._cached_prompt_tokens += cached
        self._generated_tokens += 1
        finish_reason = sequence.append(token)
        output = TokenOutput(sequence.request_id, [token], finish_reason, cached_tokens=cached)
        if finish_reason is None:
            self._outputs.append(output)
        else:
            self._end(sequence, output)

    def _end(self, sequence: Sequence, output: TokenOutput) -> None:
        self.scheduler.finish(sequence)
        del self._sequences[sequence.request_id]
        self._outputs.append(output)

    def _enqueue(self, sequence: Sequence) -> None:
        try:
            self.scheduler.check(sequence)
        except RequestRefused as refusal:
            self._end(sequence, TokenOutput(sequence.request_id, [], "error", str(refusal)))
        else:
            self.scheduler.add(sequence)

    def _collect_loads(self) -> None:
        for result in self.loader.collect():
            waiting = self._awaiting.pop(result.content_hash, [])
            for sequence in (s for s in waiting if s.status is Status.LOADING):
                if result.intervention is None:
                    self._end(sequence, TokenOutput(sequence.request_id, [], "error", result.error))
                    continue
                sequence.loaded[result.content_hash] = result.intervention
                if sequence.is_loaded:
                    self._enqueue(sequence)
