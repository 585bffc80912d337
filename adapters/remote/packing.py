"""Messages: msgpack with NumPy arrays, as ``openpi_client`` writes them. Nothing is pickled."""

import math
from typing import Any

import msgpack
import numpy as np

REFUSED_KINDS = "OVc"  # NumPy kinds that do not travel: objects, records, complex numbers


def pack(message: Any) -> bytes:
    """Encode a message: msgpack, NumPy arrays and scalars as dicts of dtype, shape and bytes.

    ``ValueError`` or ``TypeError`` where it holds something else, such as an array of objects.
    """
    return msgpack.packb(message, default=_pack_numpy)


def unpack(data: bytes) -> Any:
    """Decode what ``pack`` or openpi encoded. Arrays are read-only views of ``data``.

    ``ValueError`` or ``TypeError`` where it is not msgpack, or an array is not what it says.
    """
    return msgpack.unpackb(data, object_hook=_unpack_numpy)


def _pack_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in REFUSED_KINDS:
            raise ValueError(f"arrays of {value.dtype} are not sent")
        kind = value.dtype.str
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": kind, b"shape": value.shape}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": kind}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _unpack_numpy(value: dict) -> Any:
    if b"__ndarray__" in value:
        dtype, shape, data = _dtype(value[b"dtype"]), tuple(value[b"shape"]), value[b"data"]
        if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes are no array {shape} of {dtype}")
        return np.ndarray(shape, dtype, data)
    if b"__npgeneric__" in value:
        return _dtype(value[b"dtype"]).type(value[b"data"])
    return value


def _dtype(name: Any) -> np.dtype:
    dtype = np.dtype(name) if isinstance(name, str) else None
    if dtype is None or dtype.kind in REFUSED_KINDS:
        raise ValueError(f"arrays of {name!r} are not accepted")
    return dtype
