"""A step between its launch and its end: the device computes, the host has not seen the tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from reftserve.server.engine.logits import ArrivingLogprobs
from reftserve.server.engine.scheduler import Batch
from reftserve.server.engine.sequence import Sequence
from reftserve.server.engine.transfers import ToHost


@dataclass(frozen=True)
class LaunchedStep:
    """What a step gives when it ends.

    sampling: sequences that get a token, in the order of `tokens` [rows] on the device, -1 where there is none;
    arriving: the same on its way to the host. asking: rows that want to know how likely their token was; logprobs:
    that, on its way too.
    """

    batch: Batch
    sampling: list[Sequence] = field(default_factory=list)
    tokens: Tensor | None = None
    arriving: ToHost | None = None
    asking: list[int] = field(default_factory=list)
    logprobs: ArrivingLogprobs | None = None
