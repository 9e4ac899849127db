"""Adjusts logits, in place and only in rows whose request asks for it, and computes log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from reftserve.server.engine.grammar_masks import forbidden_tokens
from reftserve.server.engine.messages import TokenLogprobs
from reftserve.server.engine.sequence import Sequence
from reftserve.server.engine.transfers import ToHost, column, indices, to_device


@torch.inference_mode()
def adjust(logits: Tensor, sequences: list[Sequence]) -> None:
    """Apply penalties, biases and forbidden tokens, in this order. logits: [rows, vocabulary], a row per sequence."""
    penalised = [row for row, s in enumerate(sequences) if s.sampling.has_penalties]
    if penalised:
        _penalise(logits, penalised, [sequences[row] for row in penalised])
    biases = [(row, *bias) for row, s in enumerate(sequences) for bias in s.sampling.logit_bias]
    if biases:
        rows, tokens, values = zip(*biases, strict=True)
        amount = column(values, logits).squeeze(1)
        logits.index_put_((indices(rows, logits.device), indices(tokens, logits.device)), amount, accumulate=True)
    too_short = [
        (row, token)
        for row, s in enumerate(sequences)
        if s.n_generated < s.sampling.min_tokens
        for token in s.sampling.stop_token_ids
    ]
    if too_short:
        rows, tokens = zip(*too_short, strict=True)
        logits[indices(rows, logits.device), indices(tokens, logits.device)] = -torch.inf
    bound = [row for row, s in enumerate(sequences) if s.matcher is not None]
    if bound:
        forbidden = forbidden_tokens([m for s in sequences if (m := s.matcher) is not None], logits.shape[1])
        rows_ = indices(bound, logits.device)
        logits[rows_] = logits[rows_].masked_fill(to_device(forbidden, logits.device), -torch.inf)


class ArrivingLogprobs:
    """Log-probabilities of each row's token and `count` likeliest tokens, arriving on the host. logits: unadjusted."""

    @torch.inference_mode()
    def __init__(self, logits: Tensor, tokens: Tensor, counts: Items[int]) -> None:
        self._counts = counts
        values = logits.float()
        norm = values.logsumexp(dim=-1, keepdim=True)
        top = values.topk(min(max(counts), values.shape[1]), dim=-1)
        chosen = values.gather(1, tokens.unsqueeze(1)) - norm
        self._tokens, self._chosen, self._top_ids, self._top_logprobs = (
            ToHost(tensor) for tensor in (tokens, chosen.squeeze(1), top.indices, top.values - norm)
        )

    def get(self) -> list[TokenLogprobs]:
        """Wait for the copy and return a value for each row."""
        likeliest = zip(self._top_ids.tolist(), self._top_logprobs.tolist(), strict=True)
        rows = zip(self._tokens.tolist(), self._chosen.tolist(), likeliest, self._counts, strict=True)
        return [
            TokenLogprobs(token, logprob, list(zip(ids[:count], logprobs[:count], strict=True)))
            for token, logprob, (ids, logprobs), count in rows
        ]


@torch.inference_mode()
def logprobs_of(logits: Tensor, token_ids: list[int]) -> list[TokenLogprobs]:
    """Return the log-probabilities of tokens at one position. logits: [vocabulary], unadjusted."""
    values = logits.float()
    logprobs = (values[indices(token_ids, logits.device)] - values.logsumexp(dim=-1)).tolist()
    return [TokenLogprobs(token, logprob, []) for token, logprob in zip(token_ids, logprobs, strict=True)]


def _penalise(logits: Tensor, rows: list[int], sequences: list[Sequence]) -> None:
    """Change the logits of tokens that a sequence holds; no other logit depends on penalties."""
    counts = [sequence.token_counts for sequence in sequences]
    num_distinct = [len(each.ids) for each in counts]

    def repeated(values: list[float]) -> Tensor:
        return to_device(np.repeat(np.array(values, dtype=np.float32), num_distinct), logits.device).to(logits.dtype)

    index = (
        to_device(np.repeat(rows, num_distinct), logits.device),
        to_device(np.concatenate([each.ids for each in counts]), logits.device),
    )
    answer = to_device(np.concatenate([each.in_answer for each in counts]), logits.device).to(logits.dtype)
    values = logits[index]
    repetition = repeated([s.sampling.repetition_penalty for s in sequences])
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= repeated([s.sampling.frequency_penalty for s in sequences]) * answer
    values -= repeated([s.sampling.presence_penalty for s in sequences]) * (answer > 0)
    logits[index] = values
