"""The activations that no training step changes, computed once per example. The forward passes are in `varlen.py`.

The base is frozen and causal. With edits at layer `lowest` and above, from token `start` of an example on:

    layers up to `lowest`    constant for every token    cached: the output of `lowest` for the tokens from `start` on
    tokens before `start`    constant in every layer     cached: their keys and values in the layers above `lowest`

So an epoch computes only the tokens from `start` on in the layers above `lowest`: with `l1`, the last prompt token and
the completion. Examples beyond the budget are recomputed from their first token at each step.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reftserve.interventions import Positions
from reftserve.server.datasets import EncodedExample
from reftserve.server.training.spans import Batch, Span, VarlenRows, in_passes
from reftserve.server.training.varlen import RowEdit, VarlenModel

logger = logging.getLogger(__name__)
FILL_ROWS = 1024  # tokens per pass while the cache is filled
FILE_NUMBERS = 64 << 20  # float32 numbers per file of the disk tier
NUMBER_BYTES = 4


class Arena:
    """A budget for write-once tensors: memory, then for CPU tensors mapped files, which vanish with the process."""

    def __init__(self, memory_bytes: int, disk_bytes: int = 0, folder: Path | None = None) -> None:
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes if folder is not None else 0
        self._folder = folder
        self._file = torch.empty(0)
        self.is_full = False

    def store(self, tensor: Tensor) -> Tensor | None:
        """Return a stored copy, or None if neither tier has room."""
        if tensor.nbytes <= self._memory_bytes:
            self._memory_bytes -= tensor.nbytes
            return tensor.clone(memory_format=torch.contiguous_format)
        count = -(-tensor.nbytes // NUMBER_BYTES)
        if tensor.device.type != "cpu" or (count > len(self._file) and not self._has_new_file(count)):
            self.is_full = True
            return None
        room, self._file = self._file[:count].view(torch.uint8)[: tensor.nbytes], self._file[count:]
        return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _has_new_file(self, count: int) -> bool:
        """Allocate the next file for at least `count` numbers; return False if the budget or the disk lacks room."""
        size = min(FILE_NUMBERS, self._disk_bytes // NUMBER_BYTES)
        if count > size:
            return False
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="cache-") as file:
            try:
                # Writing to a mapped file without disk space would kill the process with SIGBUS.
                os.posix_fallocate(file.fileno(), 0, size * NUMBER_BYTES)
            except OSError as cause:
                logger.warning(
                    "the activation cache has no more disk; later examples are recomputed each step: %s", cause
                )
                self._disk_bytes = 0
                return False
            self._file = torch.from_file(file.name, shared=True, size=size)
        self._disk_bytes -= size * NUMBER_BYTES
        return True


@dataclass(frozen=True)
class CachedActivations:
    """An example's constant activations. hidden: output of `lowest` for the tokens from `start` on, [rows, hidden].

    before: keys and values of the tokens before, one [2, kv_heads, start, dim] per layer above `lowest`, or empty.
    """

    start: int
    hidden: Tensor
    before: tuple[Tensor, ...]


class _CachedPrefixes:
    def __init__(self, cached: Sequence[CachedActivations], first_layer: int) -> None:
        self._by_layer = list(zip(*(each.before for each in cached), strict=True))
        self._first_layer = first_layer

    def of(self, layer: int) -> Sequence[Tensor]:
        return self._by_layer[layer - self._first_layer]


class ActivationCache:
    """Activations that stay constant under edits at `lowest` and above, at or after the tokens of `positions`."""

    def __init__(self, varlen: VarlenModel, lowest: int, positions: Iterable[Positions], arena: Arena) -> None:
        self.varlen = varlen
        self.lowest = lowest
        self._positions = tuple(positions)
        self._has_prefixes = not any(p.first or p.prompt for p in self._positions)
        self._arena = arena
        self._cached: dict[EncodedExample, CachedActivations] = {}

    def __len__(self) -> int:
        return len(self._cached)

    def is_valid_for(self, layers: Iterable[int], positions: Iterable[Positions]) -> bool:
        """Return whether edits at these layers and positions leave the cached activations unchanged."""
        return min(layers) >= self.lowest and set(positions) <= set(self._positions)

    def start(self, example: EncodedExample) -> int:
        """Return the first edited token, or the last prompt token if that comes first: it predicts the completion."""
        n_prompt, stop = len(example.prompt_ids), example.length - 1
        edited = [indices[0] for p in self._positions if len(indices := p.indices(n_prompt, 0, stop))]
        return int(min([n_prompt - 1, *edited]))

    def fill(self, examples: Iterable[EncodedExample], poll: Callable[[], object] = lambda: None) -> None:
        """Cache the examples that are missing, until the arena is full. poll: called between passes; may raise."""
        missing = Batch(list(dict.fromkeys(e for e in examples if e not in self._cached)))
        families = missing.families(Span(example, 0, example.length - 1) for example in missing.examples)
        for spans in in_passes(families, FILL_ROWS):
            poll()
            if not self._fill(spans):
                return

    def logits(self, rows: VarlenRows, edits: dict[int, list[RowEdit]]) -> Tensor:
        """Return the targets' logits under edits, [targets, vocabulary]. All spans are cached or none is (`passes`)."""
        cached = [self._cached[span.example] for span in rows.spans if span.example in self._cached]
        if not cached:
            return self.varlen.logits(rows, edits)
        pairs = zip(rows.spans, cached, strict=True)
        hidden = [each.hidden[span.start - each.start : span.stop - each.start] for span, each in pairs]
        return self.varlen.logits(
            rows,
            edits,
            prefixes=_CachedPrefixes(cached, self.lowest + 1) if self._has_prefixes else None,
            begin=(self.lowest, torch.cat(hidden)),
        )

    def passes(self, batches: Sequence[Batch], max_rows: int) -> list[list[Span]]:
        """Divide the batches' examples into passes of up to `max_rows` rows, each all cached or all uncached."""
        passes: list[list[Span]] = []
        for is_cached in (True, False):
            families: list[list[Span]] = []
            for number, batch in enumerate(batches):
                chosen = [example for example in batch.examples if (example in self._cached) is is_cached]
                families += batch.families(self.span(example, number) for example in chosen)
            passes += in_passes(families, max_rows)
        return passes

    def span(self, example: EncodedExample, batch: int = 0) -> Span:
        """Return the tokens of an example that a pass computes: all if it is not cached."""
        return Span(example, self.start(example) if example in self._cached else 0, example.length - 1, batch)

    def _fill(self, spans: Sequence[Span]) -> bool:
        rows = VarlenRows(spans, self.varlen.device)
        starts = [self.start(span.example) for span in rows.scored]
        tokens = [rows.with_parent(number) for number, span in enumerate(rows.spans) if span.targets]
        before: list[list[Tensor]] = []

        def seen(layer: int, key: Tensor, value: Tensor) -> None:
            both = torch.stack([key, value])
            before.append([both[:, :, at[:start]] for at, start in zip(tokens, starts, strict=True)])

        hidden = self.varlen.constants(rows, self.lowest, seen, above=self._has_prefixes)
        for index, (span, at, start) in enumerate(zip(rows.scored, tokens, starts, strict=True)):
            parts = [hidden[at[start:]], *(layer[index] for layer in before)]
            stored = [self._arena.store(part) for part in parts]
            if any(part is None for part in stored):
                return False
            copies = [part for part in stored if part is not None]
            self._cached[span.example] = CachedActivations(start, copies[0], tuple(copies[1:]))
        return True


class ActivationCaches:
    """The caches of one data set, named by `data`, in one arena; a job's trials and consecutive jobs share them."""

    def __init__(self, varlen: VarlenModel, arena: Arena, *, data: str = "") -> None:
        self._data = data
        self._varlen, self._arena = varlen, arena
        self._caches: dict[tuple[int, frozenset[Positions]], ActivationCache] = {}

    def is_valid_for(self, data: str, sites: Collection[tuple[int, frozenset[Positions]]]) -> bool:
        """Return whether new caches would serve a job on this data, with edits at these sites, no better."""
        return self._data == data and set(sites) == self._caches.keys() and not self._arena.is_full

    def get(self, lowest: int, positions: frozenset[Positions]) -> ActivationCache:
        """Return the cache for edits at `lowest` and above, at or after the tokens of `positions`; create it if new."""
        if (lowest, positions) not in self._caches:
            self._caches[lowest, positions] = ActivationCache(self._varlen, lowest, positions, self._arena)
        return self._caches[lowest, positions]
