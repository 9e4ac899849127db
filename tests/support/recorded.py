"""Emulates the GPU in tests: attention over the paged cache in plain torch, and a recorder with CUDA's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reftserve.server.base.attention import LayerShape
from reftserve.server.engine.kv_cache.cuda import CudaCache, PromptRows
from reftserve.server.engine.runner import Runner


class PlainKernels:
    """CudaKernels in plain torch; it gathers whole block tables."""

    def store(self, keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        for store, new in ((keys, key), (values, value)):
            store.view(-1, *store.shape[2:]).index_copy_(0, slots, new.transpose(0, 1))

    def prompts(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: PromptRows,
        tiles: dict[int, Tensor],
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        counts = torch.from_numpy(rows.counts)
        chunk = torch.repeat_interleave(torch.arange(len(counts)), counts)
        lengths = (rows.lengths - counts)[chunk] + torch.arange(len(chunk)) - rows.first_rows[chunk] + 1
        self.decodes(query, keys, values, rows.tables[chunk], lengths, scale, window, out)

    def decodes(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        lengths: Tensor,
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        group = query.shape[0] // keys.shape[2]
        # [rows, heads, tokens, dim]
        gathered = [t[tables].flatten(1, 2).transpose(1, 2).repeat_interleave(group, 1) for t in (keys, values)]
        at = torch.arange(gathered[0].shape[2])
        seen = (at < lengths[:, None]) & (at >= lengths[:, None] - (window or 10**6))
        scores = query.transpose(0, 1).unsqueeze(2) @ gathered[0].transpose(2, 3) * scale
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        out.copy_((weights @ gathered[1].masked_fill(~seen[:, None, :, None], 0.0)).squeeze(2))


class Recording(TorchDispatchMode):
    """Replays operations without Python; refuses those that read values or host memory, like a CUDA graph."""

    REFUSED = ("_local_scalar_dense", "nonzero", "lift_fresh", "unique", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"a CUDA graph cannot record {name}"
        out = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._operations:
            again = func(*args, **kwargs)
            for new, kept in zip(tree_leaves(again), tree_leaves(out), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != kept.data_ptr():
                    kept.copy_(new)


def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a run, as `record_cuda_graph`; the returned function writes into the recorded run's output tensor."""
    recording = Recording()
    with recording:
        output = compute()

    def replay() -> Tensor:
        recording.replay()
        return output

    return replay


def use_paged_cache(runner: Runner, shapes: list[LayerShape], blocks: int) -> None:
    size = runner.cache.block_size
    bytes_per_block = size * sum(s.kv_heads * (s.key_dim + s.value_dim) for s in shapes) * runner.model.dtype.itemsize
    runner.cache = CudaCache(
        shapes,
        block_size=size,
        max_bytes=blocks * bytes_per_block,
        dtype=runner.model.dtype,
        device=runner.device,
        kernels=PlainKernels(),
    )
