"""Admission: a request is refused at once when it would wait too long for its first token.

    wait = (requests ahead of it beyond the engine's places) * (engine seconds a request)

The engine reports how long its steps take while requests wait, and how many prompt and generated tokens they compute.
A least-squares fit gives the seconds of each kind of token. Until the engine has been full once, nothing is known and
nothing is refused. Places are shared fairly (`engine/fair_queue.py`), so only a client's own requests, and its share of
the places, decide how long it waits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from reftserve.server.engine.messages import EngineStats, Ready, Submit, TokenOutput
from reftserve.server.errors import Overloaded

FADE_PER_S = 0.95  # how much of a measurement counts after another second of steps
LENGTH_FADE = 0.98  # how much of the mean answer's length counts after another answer
LONGEST_RETRY_S = 60.0
RESERVED_S = 10.0  # for names, prompts and grammars on the way to the engine


class TokenCosts:
    """Seconds of a full engine's time for a prompt token and for a generated one; newer steps count more."""

    def __init__(self) -> None:
        self._pp = self._pg = self._gg = self._ps = self._gs = self._s = self._n = 0.0

    def add(self, prompt_tokens: float, generated_tokens: float, seconds: float) -> None:
        """Count steps that computed these tokens in these seconds."""
        p, g, s = prompt_tokens, generated_tokens, seconds
        old = FADE_PER_S**s
        self._pp, self._pg, self._gg = old * self._pp + p * p, old * self._pg + p * g, old * self._gg + g * g
        self._ps, self._gs = old * self._ps + p * s, old * self._gs + g * s
        self._s, self._n = old * self._s + s, old * self._n + p + g

    def get(self) -> tuple[float, float] | None:
        """Return seconds for a prompt token and for a generated token; None before the first full step."""
        if self._n == 0:
            return None
        mean = self._s / self._n
        determinant = self._pp * self._gg - self._pg**2
        if determinant <= 0.01 * self._pp * self._gg:  # one kind only, or both always in the same proportion
            return mean, mean
        prompt = (self._ps * self._gg - self._gs * self._pg) / determinant
        generated = (self._gs * self._pp - self._ps * self._pg) / determinant
        return (prompt, generated) if prompt > 0 and generated > 0 else (mean, mean)


@dataclass(eq=False)
class _Load:
    """Requests in the engine: `waiting` ones have no first token yet. prompt, answer: tokens of the waiting ones."""

    waiting: int = 0
    running: int = 0
    prompt: int = 0
    answer: int = 0

    def add(self, waiting: int, running: int, prompt: int, answer: int) -> None:
        self.waiting += waiting
        self.running += running
        self.prompt += prompt
        self.answer += answer


@dataclass(eq=False)
class Reservation:
    """Places of admitted requests until they reach the engine. left: requests; until: when the rest is given up."""

    client: str
    left: int
    until: float


class Admission:
    """Estimates waits and refuses requests. max_queue: requests in the engine at once. max_wait_s: the longest wait."""

    def __init__(self, *, max_queue: int, max_wait_s: float) -> None:
        self._max_queue = max_queue
        self._max_wait_s = max_wait_s
        self._costs = TokenCosts()
        self._seen: EngineStats | None = None
        self._clients: dict[str, _Load] = {}
        self._all = _Load()
        self._reservations: set[Reservation] = set()
        self._sizes = (1.0, 1.0)  # prompt and answer of a waiting request, in tokens
        self._mean_answer: float | None = None

    @property
    def num_reserved(self) -> int:
        """Return the number of admitted requests that have not reached the engine."""
        return sum(each.left for each in self._reservations)

    def reserve(self, client: str, count: int, ready: Ready, stats: EngineStats | None) -> Reservation:
        """Return places for a client's next `count` requests, which `track` takes.

        Raises Overloaded when they would wait too long, or are too many.
        """
        now = time.monotonic()
        self._reservations = {each for each in self._reservations if each.until > now}
        total = self._all.waiting + self._all.running + self.num_reserved
        if total + count > self._max_queue:
            message = f"{total} requests wait or run, and {self._max_queue} is the limit (max_queue)"
            raise Overloaded(message, retry_after_s=1.0)
        wait_s = self.expected_wait_s(client, count, ready, stats)
        if wait_s > self._max_wait_s:
            raise Overloaded(
                f"the first token would come after about {wait_s:.0f} s, and {self._max_wait_s:g} s is the limit "
                "(max_wait_s); try again later",
                retry_after_s=min(LONGEST_RETRY_S, max(1.0, wait_s - self._max_wait_s)),
            )
        reservation = Reservation(client, count, now + RESERVED_S)
        self._reservations.add(reservation)
        return reservation

    def expected_wait_s(self, client: str, count: int, ready: Ready, stats: EngineStats | None) -> float:
        """Return the seconds until the last of a client's next `count` requests has its first token."""
        self._observe(stats)
        costs, everyone, reserved = self._costs.get(), self._all, self.num_reserved
        if stats is None or costs is None or everyone.waiting + reserved == 0:
            return 0.0
        if everyone.waiting:
            self._sizes = everyone.prompt / everyone.waiting, everyone.answer / everyone.waiting
        prompt, answer = self._sizes
        prompt_s, generated_s = costs
        prompt_s *= stats.prompt_tokens / max(1, stats.prompt_tokens + stats.cached_prompt_tokens)
        blocks = math.ceil((prompt + answer) / ready.block_size)
        places = max(1, min(ready.max_sequences, stats.kv_blocks_total // blocks))
        if everyone.running + everyone.waiting + reserved + count <= places:
            return (everyone.waiting + reserved) * prompt * prompt_s
        own = self._clients.get(client, _Load())
        own_reserved = sum(each.left for each in self._reservations if each.client == client)
        clients = len({*self._clients, client, *(each.client for each in self._reservations)})
        beyond = own.running + own.waiting + own_reserved + count - places / clients
        return max(0.0, beyond) * clients * (prompt * prompt_s + answer * generated_s)

    @contextmanager
    def track(self, submit: Submit, reservation: Reservation | None = None) -> Iterator[Callable[[TokenOutput], None]]:
        """Count a request while inside; yield a function that takes its outputs. reservation: with its place."""
        if reservation is not None:
            reservation.left -= 1
            if reservation.left <= 0:
                self._reservations.discard(reservation)
        prompt, answer = len(submit.prompt_ids), self._expected_answer(submit.sampling.max_tokens)
        generated = -1  # no output yet
        self._count(submit.client, 1, 0, prompt, answer)

        def advance(output: TokenOutput) -> None:
            nonlocal generated
            if generated < 0:
                generated = 0
                self._count(submit.client, -1, 1, -prompt, -answer)
            generated += len(output.token_ids)
            if output.finish_reason is not None and submit.sampling.max_tokens > 0:
                mean = generated if self._mean_answer is None else self._mean_answer
                self._mean_answer = LENGTH_FADE * mean + (1 - LENGTH_FADE) * generated

        try:
            yield advance
        finally:
            if generated < 0:
                self._count(submit.client, -1, 0, -prompt, -answer)
            else:
                self._count(submit.client, 0, -1, 0, 0)

    def _expected_answer(self, max_tokens: int) -> int:
        return max_tokens if self._mean_answer is None else min(max_tokens, math.ceil(self._mean_answer))

    def _count(self, client: str, waiting: int, running: int, prompt: int, answer: int) -> None:
        load = self._clients.setdefault(client, _Load())
        for each in (load, self._all):
            each.add(waiting, running, prompt, answer)
        if load.waiting == load.running == 0:
            del self._clients[client]

    def _observe(self, stats: EngineStats | None) -> None:
        before, self._seen = self._seen, stats
        if stats is None or stats is before:
            return
        if before is None or stats.full_s < before.full_s:  # a new engine counts from zero
            before = None
        seconds = stats.full_s - (before.full_s if before else 0.0)
        if seconds > 0:
            self._costs.add(
                stats.full_prompt_tokens - (before.full_prompt_tokens if before else 0),
                stats.full_generated_tokens - (before.full_generated_tokens if before else 0),
                seconds,
            )
