"""Bundles as they lie on disk, a folder or a tar file: which members there are, and their bytes. Nothing is unpacked,
no link is followed, and what does not belong into a bundle is refused before anything of it is read. What the members
mean is not known here."""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from registry.core.bundle import INDEX, MAX_DOCUMENT, blob_member, check_member
from registry.core.digest import sha256_hex
from registry.core.errors import Corrupt, DigestMismatch, InvalidInput, StorageError
from registry.core.reference import shown
from registry.formats.bundle_tar import BLOCK, END, padding, read_tar_head
from registry.formats.source import OpenFile, open_regular, source_errors

MAX_MEMBERS = 1_000_000
MAX_BYTES = 1 << 44
"""16 TiB: more than anybody moves this way, and far from where sums of sizes go wrong."""

_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
# O_NONBLOCK: a pipe that somebody put there must not make the opening wait for its writer.
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FOLDERS = re.compile(r"blobs(/sha256(/[0-9a-f]{2})?)?|events(/[^/]+){0,2}")


class Bundle(ABC):
    """A bundle, open; close it after use.

    Attributes:
        what: names it in errors.
        members: bytes of each, by name.
    """

    what: str
    members: Mapping[str, int]

    @abstractmethod
    def read(self, name: str, begin: int, end: int) -> Iterator[memoryview]:
        """A part of a member, in chunks that stay valid until the next one is asked for.

        Raises:
            InvalidInput: it changed since the bundle was opened.
            StorageError
        """

    @abstractmethod
    def is_unchanged(self, name: str) -> bool:
        """Whether nobody seems to have written to a member since the bundle was opened."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def document(self, name: str) -> bytes:
        """All bytes of a small member.

        Raises:
            Corrupt: it is missing. InvalidInput: it is larger than any document.
        """
        if name not in self.members:
            raise Corrupt(f"{self.what} has no {name}; export it again")
        size = self.members[name]
        if size > MAX_DOCUMENT:
            raise InvalidInput(f"{self.what}: {name} has {size} bytes; a document has at most {MAX_DOCUMENT}")
        return b"".join(map(bytes, self.read(name, 0, size)))


class BundledBlobs:
    """The blobs of a bundle, by digest."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def size(self, digest: str) -> int:
        """
        Raises:
            Corrupt: the bundle has no such blob.
        """
        name = blob_member(digest)
        if name not in self._bundle.members:
            raise Corrupt(f"{self._bundle.what} has no blob {digest}, which a version of it needs; export it again")
        return self._bundle.members[name]

    def read(self, digest: str, begin: int, end: int) -> Iterator[memoryview]:
        self.size(digest)
        return self._bundle.read(blob_member(digest), begin, end)

    def document(self, digest: str) -> bytes:
        """All bytes of a small blob, proven.

        Raises:
            Corrupt, DigestMismatch, InvalidInput
        """
        self.size(digest)
        data = self._bundle.document(blob_member(digest))
        if sha256_hex(data) != digest:
            raise DigestMismatch(f"blob of {self._bundle.what}", expected=digest, actual=sha256_hex(data))
        return data

    def is_unchanged(self, digest: str) -> bool:
        return self._bundle.is_unchanged(blob_member(digest))


def open_bundle(path: Path) -> Bundle:
    """Opens a folder or a tar file, and lists it.

    Raises:
        SourceNotFound, StorageError
        InvalidInput: it is no bundle, or holds what does not belong there: links, devices, other names, more than is
            allowed.
        Corrupt: it is truncated.
    """
    if "\0" in str(path):
        raise InvalidInput(f"{shown(str(path), 200)}: a path has no NUL in it")
    with source_errors(path):
        bundle = FolderBundle(path) if stat.S_ISDIR(os.stat(path).st_mode) else TarBundle(path)
    try:
        if INDEX not in bundle.members:
            raise InvalidInput(f"{bundle.what} is no bundle: it has no {INDEX}; 'registry export' makes one")
        if sum(bundle.members.values()) > MAX_BYTES:
            raise InvalidInput(f"{bundle.what} has over {MAX_BYTES} bytes, the most that a bundle may have")
    except BaseException:
        bundle.close()
        raise
    return bundle


class FolderBundle(Bundle):
    """A bundle in a folder. Members are opened from the folder's descriptor, one folder after the other, so that no
    link that somebody puts there meanwhile leads out of it."""

    def __init__(self, path: Path) -> None:
        self.what = shown(str(path), 200)
        self._seen: dict[str, tuple[int, ...]] = {}
        self.members: dict[str, int] = {}
        # Of the folder itself a link is followed: it is what the user named.
        self._root = os.open(path, _FOLDER & ~os.O_NOFOLLOW)
        try:
            self._list(self._root, "")
        except BaseException:
            self.close()
            raise

    def _list(self, folder: int, prefix: str) -> None:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        for entry in found:
            name = prefix + entry.name
            state = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(state.st_mode) and _FOLDERS.fullmatch(name):
                inner = os.open(entry.name, _FOLDER, dir_fd=folder)
                try:
                    self._list(inner, f"{name}/")
                finally:
                    os.close(inner)
                continue
            if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
                kind = "a link" if stat.S_ISLNK(state.st_mode) else "no regular file"
                raise InvalidInput(f"{self.what}: '{shown(name, 200)}' is {kind}; a bundle holds plain files alone")
            check_member(name)
            if stat.S_ISDIR(state.st_mode):
                raise InvalidInput(f"{self.what}: '{shown(name, 200)}' is a folder; expected a file")
            if len(self.members) >= MAX_MEMBERS:
                raise InvalidInput(f"{self.what} has over {MAX_MEMBERS} files, the most that a bundle may have")
            self.members[name] = state.st_size
            self._seen[name] = _signature(state)

    def read(self, name: str, begin: int, end: int) -> Iterator[memoryview]:
        with self._open(name) as file:
            yield from OpenFile(file, f"{self.what}/{name}").read(begin, end)

    def _open(self, name: str) -> BinaryIO:
        *folders, last = name.split("/")
        opened: list[int] = []
        try:
            for part in folders:
                opened.append(os.open(part, _FOLDER, dir_fd=opened[-1] if opened else self._root))
            descriptor = os.open(last, _FILE, dir_fd=opened[-1] if opened else self._root)
        except OSError as error:
            raise StorageError(error.errno, f"cannot read {self.what}/{name}: {error.strerror}") from error
        finally:
            for one in opened:
                os.close(one)
        file = os.fdopen(descriptor, "rb")
        if _signature(os.fstat(descriptor)) != self._seen[name]:
            file.close()
            raise InvalidInput(f"{self.what}/{name} changed while it was read; import it when nobody writes it")
        return file

    def is_unchanged(self, name: str) -> bool:
        try:
            self._open(name).close()
        except (InvalidInput, StorageError):
            return False
        return True

    def close(self) -> None:
        os.close(self._root)


class TarBundle(Bundle):
    """A bundle in a tar file, whose headers are read one after the other; each is the very one that we would write."""

    def __init__(self, path: Path) -> None:
        self.what = shown(str(path), 200)
        self._file = open_regular(path)
        self._open = OpenFile(self._file, self.what)
        self._begins: dict[str, int] = {}
        self.members: dict[str, int] = {}
        try:
            self._list()
        except BaseException:
            self.close()
            raise

    def _list(self) -> None:
        at, last = 0, ""
        while True:
            block = self._part(at, BLOCK)
            if block == bytes(BLOCK):
                break
            head = read_tar_head(self._part, at, self.what)
            check_member(head.name)
            if head.name <= last:
                raise InvalidInput(f"{self.what}: {head.name} stands twice, or behind {last}; export it again")
            if len(self.members) >= MAX_MEMBERS:
                raise InvalidInput(f"{self.what} has over {MAX_MEMBERS} members, the most that a bundle may have")
            begin = at + head.blocks * BLOCK
            self._begins[head.name], self.members[head.name] = begin, head.size
            last, after = head.name, begin + head.size
            at = after + padding(head.size)
            if at > self._open.size:
                raise self._truncated()
            if any(self._part(after, padding(head.size))):
                raise InvalidInput(f"{self.what}: bytes are hidden behind {head.name}; export it again")
        if self._part(at, len(END)) != END or self._open.size != at + len(END):
            raise InvalidInput(f"{self.what}: it goes on behind its end; export it again")

    def _part(self, begin: int, size: int) -> bytes:
        if begin + size > self._open.size:
            raise self._truncated()
        return b"".join(map(bytes, self._open.read(begin, begin + size)))

    def _truncated(self) -> Corrupt:
        return Corrupt(f"{self.what} is truncated: it ends at byte {self._open.size}; copy or export it again")

    def read(self, name: str, begin: int, end: int) -> Iterator[memoryview]:
        if not self._open.is_unchanged():
            raise InvalidInput(f"{self.what} changed while it was read; import it when nobody writes it")
        start = self._begins[name]
        yield from self._open.read(start + begin, start + end)

    def is_unchanged(self, name: str) -> bool:
        return self._open.is_unchanged()

    def close(self) -> None:
        self._file.close()


def _signature(state: os.stat_result) -> tuple[int, ...]:
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)


def unexpected(bundle: Bundle, expected: Iterable[str]) -> list[str]:
    """Members that nothing needs."""
    return sorted(set(bundle.members).difference(expected))
