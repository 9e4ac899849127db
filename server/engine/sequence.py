"""The state of one request inside the engine, owned by the scheduler.

LOADING ──► WAITING ──► RUNNING ──► FINISHED
▲            │  │             ▲
└─ preempted ┘  └─► FORKED ──┘
preempted: blocks and slot given back; tokens and n_prompt stay
holding: its prompt is computed, and its blocks are kept for the sequences that fork from it
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from llguidance import LLMatcher

from reftserve.interventions import Intervention
from reftserve.server.engine.bank import EditSpan
from reftserve.server.engine.messages import InterventionRef, SamplingParams, Submit, TokenLogprobs
from reftserve.server.engine.prefix_cache import BlockKeys


class Status(Enum):
    """Where a sequence is in its life."""

    LOADING = auto()
    WAITING = auto()
    RUNNING = auto()
    FORKED = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """Tokens, progress and holdings of one request.

    n_prompt: fixed at admission; positions of edits refer to it, also after preemption and recompute.
    n_computed: tokens whose keys and values lie in the cache.
    refs: the interventions it names, in composition order; `loaded`: those that are in host memory, by content hash.
    edits: their rows in the bank, as long as tokens that they may touch are to be computed.
    n_cached: prompt tokens that were found in the cache when the sequence first ran.
    order: place in the queue, lower first; kept when it is preempted.
    matcher: where in its grammar it is, for those that have one.
    scored: tokens whose logits are wanted to say how likely the token after them is; scores: that, as far as known.
    continuations: what its request wants scored after the prompt; `scores` are those of their first tokens then.
    forks: by continuation, the sequences that score the other tokens; unread: those of them that are not done.
    parent: what it is a fork of; last_id: the token after its last one, which is scored and never computed.
    """

    request_id: str
    token_ids: list[int]
    n_prompt: int
    sampling: SamplingParams
    order: tuple[float, int] = (0.0, 0)
    refs: tuple[InterventionRef, ...] = ()
    cache_salt: str = ""
    loaded: dict[str, Intervention] = field(default_factory=dict)
    status: Status = Status.LOADING
    n_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    edits: tuple[EditSpan, ...] = ()
    n_cached: int | None = None
    matcher: LLMatcher | None = None
    scored: range = range(0)
    scores: list[TokenLogprobs] = field(default_factory=list)
    continuations: list[list[int]] = field(default_factory=list)
    forks: dict[int, Sequence] = field(default_factory=dict)
    unread: set[Sequence] = field(default_factory=set)
    parent: Sequence | None = None
    last_id: int | None = None
    _keys: BlockKeys | None = None

    @classmethod
    def from_submit(cls, submit: Submit, order: tuple[float, int] = (0.0, 0)) -> Sequence:
        """A sequence that has its prompt and nothing else."""
        n_prompt = len(submit.prompt_ids)
        scored = range(n_prompt - 1 if submit.sampling.prompt_logprobs else 0)
        return cls(
            request_id=submit.request_id,
            token_ids=list(submit.prompt_ids),
            n_prompt=n_prompt,
            sampling=SamplingParams(max_tokens=0) if submit.continuations else submit.sampling,
            order=order,
            refs=submit.interventions,
            cache_salt=submit.cache_salt,
            scored=range(n_prompt - 1, n_prompt) if submit.continuations else scored,
            continuations=submit.continuations,
        )

    def fork(self) -> list[Sequence]:
        """One sequence for each continuation of more than one token; it goes on from this one's prompt."""
        for index, continuation in enumerate(self.continuations):
            if len(continuation) > 1:
                self.forks[index] = Sequence(
                    request_id=f"{self.request_id}/{index}",
                    token_ids=self.token_ids + continuation[:-1],
                    n_prompt=self.n_prompt,
                    sampling=self.sampling,
                    order=self.order,
                    refs=self.refs,
                    cache_salt=self.cache_salt,
                    loaded=self.loaded,
                    scored=range(self.n_prompt, self.n_prompt + len(continuation) - 1),
                    parent=self,
                    last_id=continuation[-1],
                )
        self.unread = set(self.forks.values())
        return list(self.forks.values())

    @property
    def is_loaded(self) -> bool:
        """Whether everything that it names is in host memory, and its grammar compiled."""
        has_grammar = not self.sampling.grammar or self.matcher is not None
        return has_grammar and all(ref.content_hash in self.loaded for ref in self.refs)

    @property
    def interventions(self) -> tuple[tuple[Intervention, float], ...]:
        """What it runs with and how strongly, in composition order; only once `is_loaded`."""
        return tuple((self.loaded[ref.content_hash], ref.scale) for ref in self.refs)

    @property
    def edits_generated(self) -> bool:
        """Whether an edit may touch tokens after the prompt; all others cost a decode step nothing, not even a look."""
        return any(use.positions.generated for use in self.edits)

    @property
    def n_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.n_prompt

    @property
    def n_uncomputed(self) -> int:
        """Tokens that the model has still to read: 1 while decoding."""
        return len(self.token_ids) - self.n_computed

    @property
    def longest(self) -> int:
        """Tokens that it, or one of its forks, may come to have."""
        return self.n_prompt + max(self.sampling.max_tokens, *(len(c) - 1 for c in self.continuations), 0)

    @property
    def first_wanted(self) -> int:
        """The first token whose logits are still wanted: it has to be computed, wherever the cache ends."""
        if len(self.scores) < len(self.scored):
            return self.scored.start + len(self.scores)
        return len(self.token_ids) - 1

    @property
    def continuation_logprobs(self) -> list[list[float]]:
        """Of each token of each continuation; once all forks are read."""
        return [
            [entry.logprob for entry in [first, *(self.forks[index].scores if index in self.forks else ())]]
            for index, first in enumerate(self.scores)
        ]

    @property
    def can_run_ahead(self) -> bool:
        """Whether its next logits can be adjusted while only the device knows its last token."""
        is_long_enough = self.n_generated >= self.sampling.min_tokens
        return self.matcher is None and not self.sampling.has_penalties and is_long_enough

    @property
    def grammar_error(self) -> str | None:
        """Why the grammar cannot be followed any further: it needs more than llguidance's limits."""
        if self.matcher is None or not self.matcher.is_error():
            return None
        return f"the grammar cannot be followed after {self.n_generated} tokens: {self.matcher.get_error()}"

    def block_keys(self, block_size: int, count: int) -> list[bytes]:
        """Keys of its first `count` blocks, all of them full; only once `is_loaded`."""
        if self._keys is None:
            self._keys = BlockKeys(self.cache_salt, self.interventions, self.n_prompt, block_size)
        return self._keys.of(self.token_ids, count)

    def following(self, scored: range) -> list[int]:
        """The token after each of these."""
        ids = self.token_ids[scored.start + 1 : scored.stop + 1]
        return ids if self.last_id is None or len(ids) == len(scored) else [*ids, self.last_id]

    def append(self, token_id: int) -> str | None:
        """Add a sampled token; the finish reason when it was the last one."""
        self.token_ids.append(token_id)
        if self.matcher is not None:
            self.matcher.consume_token(token_id)
            # One that gave up has stopped too; the engine asks for its error before the next token.
            if self.matcher.is_stopped() and not self.matcher.is_error():
                return "stop"
        if token_id in self.sampling.stop_token_ids:
            return "stop"
        return "length" if self.n_generated >= self.sampling.max_tokens else None
