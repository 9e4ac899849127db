"""The state of one request inside the engine, owned by the scheduler.

LOADING ──► WAITING ──► RUNNING ──► FINISHED
▲            │
└─ preempted ┘        (blocks and slot given back; tokens and n_prompt stay)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from llguidance import LLMatcher

from reftserve.interventions import Intervention
from reftserve.server.engine.bank import EditUse
from reftserve.server.engine.messages import InterventionRef, SamplingParams, Submit, TokenLogprobs
from reftserve.server.engine.prefix_cache import BlockKeys


class Status(Enum):
    """Where a sequence is in its life."""

    LOADING = auto()
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """Tokens, progress and holdings of one request.

    n_prompt: fixed at admission; positions of edits refer to it, also after preemption and recompute.
    n_computed: tokens whose keys and values lie in the cache.
    refs: the interventions it names, in composition order; `loaded`: those that are in host memory, by content hash.
    edits: their rows in the bank while the sequence runs.
    n_cached: prompt tokens that were found in the cache when the sequence first ran.
    order: place in the queue, lower first; kept when it is preempted.
    matcher: where in its grammar it is, for those that have one. prompt_logprobs: of the prompt's second token and on.
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
    edits: tuple[EditUse, ...] = ()
    n_cached: int | None = None
    matcher: LLMatcher | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _keys: BlockKeys | None = None

    @classmethod
    def from_submit(cls, submit: Submit, order: tuple[float, int] = (0.0, 0)) -> Sequence:
        """A sequence that has its prompt and nothing else."""
        return cls(
            request_id=submit.request_id,
            token_ids=list(submit.prompt_ids),
            n_prompt=len(submit.prompt_ids),
            sampling=submit.sampling,
            order=order,
            refs=submit.interventions,
            cache_salt=submit.cache_salt,
        )

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
