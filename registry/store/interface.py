"""What a store of blobs and a journal must be able to do. Policy lives above (operations); a store
knows bytes, digests and durability, and nothing of versions. `tests/contract/` holds the one suite
that every implementation passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """What the store computed of the bytes it was given.

    Attributes:
        digest: sha256, 64 lower-case hex digits.
        size: bytes.
        created: False where the store, or an earlier `put` of the batch, already held this blob.
    """

    digest: str
    size: int
    created: bool


@dataclass(frozen=True, slots=True)
class Temporary:
    """What a writer has begun and not ended.

    Attributes:
        name: by which `Store.remove_temporary` knows it.
        size: bytes.
    """

    name: str
    size: int


class BlobBatch(Protocol):
    """Blobs that become visible with `commit`; leaving the context without it drops them. A batch is used by
    one thread, in the process that made it; a store by as many as like. After `commit`, or after a `put`
    that raised, only `path` can be called: anything else is a bug of the caller, and a RuntimeError."""

    def put(self, chunks: Iterable[Buffer]) -> StoredBlob:
        """Writes one blob in one pass, hashing while writing. Each chunk may be reused by its
        producer as soon as the next one is asked for; chunks of `bytes`, which cannot change, overlap
        better. What the iterable raises comes out as it is.

        Raises:
            NoSpace, ReadOnly, StorageError: nothing of this batch is visible, temporary files are gone;
                the same holds for whatever else is raised, KeyboardInterrupt included.
        """
        ...

    def discard(self, blob: StoredBlob) -> None:
        """Takes one `put` back: the blob leaves the batch with its last one. A blob that was in the store
        before stays.

        Raises:
            BlobNotFound: it is not in this batch.
        """
        ...

    def path(self, blob: StoredBlob) -> Path:
        """Where the bytes of a blob of this batch can be read, before the commit and after it.

        Raises:
            BlobNotFound: it is not in this batch.
        """
        ...

    def commit(self) -> None:
        """Makes every blob of the batch durable and visible under its digest.

        Raises:
            NoSpace, ReadOnly, StorageError: some blobs may be visible, whole; they are orphans for `gc`.
        """
        ...


class BlobStore(Protocol):
    """Immutable files named by the sha256 of their bytes.

    Every method that takes a digest raises InvalidReference for what is not 64 lower-case hex digits, and
    every one but `contains` raises Corrupt where something else (a symlink, a folder) stands for the blob.
    """

    def batch(self) -> AbstractContextManager[BlobBatch]: ...

    def size(self, digest: str) -> int:
        """Bytes of a blob.

        Raises:
            BlobNotFound
        """
        ...

    def modified_at(self, digest: str) -> datetime:
        """When the blob was written last, UTC.

        Raises:
            BlobNotFound
        """
        ...

    def contains(self, digest: str) -> bool:
        """Whether the blob is there; its bytes are not looked at."""
        ...

    def open(self, digest: str) -> BinaryIO:
        """A seekable reader.

        Raises:
            BlobNotFound
        """
        ...

    def local_path(self, digest: str) -> Path:
        """A read-only local file with the blob's bytes, fit to be mapped. An object store fetches it first.

        Raises:
            BlobNotFound
        """
        ...

    def digests(self) -> Iterator[str]:
        """Every blob's digest, in no order that callers may rely on."""
        ...

    def verify(self, digest: str) -> None:
        """Reads the blob and compares its bytes with its name.

        Raises:
            BlobNotFound, DigestMismatch
        """
        ...

    def delete(self, digest: str) -> None:
        """Removes a blob; one that is not there is no error. For `gc` alone."""
        ...


class Journal(Protocol):
    """Create-only objects, `journal/<namespace>/<name>/<seq>.json`, one an event.

    Namespace and name follow the rules of references and `seq` counts from 0; else InvalidReference.
    """

    def append(self, namespace: str, name: str, seq: int, document: bytes) -> None:
        """Creates the entry durably. The same bytes again are no error.

        Raises:
            Corrupt: another document stands there.
            NoSpace, ReadOnly, StorageError
        """
        ...

    def read(self, namespace: str, name: str, seq: int) -> bytes:
        """
        Raises:
            NotFound
        """
        ...

    def contains(self, namespace: str, name: str, seq: int) -> bool: ...

    def names(self) -> Iterator[tuple[str, str]]:
        """Every (namespace, name) that has an entry."""
        ...

    def sequence(self, namespace: str, name: str) -> list[int]:
        """The numbers of the entries of one name, ascending."""
        ...


class Store(Protocol):
    """Blobs and journal of one registry, with the registry's id."""

    @property
    def registry_id(self) -> str: ...

    @property
    def writable(self) -> bool: ...

    @property
    def blobs(self) -> BlobStore: ...

    @property
    def journal(self) -> Journal: ...

    def stale_temporaries(self, before: datetime) -> list[Temporary]:
        """What writers left that were killed: nothing was written to it since this time. A batch that is alive may be
        that slow too."""
        ...

    def remove_temporary(self, name: str) -> None:
        """Removes one of `stale_temporaries`; one that is not there is no error. For `gc` alone."""
        ...
