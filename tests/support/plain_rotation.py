"""The reference for the CPU kernels' rotary embeddings: those of transformers, with heads of many sizes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

HEADS = {
    "rows": st.integers(1, 40),
    "heads": st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    "dim": st.sampled_from([2, 8, 20, 64]),
    "rest": st.sampled_from([0, 4]),  # unrotated numbers of a head
    "seed": st.integers(0, 100),
}


def plain_rotation(rows: Tensor, cosines: Tensor, sines: Tensor, size: int) -> Tensor:
    """Rotate the first numbers of each head. rows: [tokens, heads * size]. cosines, sines: [tokens, rotated]."""
    heads, rotated = rows.unflatten(-1, (-1, size)).transpose(0, 1), cosines.shape[-1]
    part, _ = apply_rotary_pos_emb(*[heads[None, ..., :rotated]] * 2, cosines[None], sines[None])
    return torch.cat([part[0], heads[..., rotated:]], dim=-1).transpose(0, 1).flatten(1)
