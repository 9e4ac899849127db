"""A GPU tensor that the engine lends to another process, as plain data: passing it on needs no torch."""

from __future__ import annotations

import msgspec


class LentTensor(msgspec.Struct, frozen=True):
    """A tensor in another process's GPU memory: what `torch.multiprocessing` would pickle, as plain data.

    storage, counter, event: the IPC handle of the memory, of the shared count of its users, and of the moment from
    which on it may be read.
    """

    dtype: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    device: int
    storage: bytes
    storage_bytes: int
    storage_offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_sync: bool
