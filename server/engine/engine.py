"""The engine: requests in, tokens out, one step at a time. It is single-threaded; process.py handles the messages.

submit ─► (loader, grammar compiler) ─► scheduler.add    step():  collect loads, end expired requests
cancel ─► scheduler.finish                                        schedule ─► launch (+ the next) ─► finish ─► outputs
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from reftserve.server.engine.block_allocator import BlockAllocator
from reftserve.server.engine.engine_errors import RequestRefused
from reftserve.server.engine.grammar_masks import GrammarCompiler
from reftserve.server.engine.loader import Loader
from reftserve.server.engine.logits import ArrivingLogprobs, adjust, logprobs_of
from reftserve.server.engine.messages import EngineStats, StepOutput, Submit, TokenLogprobs, TokenOutput
from reftserve.server.engine.runner import Logits, Runner
from reftserve.server.engine.sampler import present, sample
from reftserve.server.engine.scheduler import Batch, Scheduler
from reftserve.server.engine.sequence import Sequence, Status
from reftserve.server.engine.transfers import ToHost, indices

logger = logging.getLogger(__name__)
NOT_FINITE = "the logits are not finite: an edit overflows; lower its scale, or train it with a lower learning rate"
NO_GRAMMARS = "this engine has no tokenizer, so it cannot follow a grammar"
PRIORITY_STEP_S = 10.0
SIBLING_STEP_S = 1.0
FAILED = "internal error in the engine; see the server's log"
MAX_FAILED_STEPS = 3  # in a row; then the device or the engine is broken, and a new process is needed
# Share of the previous step's time for checking loads, capped so that one long step cannot cause a longer one.
LOADING_SHARE, LONGEST_LOADING_S = 0.1, 0.01
IDLE_LOADING_S = 0.05  # the limit while no sequence runs
MANY_DEADLINES = 64


@dataclass(frozen=True)
class InFlightStep:
    """A launched step whose tokens have not reached the host yet. tokens: [rows] on the device, -1 for no token.

    sampling: the sequence of each row. arriving: the copy of `tokens` to the host; logprobs: that for `logprob_rows`.
    """

    batch: Batch
    sampling: list[Sequence] = field(default_factory=list)
    tokens: Tensor | None = None
    arriving: ToHost | None = None
    logprob_rows: list[int] = field(default_factory=list)
    logprobs: ArrivingLogprobs | None = None


class Engine:
    """Continuous batching of requests with any mixture of interventions over one frozen model.

    grammars: None refuses structured output. overlap: launch the next step before the host processes this one's tokens.
    A request of priority p is queued as if it had arrived p * PRIORITY_STEP_S later, so that no request waits for ever;
    the nth answer of one request, n * SIBLING_STEP_S later. on_admission: called with the ids of all running requests
    before a step that has new ones.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        host_bytes: int = 1 << 30,
        prefix_cache: bool = True,
        grammars: GrammarCompiler | None = None,
        overlap: bool = False,
        on_admission: Callable[[list[str]], None] | None = None,
    ) -> None:
        self.overlap = overlap
        self.runner = runner
        self.loader = Loader(host_bytes)
        self.grammars = grammars
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
        self._in_flight: InFlightStep | None = None
        self.on_admission = on_admission
        self._admissions = self._failed_steps = 0
        self._deadlines: list[tuple[float, str]] = []
        self._submitted = 0
        self._step_s = self._full_s = 0.0
        self._full_prompt_tokens = self._full_generated_tokens = 0
        self._steps = self._prompt_tokens = self._cached_prompt_tokens = self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step has something to compute or report."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._outputs)

    @property
    def is_loading(self) -> bool:
        """Whether an intervention is loading or a grammar is compiling, so that a step may soon have work."""
        return self.loader.pending or (self.grammars is not None and self.grammars.pending)

    def submit(self, submit: Submit) -> None:
        """Accept a request; later steps output its tokens or its error."""
        now = time.monotonic()
        moment = now + PRIORITY_STEP_S * submit.priority + SIBLING_STEP_S * submit.sibling
        sequence = Sequence.from_submit(submit, order=(moment, self._submitted))
        self._submitted += 1
        self._sequences[submit.request_id] = sequence
        if submit.timeout_s is not None:
            heapq.heappush(self._deadlines, (now + submit.timeout_s, submit.request_id))
        if submit.sampling.grammar:
            if self.grammars is None:
                self._end(sequence, TokenOutput(submit.request_id, [], "error", NO_GRAMMARS))
                return
            self.grammars.request(submit.request_id, submit.sampling.grammar)
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
        """End a request and free its blocks and slots; ignore an unknown or finished one."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, TokenOutput(request_id, [], "cancelled"))

    def step(self) -> StepOutput:
        """Collect loads, compute one batch and sample; return the new tokens and the ended requests.

        An exception ends the requests of its step with an error. Raises it when MAX_FAILED_STEPS in a row fail.
        """
        self._collect_loads()
        began = time.perf_counter()
        self._collect_grammars()
        self._drop_late()
        computed, generated = self._prompt_tokens, self._generated_tokens
        step, self._in_flight = self._in_flight, None
        batch = self.scheduler.schedule() if step is None else step.batch
        while self.scheduler.broken:
            self._end_failed(self.scheduler.broken.pop())
        if batch.chunks:
            try:
                self._compute(batch, step)
            except Exception:
                self._fail(batch)
            else:
                self._failed_steps = 0
        self._step_s = time.perf_counter() - began
        if self.scheduler.waiting:
            self._full_s += self._step_s
            self._full_prompt_tokens += self._prompt_tokens - computed
            self._full_generated_tokens += self._generated_tokens - generated
        outputs, self._outputs = self._outputs, []
        return StepOutput(outputs, self.stats())

    def stats(self) -> EngineStats:
        """Return gauges and counters."""
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
            full_s=self._full_s,
            full_prompt_tokens=self._full_prompt_tokens,
            full_generated_tokens=self._full_generated_tokens,
        )

    def close(self) -> None:
        """Stop the loader's and the grammar compiler's threads."""
        self.loader.close()
        if self.grammars is not None:
            self.grammars.close()

    def _compute(self, batch: Batch, step: InFlightStep | None) -> None:
        """Launch the batch unless it is in flight as `step`, and finish it; perhaps launch the next one before that."""
        if self.on_admission is not None and self.scheduler.admissions > self._admissions:
            self._admissions = self.scheduler.admissions
            self.on_admission([(each.parent or each).request_id for each in self.scheduler.running])
        step = step or self._launch(batch)
        ahead = self._run_ahead(step) if self.overlap else None
        self._finish(step)
        self._in_flight = ahead if self.scheduler.running else None

    def _fail(self, batch: Batch) -> None:
        """End the requests of a batch whose computation raised; the others go on. Requires a current exception."""
        logger.exception("a step of %d requests failed", len(batch.chunks))
        self._failed_steps += 1
        if self._failed_steps == MAX_FAILED_STEPS:
            raise
        self.scheduler.abandon(batch)
        for chunk in batch.chunks:
            self._end_failed(chunk.sequence)

    def _end_failed(self, sequence: Sequence) -> None:
        request = sequence.parent or sequence
        if request.request_id in self._sequences:
            self._end(request, TokenOutput(request.request_id, [], "failed", FAILED))

    def _launch(self, batch: Batch, token_ids: Tensor | None = None) -> InFlightStep:
        logits = self.runner.step(batch, token_ids)
        self._score(batch, logits)
        sampling = [chunk for chunk in batch.chunks if chunk.samples]
        if not sampling:
            return InFlightStep(batch)
        sequences = [chunk.sequence for chunk in sampling]
        logprob_rows = [row for row, s in enumerate(sequences) if s.sampling.logprobs is not None]
        unadjusted = logits.sampling[indices(logprob_rows, logits.sampling.device)] if logprob_rows else None
        # bfloat16 would lose a penalty: near 20 its numbers are 1/8 apart.
        wanted = logits.sampling.float()
        adjust(wanted, sequences)
        tokens = sample(wanted, [s.sampling for s in sequences], [chunk.stop for chunk in sampling])
        logprobs = None
        if unadjusted is not None:
            counts = [sequences[row].sampling.logprobs or 0 for row in logprob_rows]
            # -1 ends the request; token 0 replaces it until the host knows.
            chosen = tokens[indices(logprob_rows, tokens.device)].clamp(min=0)
            logprobs = ArrivingLogprobs(unadjusted, chosen, counts)
        return InFlightStep(batch, sequences, tokens, ToHost(tokens), logprob_rows, logprobs)

    def _run_ahead(self, step: InFlightStep) -> InFlightStep | None:
        ahead = self.scheduler.run_ahead(step.batch)
        if ahead is None or step.tokens is None:
            return None
        batch, rows = ahead
        continued = step.tokens if len(rows) == len(step.tokens) else step.tokens[indices(rows, step.tokens.device)]
        return self._launch(batch, continued.clamp(min=0))

    def _finish(self, step: InFlightStep) -> None:
        tokens = present(step.arriving.tolist()) if step.arriving is not None else []
        read = []
        for chunk in step.batch.chunks:
            sequence = chunk.sequence
            if sequence.status is Status.RUNNING:
                self.scheduler.advance(chunk)
                self._prompt_tokens += max(0, min(chunk.stop, sequence.n_prompt) - chunk.start)
                if chunk.stop == len(sequence.token_ids) and not chunk.samples:
                    read.append(sequence)
        self._take(step, tokens)
        for sequence in read:
            # A fork may have ended with its request.
            if sequence.status is Status.RUNNING:
                self._read(sequence)
        self._steps += 1

    def _read(self, sequence: Sequence) -> None:
        """Handle a sequence that samples nothing and is now fully computed."""
        request = sequence.parent or sequence
        if not all(math.isfinite(entry.logprob) for entry in sequence.scores):
            self._end(request, TokenOutput(request.request_id, [], "error", NOT_FINITE))
            return
        if sequence.parent is not None:
            request.unread.discard(sequence)
            self._drop(sequence)
        elif sequence.continuations:
            self._cached_prompt_tokens += sequence.n_cached or 0
            self.scheduler.keep_prefix(sequence)
            for fork in sequence.fork():
                self._sequences[fork.request_id] = fork
                self.scheduler.add(fork)
        if not request.unread:
            self._end(request, self._output(request, [], "length"))

    def _score(self, batch: Batch, logits: Logits) -> None:
        offset = 0
        for chunk in batch.chunks:
            scored = chunk.scores
            if scored:
                sequence, rows = chunk.sequence, logits.scoring[offset : offset + len(scored)]
                if sequence.continuations:
                    sequence.scores = logprobs_of(rows[0], [c[0] for c in sequence.continuations])
                else:
                    count = sequence.sampling.logprobs or 0
                    following = indices(sequence.following(scored), rows.device)
                    sequence.scores += ArrivingLogprobs(rows, following, [count] * len(rows)).get()
                offset += len(rows)

    def _take(self, step: InFlightStep, tokens: list[int | None]) -> None:
        found = step.logprobs.get() if step.logprobs is not None else []
        logprobs = dict(zip(step.logprob_rows, found, strict=True))
        for row, (sequence, token) in enumerate(zip(step.sampling, tokens, strict=True)):
            if sequence.status is not Status.RUNNING:
                continue
            if sequence.grammar_error is not None:
                self._end(sequence, TokenOutput(sequence.request_id, [], "error", sequence.grammar_error))
            elif token is None:
                self._end(sequence, TokenOutput(sequence.request_id, [], "error", NOT_FINITE))
            else:
                self._emit(sequence, token, [logprobs[row]] if row in logprobs else [])

    def _emit(self, sequence: Sequence, token: int, logprobs: list[TokenLogprobs]) -> None:
        is_first = sequence.n_generated == 0
        if is_first:
            self._cached_prompt_tokens += sequence.n_cached or 0
        self._generated_tokens += 1
        finish_reason = sequence.append(token)
        output = self._output(sequence, [token], finish_reason, logprobs, with_prompt=is_first)
        if finish_reason is None:
            self._outputs.append(output)
        else:
            self._end(sequence, output)

    @staticmethod
    def _output(
        sequence: Sequence,
        token_ids: list[int],
        finish_reason: str | None,
        logprobs: list[TokenLogprobs] | None = None,
        *,
        with_prompt: bool = True,
    ) -> TokenOutput:
        return TokenOutput(
            sequence.request_id,
            token_ids,
            finish_reason,
            cached_tokens=sequence.n_cached or 0,
            logprobs=logprobs or [],
            prompt_logprobs=sequence.scores if with_prompt and not sequence.continuations else [],
            continuation_logprobs=sequence.continuation_logprobs if sequence.continuations else [],
        )

    def _end(self, sequence: Sequence, output: TokenOutput) -> None:
        for each in (*sequence.unread, sequence):
            self._drop(each)
        self._outputs.append(output)

    def _drop(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self._sequences[sequence.request_id]

    def _enqueue(self, sequence: Sequence) -> None:
        try:
            self.scheduler.check(sequence)
        except RequestRefused as refusal:
            self._end(sequence, TokenOutput(sequence.request_id, [], "error", str(refusal)))
        else:
            self.scheduler.add(sequence)

    def _collect_loads(self) -> None:
        busy_s = min(LOADING_SHARE * self._step_s, LONGEST_LOADING_S)
        budget_s = busy_s if self.scheduler.running else IDLE_LOADING_S
        for result in self.loader.collect(budget_s):
            waiting = self._awaiting.pop(result.content_hash, [])
            for sequence in (s for s in waiting if s.status is Status.LOADING):
                if result.intervention is None:
                    self._end(sequence, TokenOutput(sequence.request_id, [], "failed", result.error))
                    continue
                sequence.loaded[result.content_hash] = result.intervention
                if sequence.is_loaded:
                    self._enqueue(sequence)

    def _collect_grammars(self) -> None:
        for compiled in self.grammars.collect() if self.grammars is not None else ():
            sequence = self._sequences.get(compiled.request_id)
            if sequence is None:
                continue
            if compiled.error is not None:
                error = f"the grammar cannot be compiled: {compiled.error}"
                self._end(sequence, TokenOutput(sequence.request_id, [], "error", error))
                continue
            sequence.matcher = compiled.matcher
            if sequence.is_loaded:
                self._enqueue(sequence)

    def _drop_late(self) -> None:
        now = time.monotonic()
        if len(self._deadlines) > 2 * len(self._sequences) + MANY_DEADLINES:  # most belong to finished requests
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._sequences]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                error = f"timed out; {sequence.n_generated} tokens were generated"
                self._end(sequence, TokenOutput(request_id, [], "timeout", error))
