"""Placement: where the bytes of a version lie in the store. It depends on what the store held when
the version was pushed, so it is no part of the manifest; it stands in the catalog and in the
journal's `pushed` event, in the form that `to_json` gives."""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from registry.core.canonical_json import MAX_INTEGER
from registry.core.digest import is_digest
from registry.core.errors import InvalidManifest

_ENTRY = struct.Struct("<II")
MAX_TENSORS = 2**24
"""More than any file of ours can hold: its header is at most 100 MB."""
ROLES = ("tensors", "reused", "header", "file", "data", "layout", "manifest", "external")
"""`header`: a file less its tensors. `data`: a state document. `external`: known, and not in the store."""


@dataclass(frozen=True, slots=True)
class Splice:
    """Tensors that stand within a file.

    Attributes:
        at: byte of the skeleton before which they come.
        role: component that they are part of.
        first, length: which of its tensors, in layout order.
    """

    at: int
    role: str
    first: int
    length: int


@dataclass(frozen=True, slots=True)
class FilePlacement:
    """One file in the store.

    Attributes:
        blob: position in `Placement.blobs`.
        whole: True where the blob is the file; False where it is the skeleton of a file, its bytes less its tensors.
        splices: what comes into the skeleton, ascending; None where it is the header of a safetensors file that is
            exactly its component, whose tensors follow.
    """

    blob: int
    whole: bool
    splices: tuple[Splice, ...] | None = None

    def to_json(self) -> list[Any]:
        if self.splices is None:
            return [self.blob, self.whole]
        return [self.blob, self.whole, splices_to_json(self.splices)]


@dataclass(frozen=True)
class Placement:
    """Where one version lies.

    Attributes:
        blobs: (digest, role) of every blob that the version needs, each once; the role, one of `ROLES`, is the
            first in which it was needed.
        components: for each component, in layout order, (position in `blobs`, ordinal of the tensor
            in that blob's own layout).
        files: for each file path.
    """

    blobs: tuple[tuple[str, str], ...]
    components: Mapping[str, tuple[tuple[int, int], ...]]
    files: Mapping[str, FilePlacement]

    def to_json(self) -> dict[str, Any]:
        """Plain data; a component's entries as runs `[blob, first ordinal, length]`."""
        return {
            "blobs": [[digest, role] for digest, role in self.blobs],
            "components": {role: _runs(entries) for role, entries in self.components.items()},
            "files": {path: file.to_json() for path, file in self.files.items()},
        }

    @classmethod
    def from_json(cls, tree: Any) -> Placement:
        """Reads what `to_json` gave.

        Raises:
            InvalidManifest
        """
        try:
            blobs = tuple((digest, role) for digest, role in tree["blobs"])
            components = {role: _entries(runs, len(blobs)) for role, runs in tree["components"].items()}
            files = {path: _file(entry, len(blobs), components) for path, entry in tree["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidManifest(f"not a placement: {type(error).__name__}: {error}"[:200]) from error
        if not all(is_digest(digest) and role in ROLES for digest, role in blobs):
            raise InvalidManifest(f"a blob of a placement is a digest and one of {', '.join(ROLES)}")
        if len({digest for digest, _ in blobs}) != len(blobs):
            raise InvalidManifest("a placement lists a blob twice")
        return cls(blobs, components, files)


def _entries(runs: Any, blobs: int) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for blob, first, length in runs:
        # By type, because True is an instance of int.
        if not type(blob) is type(first) is type(length) is int:
            raise ValueError(f"run {[blob, first, length]!r}: expected three whole numbers")
        if not (0 <= blob < blobs and first >= 0 and length >= 1 and first + length + len(found) <= MAX_TENSORS):
            raise ValueError(f"run {[blob, first, length]} with {blobs} blobs")
        found.extend((blob, ordinal) for ordinal in range(first, first + length))
    return tuple(found)


def _file(entry: Any, blobs: int, components: Mapping[str, Sequence[Any]]) -> FilePlacement:
    blob, whole, *rest = entry
    if type(blob) is not int or type(whole) is not bool or not 0 <= blob < blobs or len(rest) > (not whole):
        raise ValueError(f"file {reprlib.repr(entry)} with {blobs} blobs")
    if not rest:
        return FilePlacement(blob, whole)
    splices = splices_from_json(rest[0])
    for one in splices:
        if one.role not in components or one.first + one.length > len(components[one.role]):
            raise ValueError(f"splice {one} names tensors that are not there")
    return FilePlacement(blob, whole, splices)


def splices_to_json(splices: Sequence[Splice]) -> list[list[Any]]:
    """`[at, role, first, length]` each."""
    return [[one.at, one.role, one.first, one.length] for one in splices]


def splices_from_json(tree: Any) -> tuple[Splice, ...]:
    """Reads what `splices_to_json` gave.

    Raises:
        ValueError: not of that form, or not ascending.
    """
    found = []
    last = 0
    for at, role, first, length in tree:
        if not type(at) is type(first) is type(length) is int or not isinstance(role, str):
            raise ValueError(f"splice {[at, role, first, length]!r}: expected numbers and a component's name")
        if not (last <= at <= MAX_INTEGER and first >= 0 and 1 <= length <= MAX_TENSORS):
            raise ValueError(f"splice {[at, role, first, length]!r} after byte {last}")
        last = at
        found.append(Splice(at, role, first, length))
    return tuple(found)


def _runs(entries: Sequence[tuple[int, int]]) -> list[list[int]]:
    runs: list[list[int]] = []
    for blob, ordinal in entries:
        if runs and runs[-1][0] == blob and runs[-1][1] + runs[-1][2] == ordinal:
            runs[-1][2] += 1
        else:
            runs.append([blob, ordinal, 1])
    return runs


def pack_entries(entries: Sequence[tuple[int, int]]) -> bytes:
    """(blob position, ordinal) as two little-endian 32-bit words each."""
    return b"".join(_ENTRY.pack(blob, ordinal) for blob, ordinal in entries)


def unpack_entries(packed: bytes) -> tuple[tuple[int, int], ...]:
    """Reads what `pack_entries` wrote.

    Raises:
        InvalidManifest
    """
    if len(packed) % _ENTRY.size:
        raise InvalidManifest(f"{len(packed)} bytes are not a whole number of {_ENTRY.size}-byte entries")
    return tuple(_ENTRY.iter_unpack(packed))
