"""Samples tokens from logits, vectorised over the batch; each row uses its request's parameters.

A token depends only on (logits, seed, position): a uniform number hashed from seed and position is looked up in the
cumulative distribution. Without generator state, a seed gives the same tokens in any batch and after preemption.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reftserve.server.engine.messages import SamplingParams
from reftserve.server.engine.transfers import column, indices, to_device

LOWEST_TEMPERATURE = 1e-6


def present(tokens: list[int]) -> list[int | None]:
    """Return tokens of `sample` with None for -1."""
    return [token if token >= 0 else None for token in tokens]


def sample(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> Tensor:
    """Return one token for each row, [rows]; -1 if the row's largest logit is not finite: an edit overflowed.

    logits: [rows, vocabulary]. positions: index of each row's new token in its sequence. Does not wait for the device.
    """
    largest, tokens = logits.max(dim=-1)
    sampled = [row for row, p in enumerate(params) if p.temperature > 0]
    if sampled:
        rows = indices(sampled, logits.device)
        tokens[rows] = _sample_rows(logits[rows], [params[row] for row in sampled], [positions[row] for row in sampled])
    return torch.where(largest.isfinite(), tokens, -1)


def _sample_rows(logits: Tensor, params: list[SamplingParams], positions: list[int]) -> Tensor:
    # Subtract the largest logit first, so that a tiny temperature gives neither infinity nor 0 / 0.
    logits = logits.float()
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    temperature = column([max(p.temperature, LOWEST_TEMPERATURE) for p in params], shifted)
    probabilities = torch.softmax(shifted / temperature, dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=logits.device)
    top_k = column([p.top_k or ordered.shape[1] for p in params], shifted)
    ordered = ordered.masked_fill(rank >= top_k, 0.0)
    ordered /= ordered.sum(dim=-1, keepdim=True)
    # Nucleus: the smallest set that reaches top_p, including the token that crosses it. 1 keeps all tokens: in float32
    # the sum reaches 1 before the last one.
    before = ordered.cumsum(dim=-1) - ordered
    top_p = column([p.top_p if p.top_p < 1 else math.inf for p in params], shifted)
    ordered = ordered.masked_fill((before >= top_p) & (rank > 0), 0.0)
    ordered = ordered.masked_fill(ordered < column([p.min_p for p in params], shifted) * ordered[:, :1], 0.0)
    cumulative = ordered.double().cumsum(dim=-1)
    uniform = to_device(uniforms([p.seed for p in params], positions), logits.device).unsqueeze(1)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last = (ordered > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(index, last).clamp(min=0)).squeeze(1)


def uniforms(seeds: list[int], positions: list[int]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each (seed, position): SplitMix64 (Steele, Lea, Flood 2014) in counter mode."""
    with np.errstate(over="ignore"):
        seed = np.array([s % 2**64 for s in seeds], dtype=np.uint64)
        state = _mix(seed) + np.array(positions, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = _mix(state)
    uniform: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
