"""The waiting sequences, fair among clients: the client that has received the fewest tokens goes next.

Each client has a counter of the tokens admitted for it (Sheng et al. 2024, "Fairness in Serving Large Language
Models", virtual token counters). A client that returns after a pause starts at the smallest counter of the active
clients, so it cannot save up. Within a client the sequence with the smallest `order` is first.

`order` begins with a moment, a request's arrival shifted by its priority. A sequence before its moment waits for all
sequences of all clients that are past theirs.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass, field

from reftserve.server.engine.sequence import Sequence

REMEMBERED_CLIENTS = 1024  # idle clients whose counters are kept
EXPECTED_ANSWER = 256  # at most so many tokens of an answer are charged in advance


@dataclass(eq=False)
class _Client:
    """tokens: admitted so far. active: sequences that wait or run. waiting: ordered by `order`."""

    tokens: float = 0.0
    active: int = 0
    waiting: list[Sequence] = field(default_factory=list)

    @property
    def running(self) -> int:
        return self.active - len(self.waiting)


class FairQueue:
    """Waiting sequences by client, and the tokens that each client has received."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self._length = 0
        self._floor = 0.0  # the counter of the client that left last, where all begin that find nobody

    def __len__(self) -> int:
        """Return the number of waiting sequences."""
        return self._length

    @property
    def num_clients(self) -> int:
        """Return the number of clients whose counters are kept."""
        return len(self._clients)

    def arrive(self, sequence: Sequence) -> None:
        """Queue a new sequence; its client counts as active until all its sequences have left."""
        entry = self._clients.setdefault(sequence.client, _Client())
        if entry.active == 0:
            active = (each.tokens for each in self._clients.values() if each.active)
            entry.tokens = max(entry.tokens, min(active, default=self._floor))
            self._clients.move_to_end(sequence.client)
        entry.active += 1
        self.push(sequence)

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence that has arrived before."""
        insort(self._clients[sequence.client].waiting, sequence, key=order_of)
        self._length += 1

    def first(self, now: float) -> Sequence:
        """Return the sequence that goes next. now: on the clock of `order`. The queue must not be empty."""
        clients = [entry for entry in self._clients.values() if entry.waiting]
        due = [entry for entry in clients if entry.waiting[0].order[0] <= now]
        if due:
            # Of clients with equal counters, such as one that has just returned, the one with fewer running goes first.
            return min(due, key=lambda each: (each.tokens, each.running, each.waiting[0].order)).waiting[0]
        return min((entry.waiting[0] for entry in clients), key=order_of)

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out of the queue."""
        self._clients[sequence.client].waiting.remove(sequence)
        self._length -= 1

    def charge(self, sequence: Sequence) -> None:
        """Charge an admitted sequence to its client, once: its tokens, and an expected answer."""
        if sequence.charged == 0:
            sequence.charged = len(sequence.token_ids) + min(sequence.sampling.max_tokens, EXPECTED_ANSWER)
            self._clients[sequence.client].tokens += sequence.charged

    def leave(self, sequence: Sequence) -> None:
        """Forget an ended sequence. If it was charged, its client has paid for the tokens that there are."""
        entry = self._clients[sequence.client]
        entry.active -= 1
        if sequence.charged:
            entry.tokens += len(sequence.token_ids) - sequence.charged
        self._floor = entry.tokens
        while len(self._clients) > REMEMBERED_CLIENTS:
            idle = next((name for name, each in self._clients.items() if each.active == 0), None)
            if idle is None:
                return
            del self._clients[idle]


def order_of(sequence: Sequence) -> tuple[float, int]:
    """Return the sequence's place within its client."""
    return sequence.order
