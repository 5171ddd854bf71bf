"""What the reader gave, held against what torch loads from the same file, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

import torch

from registry.formats.pickles import Limits, PickleFile, TensorRef, read_pickle_file

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def read(path: Path, limits: Limits | None = None) -> PickleFile:
    with path.open("rb") as file:
        return read_pickle_file(
            file, size=path.stat().st_size, what=path.name, **({"limits": limits} if limits else {})
        )


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(found: object, expected: object, file: BinaryIO) -> None:
    """The same tree: containers as data, tensors by dtype, shape and bytes."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, TensorRef)
        assert found.dtype == CODES[expected.dtype]
        assert found.shape == tuple(expected.shape)
        raw = b"".join(found.chunks(file))
        assert raw == bytes_of(expected)
        assert len(raw) == found.nbytes
        if (span := found.span()) is not None:
            file.seek(span[0])
            assert file.read(span[1] - span[0]) == raw
    elif isinstance(expected, dict):
        assert isinstance(found, dict)
        assert list(found) == list(expected)
        for key, part in expected.items():
            assert_same(found[key], part, file)
    elif isinstance(expected, list | tuple):
        assert isinstance(found, list if isinstance(expected, list) else tuple)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, file)
    elif isinstance(expected, float) and math.isnan(expected):
        assert isinstance(found, float)
        assert math.isnan(found)
    else:
        assert type(found) is type(expected)
        assert found == expected


def assert_reads_like_torch(path: Path) -> PickleFile:
    result = read(path)
    expected = torch.load(path, weights_only=True)
    with path.open("rb") as file:
        assert_same(result.tree, expected, file)
    return result
