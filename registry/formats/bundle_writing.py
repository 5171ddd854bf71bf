"""Writing a bundle, as a folder or a tar file: under a temporary name beside its place, synced, then renamed. Whoever
is interrupted leaves nothing under the final name."""

from __future__ import annotations

import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.core.errors import Corrupt, DestinationExists, InvalidInput, SourceNotFound
from registry.core.reference import shown
from registry.formats.bundle_tar import END, padding, tar_head
from registry.store.durable import name_once, sync_folder
from registry.store.interface import Buffer

TEMPORARY = ".registry-export-"
"""How the name begins under which an export writes; one that was killed leaves it."""


class BundleWriter(ABC):
    """Takes the members in the order of their names.

    Attributes:
        bytes: of all members so far.
    """

    bytes = 0

    def add(self, name: str, size: int, chunks: Iterable[Buffer]) -> None:
        """Writes one member.

        Raises:
            Corrupt: the chunks have another size; and what they raise.
            OSError: it cannot be written.
        """
        descriptor = self._begin(name, size)
        written = 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B") if memoryview(chunk).nbytes else memoryview(b"")
            written += len(view)
            while view:
                view = view[os.write(descriptor, view) :]
        if written != size:
            raise Corrupt(f"{name}: expected {size} bytes, found {written}; the store is damaged")
        self._end(size)
        self.bytes += size

    @abstractmethod
    def _begin(self, name: str, size: int) -> int:
        """A descriptor to write the member to."""

    @abstractmethod
    def _end(self, size: int) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """Makes all of it durable under its temporary name."""

    @abstractmethod
    def abandon(self) -> None:
        """Closes what is open."""


class _FolderWriter(BundleWriter):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1
        folder.mkdir(0o777)

    def _begin(self, name: str, size: int) -> int:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        return self._descriptor

    def _end(self, size: int) -> None:
        os.fsync(self._descriptor)
        self.abandon()

    def finish(self) -> None:
        for folder in (self._folder, *(path for path in self._folder.rglob("*") if path.is_dir())):
            sync_folder(folder)

    def abandon(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


class _TarWriter(BundleWriter):
    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)

    def _begin(self, name: str, size: int) -> int:
        self._write(tar_head(name, size))
        return self._file.fileno()

    def _end(self, size: int) -> None:
        self._write(bytes(padding(size)))

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file.fileno(), data) :]

    def finish(self) -> None:
        self._write(END)
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


@contextmanager
def writing_bundle(destination: Path, *, force: bool) -> Iterator[BundleWriter]:
    """A writer whose bundle gets its name when the context ends without an error.

    Args:
        destination: ends in `.tar` for a tar file, else a folder, which may be there and empty.
        force: replace a tar file that is there.

    Raises:
        DestinationExists, InvalidInput, SourceNotFound: nothing was written.
        OSError: it cannot be written, and nothing is left behind.
    """
    is_tar = destination.suffix == ".tar"
    check_destination(destination, force=force)
    temporary = destination.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    writer: BundleWriter | None = None
    try:
        writer = _TarWriter(temporary) if is_tar else _FolderWriter(temporary)
        yield writer
        writer.finish()
        check_destination(destination, force=force)  # again: what took long may have been overtaken
        if not is_tar or force:
            os.replace(temporary, destination)
        elif not name_once(temporary, destination):
            raise _exists(destination)
        sync_folder(destination.parent)
    finally:
        if writer is not None:
            writer.abandon()
        _remove(temporary)


def check_destination(destination: Path, *, force: bool) -> None:
    """
    Raises:
        DestinationExists, InvalidInput, SourceNotFound
    """
    what = shown(str(destination), 200)
    if not destination.parent.is_dir():
        raise SourceNotFound(f"no such folder: {shown(str(destination.parent), 200)}; make it first")
    if not os.path.lexists(destination):
        return
    if destination.suffix == ".tar":
        if destination.is_dir():
            raise InvalidInput(f"{what} is a folder; give another name for the tar file")
        if not force:
            raise _exists(destination)
    elif destination.is_symlink() or not destination.is_dir():
        raise InvalidInput(f"{what} is no folder; give a folder, or a name that ends in .tar")
    elif any(destination.iterdir()):
        raise DestinationExists(f"{what} is not empty; give a new folder")


def _exists(destination: Path) -> DestinationExists:
    return DestinationExists(f"{shown(str(destination), 200)} exists; export with --force to replace it")


def _remove(temporary: Path) -> None:
    def remove() -> None:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)

    try:
        remove()
    except KeyboardInterrupt:  # a Ctrl-C in the cleaning up must not keep it from being done
        remove()
        raise
