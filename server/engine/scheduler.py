"""Decides what each step computes: which tokens of which sequences, under a token budget and a block budget.

A step is a `Batch` of chunks. A decoding sequence contributes its one uncomputed token; a sequence that is still
reading its prompt contributes as many tokens as the budget leaves. Decodes go first, so a long prompt never holds
running streams; then prompts, oldest first. When blocks run out the newest running sequence is preempted: it gives
its blocks back and later recomputes its tokens, with edits at the same positions as before.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from reftserve.server.engine.bank import Bank
from reftserve.server.engine.errors import RequestRefused
from reftserve.server.engine.kv_cache import BlockAllocator
from reftserve.server.engine.sequence import Sequence, Status


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_decode(self) -> bool:
        """One token that follows computed ones: attention reads the cache only."""
        return self.stop - self.start == 1 and self.start > 0

    @property
    def samples(self) -> bool:
        """Whether the step's logits give this sequence its next token."""
        return self.stop == len(self.sequence.token_ids)


@dataclass(frozen=True)
class Batch:
    """What one step computes: prompt chunks first, then decode tokens, in the order of the packed row.

    stale_blocks: to be zeroed before the step. Edits wrote to them, and edits can overflow; a sequence reads the rest
    of its last block too, at weight zero, where an infinity would survive.
    """

    prefills: list[Chunk]
    decodes: list[Chunk]
    stale_blocks: list[int]

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks in packed order."""
        return self.prefills + self.decodes


class Scheduler:
    """Owns the waiting queue, the running set and who holds which blocks and slots."""

    def __init__(self, allocator: BlockAllocator, bank: Bank, *, max_batch_tokens: int, max_sequences: int) -> None:
        self.allocator = allocator
        self.bank = bank
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = min(max_sequences, max_batch_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._stale_blocks: list[int] = []

    def check(self, sequence: Sequence) -> None:
        """Raise RequestRefused when the sequence could not run even alone."""
        longest = sequence.n_prompt + sequence.sampling.max_tokens
        capacity = self.allocator.num_blocks * self.allocator.block_size
        if longest > capacity:
            raise RequestRefused(f"prompt and answer need up to {longest} tokens; the KV cache holds {capacity}")
        self.bank.check(sequence.interventions)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose interventions are loaded."""
        sequence.status = Status.WAITING
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """The next step's batch; empty when nothing can run."""
        budget = self.max_batch_tokens
        planned: list[Chunk] = []
        # A stable sort: sequences with one token to compute first, otherwise in order of admission.
        for sequence in sorted(self.running, key=lambda s: s.n_uncomputed > 1):
            if budget == 0:
                break
            stop = sequence.n_computed + min(sequence.n_uncomputed, budget)
            if sequence.status is Status.RUNNING and self._reserve(sequence, stop):
                planned.append(Chunk(sequence, sequence.n_computed, stop))
                budget -= stop - sequence.n_computed
        # A newer sequence may have been preempted after its chunk was planned, to make room for an older one.
        planned = [chunk for chunk in planned if chunk.sequence.status is Status.RUNNING]
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            stop = min(sequence.n_uncomputed, budget)
            if not self._admit(sequence, stop):
                break
            planned.append(Chunk(sequence, 0, stop))
            budget -= stop
        return Batch(
            prefills=[chunk for chunk in planned if not chunk.is_decode],
            decodes=[chunk for chunk in planned if chunk.is_decode],
            stale_blocks=self._take_stale_blocks() if planned else [],
        )

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it is, and free everything it holds."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def _admit(self, sequence: Sequence, stop: int) -> bool:
        # All of it has to fit, and a block for each running sequence to grow into: what is admitted too eagerly is
        # preempted in the next step, and computed again and again.
        needed = self.allocator.blocks_for(len(sequence.token_ids)) + len(self.running)
        if needed > self.allocator.num_free:
            return False
        edits = self.bank.acquire(sequence.interventions)
        if edits is None:
            return False
        sequence.edits = edits
        self.allocator.extend(sequence.block_table, stop)
        self.waiting.popleft()
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return True

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for the sequence's first `tokens` tokens, preempting newer ones for it; False if it went itself."""
        while not self.allocator.extend(sequence.block_table, tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.n_computed = 0
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if sequence.edits:
            self._stale_blocks += sequence.block_table
        self.allocator.release(sequence.block_table)
        self.bank.release(sequence.interventions)
        sequence.edits = ()

    def _take_stale_blocks(self) -> list[int]:
        stale, self._stale_blocks = self._stale_blocks, []
        return stale
