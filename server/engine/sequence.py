"""The state of one request inside the engine, owned by the scheduler.

    LOADING ──► WAITING ──► RUNNING ──► FINISHED
                   ▲         │   │         ▲
                   └preempted┘   └► FORKED ┘
preempted: blocks and slot are given back; tokens and n_prompt stay
FORKED: the prompt is computed; its blocks are kept for the sequences that fork from it
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from llguidance import LLMatcher

from reftserve.interventions import Intervention
from reftserve.server.engine.bank import EditSpan
from reftserve.server.engine.messages import InterventionRef, SamplingParams, Submit, TokenLogprobs
from reftserve.server.engine.prefix_cache import BlockKeys
from reftserve.server.engine.token_counts import TokenCounts


class Status(Enum):
    """The state of a sequence; the module's diagram has the transitions."""

    LOADING = auto()
    WAITING = auto()
    RUNNING = auto()
    FORKED = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """Tokens, progress, blocks and slots of one request.

    n_prompt: fixed at admission; edit positions refer to it, also after preemption. n_computed: tokens in the cache.
    n_cached: those found there at the first run. charged: tokens that its client has paid for.
    client, order: place in the queue (`fair_queue.py`); preemption keeps it.
    refs: interventions in composition order; loaded: those in host memory, by content hash.
    edits: their rows in the bank, until every token that they may edit is computed.
    scored: tokens whose logits score the next token; scores: the scores known so far.
    continuations: texts to score after the prompt; `scores` are then those of their first tokens.
    forks: by continuation, the sequences that score its other tokens; unread: unfinished forks.
    last_id: a fork's token after the last one, scored but never computed.
    """

    request_id: str
    token_ids: list[int]
    n_prompt: int
    sampling: SamplingParams
    order: tuple[float, int] = (0.0, 0)
    refs: tuple[InterventionRef, ...] = ()
    cache_salt: str = ""
    client: str = ""
    charged: int = 0
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
    _token_counts: TokenCounts | None = None

    @classmethod
    def from_submit(cls, submit: Submit, order: tuple[float, int] = (0.0, 0)) -> Sequence:
        """Return a new sequence with the request's prompt."""
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
            client=submit.client,
            scored=range(n_prompt - 1, n_prompt) if submit.continuations else scored,
            continuations=submit.continuations,
        )

    def fork(self) -> list[Sequence]:
        """Return a sequence for each continuation of more than one token; it starts from this one's prompt."""
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
                    client=self.client,
                    loaded=self.loaded,
                    scored=range(self.n_prompt, self.n_prompt + len(continuation) - 1),
                    parent=self,
                    last_id=continuation[-1],
                )
        self.unread = set(self.forks.values())
        return list(self.forks.values())

    @property
    def is_loaded(self) -> bool:
        """Whether its interventions are in host memory and its grammar is compiled."""
        has_grammar = not self.sampling.grammar or self.matcher is not None
        return has_grammar and all(ref.content_hash in self.loaded for ref in self.refs)

    @property
    def interventions(self) -> tuple[tuple[Intervention, float], ...]:
        """Return the interventions and their scales in composition order. Requires `is_loaded`."""
        return tuple((self.loaded[ref.content_hash], ref.scale) for ref in self.refs)

    @property
    def edits_generated(self) -> bool:
        """Whether an edit may touch tokens after the prompt; decode steps skip all other sequences."""
        return any(span.positions.generated for span in self.edits)

    @property
    def n_generated(self) -> int:
        """Return the number of tokens sampled so far."""
        return len(self.token_ids) - self.n_prompt

    @property
    def n_uncomputed(self) -> int:
        """Return the number of tokens that the model has not read yet: 1 while decoding."""
        return len(self.token_ids) - self.n_computed

    @property
    def longest(self) -> int:
        """Return the largest number of tokens that it or one of its forks can reach."""
        return self.n_prompt + max(self.sampling.max_tokens, *(len(c) - 1 for c in self.continuations), 0)

    @property
    def first_wanted(self) -> int:
        """Return the first token whose logits are needed: it must be computed even if the cache holds it."""
        if len(self.scores) < len(self.scored):
            return self.scored.start + len(self.scores)
        return len(self.token_ids) - 1

    @property
    def continuation_logprobs(self) -> list[list[float]]:
        """Return the log-probabilities of each continuation's tokens. Requires that all forks are finished."""
        return [
            [entry.logprob for entry in [first, *(self.forks[index].scores if index in self.forks else ())]]
            for index, first in enumerate(self.scores)
        ]

    @property
    def can_run_ahead(self) -> bool:
        """Whether its next logits can be adjusted before the host knows its last token."""
        is_long_enough = self.n_generated >= self.sampling.min_tokens
        return self.matcher is None and not self.sampling.has_penalties and is_long_enough

    @property
    def grammar_error(self) -> str | None:
        """Return why the grammar exceeded llguidance's limits, or None."""
        if self.matcher is None or not self.matcher.is_error():
            return None
        return f"the grammar cannot be followed after {self.n_generated} tokens: {self.matcher.get_error()}"

    def block_keys(self, block_size: int, count: int) -> list[bytes]:
        """Return the keys of its first `count` blocks, which are full. Requires `is_loaded`."""
        if self._keys is None:
            self._keys = BlockKeys(self.cache_salt, self.interventions, self.n_prompt, block_size)
        return self._keys.of(self.token_ids, count)

    @property
    def token_counts(self) -> TokenCounts:
        """Return the counts of its tokens so far, for penalties."""
        if self._token_counts is None:
            self._token_counts = TokenCounts(self.n_prompt)
        self._token_counts.count(self.token_ids)
        return self._token_counts

    def following(self, scored: range) -> list[int]:
        """Return the token after each of the `scored` tokens."""
        ids = self.token_ids[scored.start + 1 : scored.stop + 1]
        return ids if self.last_id is None or len(ids) == len(scored) else [*ids, self.last_id]

    def append(self, token_id: int) -> str | None:
        """Add a sampled token; return the finish reason if it is the last one."""
        self.token_ids.append(token_id)
        if self.matcher is not None:
            self.matcher.consume_token(token_id)
            # A matcher with an error has stopped too; the engine reports the error before the next token.
            if self.matcher.is_stopped() and not self.matcher.is_error():
                return "stop"
        if token_id in self.sampling.stop_token_ids:
            return "stop"
        return "length" if self.n_generated >= self.sampling.max_tokens else None
