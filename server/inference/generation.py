"""The values that pass through the door: a prepared request, a piece of an answer, and the tokens that it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reftserve.client.schemas import FinishReason, PromptTokensDetails, Usage
from reftserve.server.engine.messages import SamplingParams, TokenLogprobs
from reftserve.server.inference.admission import Reservation
from reftserve.server.registry.composition import Composition


@dataclass(frozen=True)
class RequestContext:
    """Everything about a request except its tokens. versions: interventions and scales. priority: lower goes first.

    client: the engine is fair among clients. cache_salt: prefixes are shared only under equal salts.
    is_metered: whether metrics and admission count it; evaluations are not counted. reservation: its places.
    """

    versions: Composition
    client: str
    cache_salt: str
    priority: int = 0
    timeout_s: float | None = None
    is_metered: bool = True
    reservation: Reservation | None = None


@dataclass(frozen=True)
class Generation:
    """A checked request that may run: `prompts` in order, each answered `n` times. params: one per answer."""

    id: str
    created: int
    context: RequestContext
    prompts: list[list[int]]
    n: int
    stops: list[str]
    params: list[SamplingParams]

    def prompt_of(self, index: int) -> list[int]:
        """Return the prompt of answer `index`."""
        return self.prompts[index // self.n]


@dataclass(frozen=True)
class Piece:
    """The next text of answer `index`, made of `tokens` tokens; the last piece has a finish reason.

    cached_tokens: prompt tokens found in the prefix cache. logprobs: without the token that ends the turn.
    prompt_logprobs: of the prompt's tokens from the second on; only the first piece has them.
    """

    index: int
    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """Join consecutive pieces of one answer."""
    return Piece(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        tokens=sum(piece.tokens for piece in pieces),
        finish_reason=pieces[-1].finish_reason,
        cached_tokens=pieces[0].cached_tokens,
        logprobs=[entry for piece in pieces for entry in piece.logprobs],
        prompt_logprobs=[entry for piece in pieces for entry in piece.prompt_logprobs],
    )


class UsageMeter:
    """Counts a generation's tokens as its pieces go by."""

    def __init__(self, generation: Generation) -> None:
        self._n = generation.n
        self._prompt_tokens = sum(map(len, generation.prompts))
        self._completion_tokens = 0
        self._cached_tokens: dict[int, int] = {}

    def add(self, piece: Piece) -> None:
        """Count one piece."""
        self._completion_tokens += piece.tokens
        self._cached_tokens[piece.index] = piece.cached_tokens

    @property
    def usage(self) -> Usage:
        """The tokens so far. A prompt counts once, however many answers it gets."""
        first_answers = (tokens for index, tokens in self._cached_tokens.items() if index % self._n == 0)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(first_answers)),
        )


@dataclass(frozen=True)
class ScoredPrompt:
    """One prompt's scores. logprobs: of each token of each continuation. cached_tokens: of the prompt."""

    logprobs: list[list[float]]
    cached_tokens: int
