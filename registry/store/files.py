"""Regular files and folders as a store reads them, and the system's errors in the words of our tree.
Everything that stands where a file should be and is none (symlink, folder, pipe) is `Corrupt`."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path

from registry.core.errors import Corrupt, NoSpace, ReadOnly, StorageError

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def storage_error(error: OSError, doing: str, *, writing: bool = True) -> StorageError:
    """The error of our tree for one of the system; raise it `from` the original.

    Args:
        doing: what could not be done, with the place (and the bytes), to follow "cannot".
        writing: a refused permission means that the registry is read-only.
    """
    reason = os.strerror(error.errno) if error.errno else str(error)
    wrapped: StorageError
    if error.errno in _NO_SPACE:
        wrapped = NoSpace(f"cannot {doing}: {reason}; free space there, or raise the quota or file size limit")
    elif writing and error.errno in _READ_ONLY:
        wrapped = ReadOnly(f"cannot {doing}: {reason}; the registry can only be read by this user")
    else:
        wrapped = StorageError(f"cannot {doing}: {reason}")
    wrapped.errno = error.errno
    return wrapped


@contextmanager
def storage_errors(doing: str, *, writing: bool = True) -> Iterator[None]:
    """Translates each OSError of its body with `storage_error`; errors of our tree pass."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, doing, writing=writing) from error


def open_regular(path: Path) -> BufferedReader | None:
    """Opens a regular file for reading; None where there is no such file.

    Raises:
        Corrupt: a symlink, a folder or a device stands there.
        StorageError
    """
    with storage_errors(f"open {path}", writing=False):
        try:
            # O_NONBLOCK: opening a FIFO that somebody put there must not wait for its writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise not_a_file(path, "a symlink") from error
            raise
        try:
            _check_regular(path, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb")


def read_regular(path: Path, *, limit: int | None = None) -> bytes | None:
    """All bytes of a regular file, None where there is none; raises as `open_regular`.

    Args:
        limit: a file with more bytes is Corrupt.
    """
    file = open_regular(path)
    if file is None:
        return None
    with file, storage_errors(f"read {path}", writing=False):
        document = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(document) > limit:
        raise Corrupt(f"{path} has more than {limit} bytes, which no such file has")
    return document


def is_regular(path: Path) -> bool:
    """Whether a regular file stands there; False for anything else.

    Raises:
        StorageError: it cannot be told.
    """
    with storage_errors(f"look at {path}", writing=False):
        try:
            return stat.S_ISREG(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False


def regular_size(path: Path) -> int | None:
    """Bytes of a regular file, None where there is none; raises as `open_regular`."""
    found = _regular(path)
    return None if found is None else found.st_size


def regular_modified(path: Path) -> datetime | None:
    """When a regular file was written last, UTC; None where there is none; raises as `open_regular`."""
    found = _regular(path)
    return None if found is None else datetime.fromtimestamp(found.st_mtime, UTC)


def _regular(path: Path) -> os.stat_result | None:
    with storage_errors(f"look at {path}", writing=False):
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        _check_regular(path, found)
        return found


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFLNK: "a symlink", stat.S_IFDIR: "a folder"}
        raise not_a_file(path, kinds.get(stat.S_IFMT(found.st_mode), "a device, pipe or socket"))


def not_a_file(path: Path, kind: str) -> Corrupt:
    return Corrupt(
        f"{path} is {kind}, expected a regular file; move it away and put the blob back from a copy of the store"
    )


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name; nothing where there is no such folder.

    Raises:
        StorageError
    """
    with storage_errors(f"list {folder}", writing=False):
        try:
            with os.scandir(folder) as found:
                return sorted(found, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []
