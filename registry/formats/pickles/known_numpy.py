"""numpy's arrays and numbers, from their bytes: an array becomes a tensor in memory, a number one of Python's.
numpy itself has no part in it."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass

from registry.formats.pickles.context import Context, described
from registry.formats.pickles.known import Known, is_size, words
from registry.formats.pickles.tensors import StorageRef, TensorRef, row_major
from registry.formats.pickles.values import OpaqueGlobal, ToBuild, Unbuilt

Arguments = tuple[object, ...]

# numpy's letter and size: the code of safetensors, and how `struct` reads one element.
_KINDS: dict[str, tuple[str, str]] = {
    "b1": ("BOOL", "?"),
    "i1": ("I8", "b"),
    "i2": ("I16", "h"),
    "i4": ("I32", "i"),
    "i8": ("I64", "q"),
    "u1": ("U8", "B"),
    "u2": ("U16", "H"),
    "u4": ("U32", "I"),
    "u8": ("U64", "Q"),
    "f2": ("F16", "e"),
    "f4": ("F32", "f"),
    "f8": ("F64", "d"),
    "c8": ("C64", "ff"),
    "c16": ("", "dd"),
}
_KIND = re.compile(r"[biufcSUOVMm][0-9]{1,6}", re.ASCII)
_ORDERS = {"<": "<", "|": "<", "=": "<", ">": ">"}
_CONVERT = "save it as an array of common little-endian numbers, or as plain data"


@dataclass(frozen=True, slots=True)
class NumpyDtype(OpaqueGlobal):
    """A dtype of numpy as a value.

    Attributes:
        order: `<` or `>`.
    """

    order: str = "<"


def _dtype(context: Context, arguments: Arguments) -> ToBuild:
    if not arguments or not isinstance(kind := arguments[0], str) or not _KIND.fullmatch(kind):
        raise context.unsupported(f"the numpy dtype {', '.join(map(described, arguments[:1]))}", _CONVERT)

    def build(state: object) -> NumpyDtype:
        # version, byte order, subarray, names, fields, ...
        if not isinstance(state, tuple) or len(state) < 5 or not isinstance(state[1], str) or state[1] not in _ORDERS:
            raise context.invalid("the state of a numpy dtype", described(state))
        if any(part is not None for part in state[2:5]):
            raise context.unsupported("a numpy dtype of several fields", _CONVERT)
        return NumpyDtype("numpy", kind, _ORDERS[state[1]])

    return ToBuild(Unbuilt("numpy dtype"), build)


def _scalar(context: Context, arguments: Arguments) -> object:
    match arguments:
        case (NumpyDtype() as dtype, bytes() | str() as data):
            raw = data.encode() if isinstance(data, str) else data
        case _:
            raise context.invalid("a dtype and bytes for a numpy number", ", ".join(map(described, arguments[:4])))
    kind, size = dtype.name[0], int(dtype.name[1:])
    if kind in "US":
        context.budget.spend_bytes(len(raw))
        encoding = "ascii" if kind == "S" else "utf-32-le" if dtype.order == "<" else "utf-32-be"
        try:
            return raw.rstrip(b"\0") if kind == "S" else raw.decode(encoding).rstrip("\0")
        except UnicodeDecodeError:
            raise context.invalid("a text of numpy", "other bytes") from None
    if dtype.name not in _KINDS:
        raise context.unsupported(f"a numpy number of the dtype {described(dtype.name)}", _CONVERT)
    if len(raw) != size:
        raise context.malformed(f"{size} bytes for a numpy number", str(len(raw)))
    parts = struct.unpack(dtype.order + _KINDS[dtype.name][1], raw)
    return complex(*parts) if kind == "c" else parts[0]


def _array(context: Context, shape: object, dtype: object, is_fortran: object, data: object) -> TensorRef:
    if not isinstance(dtype, NumpyDtype):
        raise context.malformed("the dtype of an array", described(dtype))
    code = _KINDS.get(dtype.name, ("", ""))[0]
    if not code or dtype.order != "<":
        found = f"{dtype.order}{dtype.name}"
        raise context.unsupported(f"a numpy array of the dtype {described(found)}", _CONVERT)
    if not isinstance(shape, tuple) or not all(map(is_size, shape)) or len(shape) > context.budget.limits.dimensions:
        raise context.malformed("the shape of an array", described(shape))
    raw = data.encode() if isinstance(data, str) else data
    if not isinstance(raw, bytes):
        raise context.malformed("the bytes of an array", described(data))
    if len(raw) != math.prod(shape) * int(dtype.name[1:]):
        raise context.malformed(f"{math.prod(shape) * int(dtype.name[1:])} bytes for an array", str(len(raw)))
    context.budget.spend_tensor(len(raw))
    stride = row_major(shape[::-1])[::-1] if is_fortran else row_major(shape)
    return TensorRef(StorageRef("array", None, len(raw), raw), code, shape, stride, 0)


def _reconstruct(context: Context, arguments: Arguments) -> ToBuild:
    match arguments:
        case (OpaqueGlobal("numpy", "ndarray"), _, _):
            pass
        case (other, *_):
            raise context.unsupported(f"an array of the class {described(other)}", _CONVERT)
        case _:
            raise context.malformed("the class of an array", "none")

    def build(state: object) -> TensorRef:
        if not isinstance(state, tuple) or len(state) != 5:
            raise context.malformed("the state of an array", described(state))
        return _array(context, *state[1:])

    return ToBuild(Unbuilt("numpy array"), build)


def _from_buffer(context: Context, arguments: Arguments) -> TensorRef:
    if len(arguments) != 4 or arguments[3] not in ("C", "F"):
        raise context.malformed("the four arguments of an array", ", ".join(map(described, arguments[:4])))
    data, dtype, shape, order = arguments
    return _array(context, shape, dtype, order == "F", data)


NUMPY: dict[tuple[str, str], Known] = {
    ("numpy", "dtype"): Known(_dtype, is_class=True),
    ("numpy", "ndarray"): Known(),
    ("numpy.core.multiarray", "scalar"): Known(_scalar),
    ("numpy.core.multiarray", "_reconstruct"): Known(_reconstruct),
    ("numpy.core.numeric", "_frombuffer"): Known(_from_buffer),
    **{
        ("numpy", name): Known()
        for name in words(
            "bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
        )
    },
}
