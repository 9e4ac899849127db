"""What no step of a training run changes, computed once for each example and kept.

The base is frozen and causal. Under edits at layer `lowest` and above, from token `start` of an example on:

    layers up to `lowest`      their output is constant everywhere       kept: output of `lowest`, tokens from start on
    tokens before `start`      constant in every layer                   kept: their keys and values above `lowest`

So an epoch computes only the tokens from `start` on in the layers above `lowest`: of `l1` the last prompt token and the
completion. Trials of a sweep share a cache whose `lowest` and `start` hold for all of them. What the budget has no room
for is computed anew each time.
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
FILL_ROWS = 1024  # tokens of one pass while the cache is filled
FILE_NUMBERS = 64 << 20  # float32 numbers in one file of the disk tier
NUMBER_BYTES = 4


class Arena:
    """Room for tensors that are written once: memory first, on the CPU then files that vanish with the process.

    is_full: whether something found no room.
    """

    def __init__(self, memory_bytes: int, disk_bytes: int = 0, folder: Path | None = None) -> None:
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes if folder is not None else 0
        self._folder = folder
        self._file = torch.empty(0)
        self.is_full = False

    def keep(self, tensor: Tensor) -> Tensor | None:
        """A copy, or None when there is no room."""
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
        """Whether budget and disk have room for a file of at least `count` numbers, which then is there."""
        size = min(FILE_NUMBERS, self._disk_bytes // NUMBER_BYTES)
        if count > size:
            return False
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="cache-") as file:
            try:
                # A write into a file for which the disk has no room would end the process.
                os.posix_fallocate(file.fileno(), 0, size * NUMBER_BYTES)
            except OSError as cause:
                logger.warning("what steps have in common is computed anew from here on: %s", cause)
                self._disk_bytes = 0
                return False
            self._file = torch.from_file(file.name, shared=True, size=size)
        self._disk_bytes -= size * NUMBER_BYTES
        return True


@dataclass(frozen=True)
class Kept:
    """One example's constants.

    hidden: of the tokens from `start` on, [rows, hidden]. before: keys and values of each layer above the lowest edited
    one, [2, kv_heads, start, dim]; empty where spans begin their examples.
    """

    start: int
    hidden: Tensor
    before: tuple[Tensor, ...]


class _KeptPrefixes:
    """Keys and values of several examples, by layer."""

    def __init__(self, kept: Sequence[Kept], first_layer: int) -> None:
        self._by_layer = list(zip(*(each.before for each in kept), strict=True))
        self._first_layer = first_layer

    def of(self, layer: int) -> Sequence[Tensor]:
        """Each example's, [2, kv_heads, start, dim]."""
        return self._by_layer[layer - self._first_layer]


class ActivationCache:
    """Constants of examples under any edits at `lowest` and above that touch no token before those of `positions`."""

    def __init__(self, packed: VarlenModel, lowest: int, positions: Iterable[Positions], arena: Arena) -> None:
        self.packed = packed
        self.lowest = lowest
        self._positions = tuple(positions)
        self._has_prefixes = not any(p.first or p.prompt for p in self._positions)
        self._arena = arena
        self._kept: dict[EncodedExample, Kept] = {}

    def __len__(self) -> int:
        """Examples that are kept."""
        return len(self._kept)

    def is_valid_for(self, layers: Iterable[int], positions: Iterable[Positions]) -> bool:
        """Whether edits at these places leave the constants constant."""
        return min(layers) >= self.lowest and set(positions) <= set(self._positions)

    def start(self, example: EncodedExample) -> int:
        """The first token that is not constant in all layers, or the first that predicts if that comes before."""
        n_prompt, stop = len(example.prompt_ids), example.length - 1
        edited = [indices[0] for p in self._positions if len(indices := p.indices(n_prompt, 0, stop))]
        return int(min([n_prompt - 1, *edited]))

    def fill(self, examples: Iterable[EncodedExample], poll: Callable[[], object] = lambda: None) -> None:
        """Compute and keep what is not there yet, as far as there is room. poll: called between passes; may raise."""
        missing = Batch(list(dict.fromkeys(e for e in examples if e not in self._kept)))
        families = missing.families(Span(example, 0, example.length - 1) for example in missing.examples)
        for spans in in_passes(families, FILL_ROWS):
            poll()
            if not self._fill(spans):
                return

    def logits(self, rows: VarlenRows, edits: dict[int, list[RowEdit]]) -> Tensor:
        """The targets' logits under edits, [targets, vocabulary]; the spans are all kept, or none is (`passes`)."""
        kept = [self._kept[span.example] for span in rows.spans if span.example in self._kept]
        if not kept:
            return self.packed.logits(rows, edits)
        pairs = zip(rows.spans, kept, strict=True)
        hidden = [each.hidden[span.start - each.start : span.stop - each.start] for span, each in pairs]
        return self.packed.logits(
            rows,
            edits,
            prefixes=_KeptPrefixes(kept, self.lowest + 1) if self._has_prefixes else None,
            begin=(self.lowest, torch.cat(hidden)),
        )

    def passes(self, batches: Sequence[Batch], max_rows: int) -> list[list[Span]]:
        """What one forward pass computes together: all examples of the batches, in passes of up to `max_rows` rows.

        The examples of a pass are all kept, or none is.
        """
        passes: list[list[Span]] = []
        for is_kept in (True, False):
            families: list[list[Span]] = []
            for number, batch in enumerate(batches):
                chosen = [example for example in batch.examples if (example in self._kept) is is_kept]
                families += batch.families(self.span(example, number) for example in chosen)
            passes += in_passes(families, max_rows)
        return passes

    def span(self, example: EncodedExample, batch: int = 0) -> Span:
        """The tokens of an example that are not constant in all layers."""
        return Span(example, self.start(example) if example in self._kept else 0, example.length - 1, batch)

    def _fill(self, spans: Sequence[Span]) -> bool:
        """Whether there was room for all of them."""
        rows = VarlenRows(spans, self.packed.device)
        starts = [self.start(span.example) for span in rows.scored]
        tokens = [rows.with_parent(number) for number, span in enumerate(rows.spans) if span.targets]
        before: list[list[Tensor]] = []

        def seen(layer: int, key: Tensor, value: Tensor) -> None:
            both = torch.stack([key, value])
            before.append([both[:, :, at[:start]] for at, start in zip(tokens, starts, strict=True)])

        hidden = self.packed.constants(rows, self.lowest, seen, above=self._has_prefixes)
        for index, (span, at, start) in enumerate(zip(rows.scored, tokens, starts, strict=True)):
            parts = [hidden[at[start:]], *(layer[index] for layer in before)]
            kept = [self._arena.keep(part) for part in parts]
            if any(part is None for part in kept):
                return False
            found = [part for part in kept if part is not None]
            self._kept[span.example] = Kept(start, found[0], tuple(found[1:]))
        return True


class ActivationCaches:
    """The caches of one data set, in one arena: of jobs that follow each other, or of the trials of one.

    data: tells one data set from another.
    """

    def __init__(self, packed: VarlenModel, arena: Arena, *, data: str = "") -> None:
        self._data = data
        self._packed, self._arena = packed, arena
        self._caches: dict[tuple[int, frozenset[Positions]], ActivationCache] = {}

    def is_valid_for(self, data: str, places: Collection[tuple[int, frozenset[Positions]]]) -> bool:
        """Whether a job on such data, with caches of these layers and positions, would fare no better with new ones."""
        return self._data == data and set(places) == self._caches.keys() and not self._arena.is_full

    def get(self, lowest: int, positions: frozenset[Positions]) -> ActivationCache:
        """The cache under edits at `lowest` and above that touch no token before those of `positions`."""
        if (lowest, positions) not in self._caches:
            self._caches[lowest, positions] = ActivationCache(self._packed, lowest, positions, self._arena)
        return self._caches[lowest, positions]
