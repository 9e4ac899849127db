"""The rank columns of edits as numpy arrays: names, types, checks and hash, for processes without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from reftserve.interventions.intervention_errors import DtypeError, ManifestError, NonFiniteError, ShapeError, shorten
from reftserve.interventions.strict_json import check_json

TENSORS = ("A", "b", "U", "act", "scale")
MAX_HEADER_BYTES = 64 << 10  # five tensors take about 400 bytes
Columns = dict[str, NDArray[Any]]

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class Activation(IntEnum):
    """The function that a rank column applies to h · A + b, named as in transformers' ACT2FN."""

    LINEAR = 0
    RELU = 1
    GELU = 2
    TANH = 3
    SIGMOID = 4
    SILU = 5


def read_columns(edits_bytes: bytes, file: str) -> Columns:
    """Read and check an artifact's edits: a safetensors file of exactly five tensors. file: its name, for messages."""
    _check_header(edits_bytes, file)
    try:
        found = {name: _array(tensor) for name, tensor in deserialize(edits_bytes)}  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError, TypeError, OverflowError) as cause:  # numpy's errors for absurd shapes
        raise ManifestError(f"{file} is not a safetensors file: {shorten(str(cause))}") from cause
    if found.keys() != set(TENSORS):
        missing, surplus = sorted(set(TENSORS) - found.keys()), sorted(found.keys() - set(TENSORS))
        raise ManifestError(f"{file}: missing tensors {missing}, unexpected ones {shorten(str(surplus))}")
    if dtype_name(found["A"]) != "float32":
        raise DtypeError(f"A is torch.{dtype_name(found['A'])}; artifacts hold torch.float32")
    check_columns(found)
    return {name: found[name] for name in TENSORS}


def _check_header(edits_bytes: bytes, file: str) -> None:
    size = int.from_bytes(edits_bytes[:8], "little")
    header = edits_bytes[8 : 8 + min(size, len(edits_bytes))]
    try:
        check_json(header, "header", max_bytes=MAX_HEADER_BYTES)
    except ManifestError as cause:
        raise ManifestError(f"{file} is not a safetensors file: {cause}") from cause


def check_columns(columns: Mapping[str, Any]) -> None:
    """Raise ShapeError, DtypeError or NonFiniteError unless A, U [rank, hidden], b, act, scale [rank] form an edit."""
    A = columns["A"]
    if A.ndim != 2 or 0 in A.shape:
        raise ShapeError(f"A has shape {shorten(str(list(A.shape)))}; expected [rank, hidden], both above 0")
    rank, hidden = A.shape
    expected = {"A": [rank, hidden], "b": [rank], "U": [rank, hidden], "act": [rank], "scale": [rank]}
    for name, shape in expected.items():
        array = columns[name]
        dtype = dtype_name(array)
        if list(array.shape) != shape:
            raise ShapeError(f"{name} has shape {shorten(str(list(array.shape)))}; expected {shape}")
        if name == "act":
            if dtype != "int8":
                raise DtypeError(f"act is torch.{dtype}; expected torch.int8")
            if not ((array >= 0) & (array < len(Activation))).all():
                raise DtypeError(
                    f"act holds {shorten(str(sorted(set(array.tolist()))))}; expected 0 to {len(Activation) - 1}"
                )
        elif "float" not in dtype or dtype != dtype_name(A):
            raise DtypeError(f"{name} is torch.{dtype}; A, b, U and scale need one floating-point type")
        elif not _is_finite(array):
            raise NonFiniteError(f"{name} contains NaN or infinity; all numbers must be finite")


def hash_columns(columns: Columns) -> str:
    """Return the SHA-256 over shapes, types and numbers, equal to `LowRankEdit.content_hash`."""
    digest = hashlib.sha256()
    for name in TENSORS:
        array = columns[name]
        digest.update(f"{name} torch.{dtype_name(array)} {list(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def dtype_name(array: Any) -> str:
    """Return the name of an array's or a tensor's type, such as `float32`."""
    return str(array.dtype).removeprefix("torch.")


def _array(tensor: Mapping[str, Any]) -> NDArray[Any]:
    name = TORCH_NAMES.get(tensor["dtype"], tensor["dtype"])
    # numpy has no bfloat16 and no 8-bit floats, which artifacts may not hold.
    try:
        dtype = np.dtype(name)
    except TypeError as cause:
        raise TypeError(f"a tensor is torch.{name}") from cause
    return np.frombuffer(tensor["data"], dtype=dtype).reshape(tensor["shape"])


def _is_finite(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return bool(np.isfinite(array).all())
    # torch's own test starts threads on large tensors. In the loader's thread they compete with the engine's step.
    if array.device.type == "cpu" and dtype_name(array) in ("float32", "float64"):
        return bool(np.isfinite(array.detach().numpy()).all())
    return bool(array.isfinite().all())
