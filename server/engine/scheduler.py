"""Chooses the tokens of each step, within a budget of tokens and blocks.

A step is a `Batch` of chunks: the one uncomputed token of each decoding sequence, then as many prompt tokens as the
budget leaves, so a long prompt never delays running streams. `FairQueue` says which waiting sequence goes
next. When blocks run out, the last sequence of the client with most running ones is preempted: it releases its blocks,
keeps its place in the queue, and later recomputes its tokens with edits at the same positions. The same happens when a
waiting client finds all places taken, and another client has at least two more running sequences than it has.

A sequence with forks leaves the running set but keeps its blocks. A fork shares the blocks that the prompt fills and
copies the partial last one, so it computes only its own tokens. When blocks run out, these prefixes are dropped first;
the forks then reuse blocks still in the prefix cache and recompute the rest.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

from reftserve.server.engine.bank import Bank
from reftserve.server.engine.block_allocator import BlockAllocator
from reftserve.server.engine.engine_errors import RequestRefused
from reftserve.server.engine.fair_queue import FairQueue, order_of
from reftserve.server.engine.sequence import Sequence, Status

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_decode(self) -> bool:
        """Whether it is one token after computed ones, so that attention reads the cache only."""
        return self.stop - self.start == 1 and self.start > 0

    @property
    def samples(self) -> bool:
        """Whether the step's logits give this sequence its next token."""
        # `run_ahead` plans a chunk before its token is known, so stop can exceed the length.
        return self.stop >= len(self.sequence.token_ids) and self.sequence.sampling.max_tokens > 0

    @property
    def scores(self) -> range:
        """Return the tokens whose logits score the next token, if the request wants scores not known yet."""
        wanted, known = self.sequence.scored, len(self.sequence.scores)
        return range(max(self.start, wanted.start + known), min(self.stop, wanted.stop))


@dataclass(frozen=True)
class Batch:
    """One step's chunks in packed order: prompts, then decode tokens. copied_blocks: (from, to), copied after zeroing.

    stale_blocks: to zero before the step. Another request's edits may have overflowed in them, and a sequence reads the
    unused rest of its last block with weight zero, which an infinity survives.
    """

    prefills: list[Chunk]
    decodes: list[Chunk]
    stale_blocks: list[int]
    copied_blocks: list[tuple[int, int]] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        """Return all chunks in packed order."""
        return self.prefills + self.decodes


class Scheduler:
    """Owns the waiting queue, the running set, and the blocks and slots of each sequence."""

    def __init__(
        self,
        allocator: BlockAllocator,
        bank: Bank,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        prefix_cache: bool = True,
    ) -> None:
        self.allocator = allocator
        self.bank = bank
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = min(max_sequences, max_batch_tokens)
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.forked: list[Sequence] = []
        self.prefix_cache = prefix_cache
        self.preemptions = 0
        self.admissions = 0
        self.broken: list[Sequence] = []

    def check(self, sequence: Sequence) -> None:
        """Raise RequestRefused when the sequence cannot run even alone."""
        longest = sequence.longest
        capacity = self.allocator.num_blocks * self.allocator.block_size
        if longest > capacity:
            raise RequestRefused(f"prompt and answer need up to {longest} tokens; the KV cache holds {capacity}")
        self.bank.check(sequence.interventions)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence whose interventions are loaded."""
        sequence.status = Status.WAITING
        self.waiting.arrive(sequence)

    def schedule(self) -> Batch:
        """Return the next step's batch; empty when nothing can run."""
        budget = self.max_batch_tokens
        planned: list[Chunk] = []
        copied: list[tuple[int, int]] = []
        for sequence in sorted(self.running, key=lambda s: (s.n_uncomputed > 1, s.order)):
            if budget == 0:
                break
            stop = sequence.n_computed + min(sequence.n_uncomputed, budget)
            if sequence.status is Status.RUNNING and self._reserve(sequence, stop):
                planned.append(Chunk(sequence, sequence.n_computed, stop))
                budget -= stop - sequence.n_computed
        now = time.monotonic() if self.waiting else 0.0
        while self.waiting and budget > 0:
            sequence = self.waiting.first(now)
            if len(self.running) < self.max_sequences and self._can_admit(sequence, budget, copied):
                stop = sequence.n_computed + min(sequence.n_uncomputed, budget)
                planned.append(Chunk(sequence, sequence.n_computed, stop))
                budget -= stop - sequence.n_computed
            elif sequence in self.broken:
                continue
            elif (crowding := self._crowding_out(sequence, now)) is not None:
                self._preempt(crowding)
            else:
                break
        # A sequence whose chunk is planned may have been preempted after that.
        planned = [chunk for chunk in planned if chunk.sequence.status is Status.RUNNING]
        if not planned and self.waiting and self.forked:
            # Waiting sequences would otherwise wait for ever for the prefixes' blocks.
            while self.forked:
                self._drop_prefix(self.forked[-1])
            return self.schedule()
        return Batch(
            prefills=[chunk for chunk in planned if not chunk.is_decode],
            decodes=[chunk for chunk in planned if chunk.is_decode],
            stale_blocks=self.allocator.take_stale() if planned else [],
            copied_blocks=copied,
        )

    def run_ahead(self, batch: Batch) -> tuple[Batch, list[int]] | None:
        """Return the step after `batch`, and the sampled rows of `batch` that continue in it: those below `max_tokens`.

        Returns None if sampled tokens or newly admitted sequences could change that step; a full batch admits none.
        A sequence that ends by a stop token is computed in vain.
        """
        chunks = batch.chunks
        running = [(row, c) for row, c in enumerate(chunks) if c.sequence.status is Status.RUNNING]
        may_admit = len(self.running) < self.max_sequences or self._is_crowded()
        if (self.waiting and may_admit) or len(running) < len(self.running) or not all(c.samples for c in chunks):
            return None
        if not all(c.sequence.can_run_ahead for _, c in running):
            return None
        continued = [
            (row, Chunk(c.sequence, c.stop, c.stop + 1))
            for row, c in running
            if c.stop + 1 - c.sequence.n_prompt < c.sequence.sampling.max_tokens
        ]
        if not continued or not all(self.allocator.extend(c.sequence.block_table, c.stop) for _, c in continued):
            return None
        ahead = Batch(prefills=[], decodes=[c for _, c in continued], stale_blocks=self.allocator.take_stale())
        return ahead, [row for row, _ in continued]

    def advance(self, chunk: Chunk) -> None:
        """Mark a chunk as computed, and publish the blocks that it filled to the prefix cache."""
        sequence, size = chunk.sequence, self.allocator.block_size
        sequence.n_computed = chunk.stop
        if sequence.edits and chunk.stop >= sequence.n_prompt and not sequence.edits_generated:
            # Decoding does not read these bank rows, so other interventions may take them.
            self._unpin(sequence)
        first, full = chunk.start // size, chunk.stop // size
        if self.prefix_cache and full > first:
            keys = sequence.block_keys(size, full)
            for index in range(first, full):
                self.allocator.publish(sequence.block_table[index], keys[index])

    def keep_prefix(self, sequence: Sequence) -> None:
        """Keep a running sequence's blocks for its forks, until it finishes or its blocks are needed."""
        self.running.remove(sequence)
        self.forked.append(sequence)
        sequence.status = Status.FORKED

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence in any state, and free its blocks and slots."""
        if sequence.status is Status.FORKED:
            self._drop_prefix(sequence)
        elif sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
            self.waiting.leave(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
            self.waiting.leave(sequence)
        sequence.status = Status.FINISHED

    def abandon(self, batch: Batch) -> None:
        """Distrust the content of a failed batch's blocks; its sequences must be finished next."""
        self.allocator.distrust(batch.stale_blocks)
        for chunk in batch.chunks:
            self.allocator.distrust(chunk.sequence.block_table)

    def _can_admit(self, sequence: Sequence, budget: int, copied: list[tuple[int, int]]) -> bool:
        """Admit a waiting sequence if there is room. One whose admission raises leaves the queue, for `broken`."""
        try:
            return self._admit(sequence, budget, copied)
        except Exception:
            logger.exception("a request could not be admitted")
            self.finish(sequence)
            self.broken.append(sequence)
            return False

    def _admit(self, sequence: Sequence, budget: int, copied: list[tuple[int, int]]) -> bool:
        parent, size = sequence.parent, self.allocator.block_size
        prefix = parent.block_table if parent is not None and parent.status is Status.FORKED else None
        known = self._cached_blocks(sequence) if prefix is None else prefix[: sequence.n_prompt // size]
        # Room for the whole sequence and one block for each running one, or it would be preempted again and again.
        taken = self.allocator.blocks_for(len(sequence.token_ids)) - len(known)
        needed = taken + self.allocator.num_free_among(known) + len(self.running)
        if needed > self.allocator.num_free:
            return False
        edits = self.bank.acquire(sequence.interventions)
        if edits is None:
            return False
        sequence.edits = edits
        sequence.n_computed = len(known) * size if prefix is None else sequence.n_prompt
        if sequence.n_cached is None:
            sequence.n_cached = sequence.n_computed
        self.allocator.share(sequence.block_table, known)
        self.allocator.extend(sequence.block_table, sequence.n_computed + min(sequence.n_uncomputed, budget))
        if prefix is not None and len(prefix) > len(known):
            copied.append((prefix[len(known)], sequence.block_table[len(known)]))
        self.waiting.remove(sequence)
        self.waiting.charge(sequence)
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        self.admissions += 1
        return True

    def _crowding_out(self, sequence: Sequence, now: float) -> Sequence | None:
        """Return the sequence to preempt for a waiting one: the last of the client with the most running ones.

        None if that client has not at least two more than the waiting sequence's, or the sequence's time has not come.
        """
        running = Counter(each.client for each in self.running)
        client, most = max(running.items(), key=lambda item: item[1], default=("", 0))
        if most < running[sequence.client] + 2 or sequence.order[0] > now:
            return None
        return max((each for each in self.running if each.client == client), key=order_of)

    def _is_crowded(self) -> bool:
        now = time.monotonic()
        return len(self.waiting) > 0 and self._crowding_out(self.waiting.first(now), now) is not None

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        if not self.prefix_cache:
            return []
        size = self.allocator.block_size
        return self.allocator.find(sequence.block_keys(size, sequence.first_wanted // size))

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Allocate blocks up to `tokens` tokens, preempting later sequences; return False if it preempts itself."""
        while not self.allocator.extend(sequence.block_table, tokens):
            if self.forked:
                self._drop_prefix(self.forked[-1])
                continue
            running = Counter(each.client for each in self.running)
            victim = max(self.running, key=lambda each: (running[each.client], each.order))
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.n_computed = 0
        sequence.status = Status.WAITING
        self.waiting.push(sequence)
        self.preemptions += 1

    def _drop_prefix(self, sequence: Sequence) -> None:
        self.forked.remove(sequence)
        self._release(sequence)
        self.waiting.leave(sequence)
        sequence.status = Status.FINISHED

    def _release(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.block_table, edited=bool(sequence.refs))
        self._unpin(sequence)

    def _unpin(self, sequence: Sequence) -> None:
        if sequence.edits:
            self.bank.release(sequence.interventions)
        sequence.edits = ()
