"""What a check of a registry finds: problems, each with those who suffer from it and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["store", "catalog", "journal", "event", "manifest", "layout", "blob", "tensor", "file", "row"]

COPY = "put it back from a copy of the store"
REINDEX = "registry reindex"


@dataclass(frozen=True)
class Problem:
    """One thing that is not what it must be.

    Attributes:
        kind: what it is: a blob, a row of the catalog, an entry of the journal, ...
        subject: its name: a digest, a table with the row's key, a path in the store, ...
        expected, found: as text; empty where that says nothing.
        versions: those that suffer, `namespace/name@number`; removed ones too.
        mend: what to do.
    """

    kind: Kind
    subject: str
    expected: str
    found: str
    versions: tuple[str, ...]
    mend: str

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}: expected {self.expected}, found {self.found}; {self.mend}"


@dataclass(frozen=True)
class Fsck:
    """What a check of a registry found.

    Attributes:
        registry: its folder or URL, without a password.
        deep: whether every byte was read.
        notes: what is no damage: events that are still to be written, blobs that no version needs, ...
        names, versions, events: that were followed from the journal.
        blobs: that were looked at.
        bytes_read: of blobs that were read whole.
    """

    registry: str
    deep: bool
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    names: int
    versions: int
    events: int
    blobs: int
    bytes_read: int

    @property
    def whole(self) -> bool:
        return not self.problems
