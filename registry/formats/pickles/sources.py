"""Bytes at positions, from an open file or from memory, and a reader that goes through them once.
A read past the end is a refusal that names the place; nothing is allocated on the word of a length field."""

from __future__ import annotations

import os
from typing import BinaryIO, Protocol

from registry.core.errors import InvalidInput, StorageError
from registry.formats.pickles.limits import Budget
from registry.formats.pickles.tensors import StorageRef

WINDOW = 64 << 10
TRUNCATED = "the file is truncated or damaged: copy or download it again"


def read_exactly(file: BinaryIO, begin: int, count: int, what: str) -> bytes:
    """Bytes of an open file by their position, whatever other threads read.

    Raises:
        InvalidInput: the file ends before; StorageError: it cannot be read.
    """
    parts = []
    while count:
        try:
            part = os.pread(file.fileno(), min(count, 1 << 30), begin)
        except OSError as error:
            raise StorageError(error.errno, f"cannot read {what}: {error.strerror}") from error
        if not part:
            raise InvalidInput(f"{what} became shorter while it was read; read it when nobody writes it")
        parts.append(part)
        begin += len(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class Source(Protocol):
    """Random access to the bytes of one file."""

    what: str
    size: int

    def read(self, begin: int, count: int) -> bytes:
        """Exactly these bytes.

        Raises:
            InvalidInput: they are not there.
        """

    def storage(self, key: str, begin: int, nbytes: int) -> StorageRef:
        """A storage of which the bytes lie here; the caller has checked that they do."""


class FileSource:
    """An open file with a descriptor; its position is neither used nor moved."""

    def __init__(self, file: BinaryIO, size: int, what: str) -> None:
        self.what = what
        self.size = size
        self._file = file

    def read(self, begin: int, count: int) -> bytes:
        _check_inside(self, begin, count)
        return read_exactly(self._file, begin, count, self.what)

    def storage(self, key: str, begin: int, nbytes: int) -> StorageRef:
        return StorageRef(key, begin, nbytes, None)


class MemorySource:
    """Bytes in memory; storages are copied out of them."""

    def __init__(self, data: bytes, what: str, budget: Budget) -> None:
        self.what = what
        self.size = len(data)
        self._data = data
        self._budget = budget

    def read(self, begin: int, count: int) -> bytes:
        _check_inside(self, begin, count)
        return self._data[begin : begin + count]

    def storage(self, key: str, begin: int, nbytes: int) -> StorageRef:
        self._budget.spend_bytes(nbytes)
        return StorageRef(key, None, nbytes, self.read(begin, nbytes))


def _check_inside(source: Source, begin: int, count: int) -> None:
    if begin < 0 or count < 0 or begin + count > source.size:
        raise InvalidInput(
            f"{source.what}: expected {count} bytes at byte {begin}, found {source.size} bytes in all; {TRUNCATED}"
        )


class Stream:
    """Reads one stretch of a source from its begin to its end."""

    def __init__(self, source: Source, begin: int, end: int, budget: Budget) -> None:
        _check_inside(source, begin, end - begin)
        self._source = source
        self._end = end
        self._budget = budget
        self._window = b""
        self._base = begin
        self._at = 0

    @property
    def position(self) -> int:
        """Where the next byte lies in the source."""
        return self._base + self._at

    @property
    def left(self) -> int:
        """Bytes up to the end."""
        return self._end - self._base - self._at

    def seek(self, position: int) -> None:
        """Goes on at another place of the stretch.

        Raises:
            InvalidInput: it lies beyond the end.
        """
        if not 0 <= position <= self._end:
            raise self._short(position - self.position)
        self._base, self._window, self._at = position, b"", 0

    def read(self, count: int) -> bytes:
        """The next bytes, exactly as many.

        Raises:
            InvalidInput: there are fewer, or it is more than the limits allow.
        """
        budget = self._budget
        budget.pickle_bytes -= count
        if budget.pickle_bytes < 0:
            raise budget.over(budget.limits.pickle_bytes, "bytes")
        begin, end = self._at, self._at + count
        if end > len(self._window):
            if count > self.left:
                raise self._short(count)
            self._base, self._at = self.position, 0
            if count > WINDOW:
                data = self._source.read(self._base, count)
                self._base, self._window = self._base + count, b""
                return data
            self._window = self._source.read(self._base, min(WINDOW, self._end - self._base))
            begin, end = 0, count
        self._at = end
        return self._window[begin:end]

    def line(self, limit: int) -> bytes:
        """The bytes before the next newline, which is read as well.

        Raises:
            InvalidInput: no newline within `limit` bytes.
        """
        parts, length = [], 0
        while True:
            # So short that it lies in one window: what follows the newline can be given back.
            part = self.read(min(256, self.left) or 1)
            index = part.find(b"\n")
            if index >= 0:
                unread = len(part) - index - 1
                self._at -= unread
                self._budget.pickle_bytes += unread
                parts.append(part[:index])
                length += index
            else:
                parts.append(part)
                length += len(part)
            if length > limit:
                raise InvalidInput(
                    f"{self._source.what}: expected a line of at most {limit} bytes before byte {self.position}, "
                    f"found a longer one; {TRUNCATED}"
                )
            if index >= 0:
                return b"".join(parts)

    def _short(self, count: int) -> InvalidInput:
        return InvalidInput(
            f"{self._source.what}: expected {count} bytes more at byte {self.position}, "
            f"found {self.left} before the end; {TRUNCATED}"
        )
