"""Bytes that follow from a seed, and safetensors files of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from hashlib import shake_128
from typing import Any

Tensor = tuple[str, str, Sequence[int], bytes]  # name, dtype, shape, bytes


def stream(seed: str, length: int) -> bytes:
    """Bytes that look random and follow from the seed."""
    return shake_128(seed.encode()).digest(length)


def hexes(seed: str) -> str:
    """A digest of nothing in particular."""
    return stream(seed, 32).hex()


def floats(seed: str, count: int) -> bytes:
    """Little-endian float32 between -1 and 1, all of them finite."""
    words = struct.unpack(f"<{count}h", stream(seed, 2 * count))
    return struct.pack(f"<{count}f", *(word / 32768 for word in words))


def safetensors_file(
    tensors: Sequence[Tensor], metadata: Mapping[str, str] | None = None, *, reverse: bool = False
) -> bytes:
    """A safetensors file with the data in the given order.

    Args:
        reverse: names the tensors in the header from the last to the first, which the format allows.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    if reverse:
        header = dict(reversed(header.items()))
    if metadata:
        header["__metadata__"] = dict(metadata)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors)


def nan(data: bytes) -> bytes:
    """The same little-endian float32, the first of them NaN."""
    return struct.pack("<f", float("nan")) + data[4:]
