"""Names, dtypes and shapes of a state dict as a value, and the dtypes that safetensors knows.

A `Layout` is content-addressed and shared by all versions that look alike: hundreds of adapters of
one recipe have one layout. Nothing here touches tensor bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from registry.core.canonical_json import MAX_INTEGER, canonical_json, parse_json
from registry.core.digest import sha256_hex
from registry.core.errors import InvalidManifest

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits an element of each safetensors dtype code (safetensors 0.8)."""

NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""C0, DEL, C1 and lone surrogates: no tensor's name holds one."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor without its bytes.

    Attributes:
        name: as it stands in the state dict.
        dtype: a safetensors dtype code, a key of `DTYPE_BITS`.
        shape: as it stands in a safetensors header; for sub-byte dtypes it counts elements, not bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Length in a safetensors file; a header's check makes sure that it is whole."""
        return self.elements * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Layout:
    """The tensors of one state dict in the order of its file. Names are unique."""

    tensors: tuple[TensorSpec, ...]

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.tensors}

    @cached_property
    def position(self) -> dict[str, int]:
        return {spec.name: index for index, spec in enumerate(self.tensors)}

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)

    @property
    def parameters(self) -> int:
        """Elements over all tensors."""
        return sum(spec.elements for spec in self.tensors)

    @cached_property
    def document(self) -> bytes:
        """Canonical JSON (RFC 8785): a list of `[name, dtype, [dimension, ...]]` in order."""
        return canonical_json([[t.name, t.dtype, list(t.shape)] for t in self.tensors], "the layout")

    @cached_property
    def digest(self) -> str:
        """sha256 of `document`, 64 hex digits."""
        return sha256_hex(self.document)

    @classmethod
    def from_document(cls, document: bytes) -> Layout:
        """Reads a layout; the inverse of `document`, byte for byte.

        Raises:
            InvalidManifest: not a list of name, known dtype and shape, a tensor of no whole number of bytes, a name
                twice, or bytes that are not canonical.
        """
        try:
            rows: Any = parse_json(document)
            tensors = tuple(_spec(row) for row in rows)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidManifest(f"layout document cannot be read: {error}") from error
        layout = cls(tensors)
        if len(layout.by_name) != len(tensors):
            raise InvalidManifest("layout document names one tensor twice")
        if layout.document != document:
            raise InvalidManifest("the layout document is not in canonical form (RFC 8785)")
        return layout


def _spec(row: Any) -> TensorSpec:
    name, dtype, shape = row
    if not isinstance(name, str) or dtype not in DTYPE_BITS or not isinstance(shape, list):
        raise ValueError(f"not a tensor: {row!r}"[:200])
    if NOT_IN_A_NAME.search(name):
        raise ValueError(f"a control character or a lone surrogate in the name {name!r}"[:200])
    if not all(type(size) is int and 0 <= size <= MAX_INTEGER for size in shape):
        raise ValueError(f"not a shape: {shape!r}"[:200])
    spec = TensorSpec(name, dtype, tuple(shape))
    if spec.elements * DTYPE_BITS[dtype] % 8:
        raise ValueError(f"{name!r} of {dtype} {shape!r} is no whole number of bytes"[:200])
    return spec


def layout_of(specs: Iterable[TensorSpec]) -> Layout:
    """A layout of the given tensors, in their order."""
    return Layout(tuple(specs))
