"""Blobs in a local folder, `sha256/ab/<digest>`, and the batches that write them: temporary files, fsync,
rename, fsync of the folders, in this order, so that no reader and no crash sees half a blob."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from io import BufferedReader
from pathlib import Path

from registry.core.digest import is_digest
from registry.core.errors import BlobNotFound, DigestMismatch, InvalidReference, StorageError
from registry.core.reference import shown
from registry.store import durable, files
from registry.store.interface import Buffer, StoredBlob

_OPEN_FILES = 64


class LocalBlobStore:
    """`BlobStore` in a local folder."""

    def __init__(self, folder: Path, temporaries: Path) -> None:
        """
        Args:
            folder: `blobs/sha256` of the store.
            temporaries: a folder on the same file system.
        """
        self._folder = folder
        self._temporaries = temporaries

    @contextmanager
    def batch(self) -> Iterator[LocalBatch]:
        batch = LocalBatch(self._folder, self._temporaries)
        try:
            yield batch
        except BaseException as error:
            batch.abandon(error)
            raise
        batch.abandon()

    def size(self, digest: str) -> int:
        size = files.regular_size(blob_path(self._folder, digest))
        if size is None:
            raise self._missing(digest)
        return size

    def modified_at(self, digest: str) -> datetime:
        modified = files.regular_modified(blob_path(self._folder, digest))
        if modified is None:
            raise self._missing(digest)
        return modified

    def contains(self, digest: str) -> bool:
        return files.is_regular(blob_path(self._folder, digest))

    def open(self, digest: str) -> BufferedReader:
        file = files.open_regular(blob_path(self._folder, digest))
        if file is None:
            raise self._missing(digest)
        return file

    def local_path(self, digest: str) -> Path:
        self.size(digest)
        return blob_path(self._folder, digest)

    def digests(self) -> Iterator[str]:
        for folder in files.entries(self._folder):
            for entry in files.entries(Path(folder.path)):
                if is_digest(entry.name) and entry.name[:2] == folder.name and entry.is_file(follow_symlinks=False):
                    yield entry.name

    def verify(self, digest: str) -> None:
        path = blob_path(self._folder, digest)
        with self.open(digest) as file, files.storage_errors(f"read {path}", writing=False):
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != digest:
            raise DigestMismatch(f"blob {path}", expected=digest, actual=actual)

    def delete(self, digest: str) -> None:
        """Not synced: a blob that comes back after a power cut is an orphan, which the next `gc` finds."""
        path = blob_path(self._folder, digest)
        if files.regular_size(path) is not None:
            durable.remove(path)

    def _missing(self, digest: str) -> BlobNotFound:
        mend = "put it back from a copy of the store, or push again what holds its tensors"
        return BlobNotFound(f"no blob {digest} in {self._folder}; {mend}")


@dataclass
class _Pending:
    temporary: Path
    puts: int = 1


class LocalBatch:
    """`BlobBatch` in a local folder, for one thread and the process that made it.

    Descriptors stay open from `put` to `commit`, because a write-back error is reported for certain only to
    a descriptor that was open when it happened; a batch of more than 64 new blobs syncs the earlier ones as it goes.
    """

    def __init__(self, folder: Path, temporaries: Path) -> None:
        self._folder = folder
        self._tmp = temporaries
        self._process = os.getpid()
        self._usable = True
        self._temporaries: set[Path] = set()
        self._open: dict[Path, int] = {}
        self._pending: dict[str, _Pending] = {}
        self._stored: set[str] = set()

    def put(self, chunks: Iterable[Buffer]) -> StoredBlob:
        self._check_usable()
        try:
            return self._put(chunks)
        except BaseException as error:
            self.abandon(error)
            raise

    def _put(self, chunks: Iterable[Buffer]) -> StoredBlob:
        temporary = durable.new_temporary(self._tmp)
        self._temporaries.add(temporary)  # first, so that no interrupt can come between the file and this
        descriptor = self._open[temporary] = durable.create_exclusive(temporary)
        digest, size = durable.write_hashed(descriptor, chunks, temporary)
        if digest in self._pending:
            self._pending[digest].puts += 1
        elif digest in self._stored or self._is_stored(digest, size):
            self._stored.add(digest)
        else:
            self._pending[digest] = _Pending(temporary)
            if len(self._open) >= _OPEN_FILES:
                self._sync_files()
            return StoredBlob(digest, size, created=True)
        self._drop(temporary)
        return StoredBlob(digest, size, created=False)

    def discard(self, blob: StoredBlob) -> None:
        self._check_usable()
        pending = self._pending.get(blob.digest)
        if pending is None:
            if blob.digest not in self._stored:
                raise self._stranger(blob)
            return
        pending.puts -= 1
        if pending.puts == 0:
            del self._pending[blob.digest]
            self._drop(pending.temporary)

    def path(self, blob: StoredBlob) -> Path:
        if blob.digest in self._pending:
            return self._pending[blob.digest].temporary
        if blob.digest in self._stored:
            return blob_path(self._folder, blob.digest)
        raise self._stranger(blob)

    def commit(self) -> None:
        self._check_usable()
        self._usable = False
        self._sync_files()
        # Also what was there already is synced: who renamed the blob or made its folder may not have come so far.
        changed = {blob_path(self._folder, digest).parent for digest in self._stored}
        for digest, pending in self._pending.items():
            final = blob_path(self._folder, digest)
            changed.update(durable.make_folders(final.parent), (final.parent,))
            with files.storage_errors(f"rename {pending.temporary} to {final}"):
                try:
                    os.rename(pending.temporary, final)
                except IsADirectoryError as error:
                    raise files.not_a_file(final, "a folder") from error
            self._temporaries.remove(pending.temporary)
        if changed:
            changed.add(self._folder)
        durable.in_parallel(durable.sync_folder, sorted(changed))
        self._stored.update(self._pending)
        self._pending.clear()

    def abandon(self, error: BaseException | None = None) -> None:
        """Ends the batch and removes its temporary files; what was committed stays.

        Args:
            error: on its way out; a file that cannot be removed is noted there instead of hiding it.
        """
        self._usable = False
        self._pending.clear()
        leftovers: list[StorageError] = []
        for temporary in tuple(self._temporaries):
            try:
                self._drop(temporary)
            except StorageError as leftover:
                leftovers.append(leftover)
        if error is not None:
            for left in leftovers:
                error.add_note(f"left behind: {left}")
        elif leftovers:
            raise leftovers[0]

    def _stranger(self, blob: StoredBlob) -> BlobNotFound:
        return BlobNotFound(f"blob {shown(blob.digest, 80)} is not in this batch")

    def _check_usable(self) -> None:
        if not self._usable:
            raise RuntimeError("this batch is committed, failed or left; a new one is needed")
        if os.getpid() != self._process:
            raise RuntimeError("this batch belongs to the process that forked this one")

    def _is_stored(self, digest: str, size: int) -> bool:
        # Anything else under that name is torn or foreign, and the rename of `commit` puts the good bytes there.
        path = blob_path(self._folder, digest)
        return files.is_regular(path) and files.regular_size(path) == size

    def _sync_files(self) -> None:
        durable.in_parallel(self._sync_file, tuple(self._open))
        for temporary in tuple(self._open):
            self._close(temporary)

    def _sync_file(self, temporary: Path) -> None:
        descriptor = self._open[temporary]
        with files.storage_errors(f"sync {os.fstat(descriptor).st_size} bytes of {temporary}"):
            os.fsync(descriptor)

    def _close(self, temporary: Path) -> None:
        descriptor = self._open.pop(temporary, None)
        if descriptor is not None:
            with files.storage_errors(f"close {temporary}"):
                os.close(descriptor)

    def _drop(self, temporary: Path) -> None:
        self._close(temporary)
        if os.getpid() == self._process:  # a forked child that unwinds must not take its parent's files away
            durable.remove(temporary)
        self._temporaries.discard(temporary)


def blob_path(folder: Path, digest: str) -> Path:
    """Where a blob stands below `blobs/sha256`.

    Raises:
        InvalidReference: the digest is not 64 lower-case hex digits.
    """
    if not is_digest(digest):
        raise InvalidReference(f"blob digest '{shown(str(digest), 80)}': expected 64 lower-case hex digits")
    return folder / digest[:2] / digest
