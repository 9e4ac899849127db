"""A GPU tensor that the engine lends to another process, as plain data that needs no torch."""

from __future__ import annotations

import msgspec


class LentTensor(msgspec.Struct, frozen=True):
    """The fields that `torch.multiprocessing` would pickle. storage, counter, event: IPC handles; read after event."""

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
