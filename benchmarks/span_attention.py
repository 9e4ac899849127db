"""Compare attention to kept prefixes by the CPU kernel and torch, best of 12: `python benchmarks/span_attention.py`."""

from __future__ import annotations

import random
import time

import torch
import workload as w
from torch import Tensor

from reftserve.server.base.cpu_kernels import load_kernels
from reftserve.server.datasets import EncodedExample
from reftserve.server.training.spans import Span, VarlenRows
from reftserve.server.training.varlen_attention import SpanAttention, VarlenAttention

SPANS, ROUNDS = 10, 12
HEADS = {"9 heads, 3 of keys": (9, 3), "32 heads, 8 of keys": (32, 8)}
DIM = 64
SHAPES = [(2, 60), (8, 100), (16, 200), (64, 100), (64, 500), (200, 300), (500, 500)]


class Kept:
    """Random keys and values, equal in every layer."""

    def __init__(self, starts: list[int], heads: int) -> None:
        self._kept = [torch.randn(2, heads, start, DIM) for start in starts]

    def of(self, layer: int) -> list[Tensor]:
        """Return the prefix of each span."""
        return self._kept


def best(heads: tuple[int, int], width: int, start: int) -> dict[str, float]:
    draw = random.Random(0)  # noqa: S311 - sizes, not a secret
    widths, starts = ([draw.randint(-(-most // 2), most) for _ in range(SPANS)] for most in (width, start))
    examples = [EncodedExample((0,) * (s + 1), (0,) * n) for n, s in zip(widths, starts, strict=True)]
    rows = VarlenRows([Span(e, s, e.length - 1) for e, s in zip(examples, starts, strict=True)], torch.device("cpu"))
    kept = Kept(starts, heads[1])
    new = [torch.randn(sum(widths), n, DIM).transpose(0, 1).requires_grad_() for n in (heads[0], heads[1], heads[1])]
    ways = {"kernel": SpanAttention(rows, kept), "torch": VarlenAttention(rows, kept)}
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            way.attend(0, *new, None, None).sum().backward()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def main() -> None:
    torch.set_num_threads(2)
    load_kernels()
    print(f"{SPANS} spans; {w.machine()}")
    for name, heads in HEADS.items():
        for width, start in SHAPES:
            seconds = best(heads, width, start)
            print(
                f"{name}, up to {width} rows after up to {start}: {1e3 * seconds['kernel']:.2f} ms, "
                f"torch / kernel {seconds['torch'] / seconds['kernel']:.2f}"
            )


if __name__ == "__main__":
    main()
