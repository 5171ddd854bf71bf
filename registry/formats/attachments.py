"""All files of a folder, and those of them that are kept as they are beside the tensors. A folder may come from
anywhere: no symbolic link leads out of it, nothing but regular files is opened, and an attachment is opaque bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from registry.core.errors import InvalidInput, InvalidManifest, SourceNotFound, StorageError
from registry.core.manifest import check_file_path
from registry.core.reference import shown
from registry.formats.source import CHUNK_BYTES, PlainFile, source_errors

ATTACHMENT_LIMIT = 256 << 20
"""Bytes of one attachment; what is larger is tensors in a form that we do not know, or data."""
LEFT_OUT = (".cache", ".git", "__pycache__")
"""Folders of tools, wherever they stand."""


@dataclass(frozen=True, slots=True)
class FolderFile:
    """One entry of a folder that is no folder.

    Attributes:
        path: relative, with `/`.
        place: where its bytes lie: the file itself, or the blob of a hub cache.
        identity: device, inode, size and time of change of `place`; None: it is no regular file.
        refusal: why it cannot be an attachment, with the mend; None: it can.
    """

    path: str
    place: Path
    identity: tuple[int, int, int, int] | None
    refusal: str | None

    @property
    def size(self) -> int:
        return self.identity[2] if self.identity else 0


@dataclass(frozen=True)
class FolderListing:
    """What stood in a folder when it was listed.

    Attributes:
        folder: its path as it was given.
        files: sorted by path.
        left_out: folders that were not entered, by `LEFT_OUT`.
    """

    folder: Path
    files: tuple[FolderFile, ...]
    left_out: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(file.path for file in self.files)

    def is_unchanged(self) -> bool:
        """Whether the same files stand there, and nobody seems to have written to them."""
        with suppress(SourceNotFound):
            return list_folder(self.folder) == self
        return False


def list_folder(folder: Path) -> FolderListing:
    """Walks a folder. No symbolic link is followed but those that a Hugging Face hub cache is made of.

    Raises:
        SourceNotFound, StorageError: the folder, or one in it, cannot be read.
    """
    with source_errors(folder):
        root = Path(os.path.realpath(folder, strict=True))
    blobs = _hub_blobs(root)
    files: list[FolderFile] = []
    left_out: list[str] = []
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        here = root / inside
        with source_errors(here), os.scandir(here) as entries:
            for entry in entries:
                path = f"{inside}{entry.name}"
                if not entry.is_dir(follow_symlinks=False):
                    files.append(_file(path, here / entry.name, blobs))
                elif entry.name in LEFT_OUT:
                    left_out.append(path)
                elif (refusal := _path_refusal(path)) is None:
                    waiting.append(f"{path}/")
                else:
                    files.append(FolderFile(path, here / entry.name, None, refusal))
    return FolderListing(folder, tuple(sorted(files, key=lambda file: file.path)), tuple(sorted(left_out)))


def _file(path: str, place: Path, blobs: Path | None) -> FolderFile:
    with source_errors(place):
        status = os.lstat(place)
        if stat.S_ISLNK(status.st_mode):
            target = place.parent / os.readlink(place)
            if blobs is None or target.name in ("", "..") or Path(os.path.realpath(target.parent)) != blobs:
                return FolderFile(path, place, None, "it is a symbolic link; put the file itself there")
            place = blobs / target.name
            if not place.exists():
                return FolderFile(path, place, None, "the hub cache has not its blob; download it again")
            status = os.lstat(place)
    if not stat.S_ISREG(status.st_mode):
        return FolderFile(path, place, None, "it is no regular file; take it away")
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return FolderFile(path, place, identity, _path_refusal(path))


def _path_refusal(path: str) -> str | None:
    try:
        check_file_path(path)
    except InvalidManifest:
        return "its path may not stand in a version (a backslash, a control character, or too long); rename it"
    return None


def _hub_blobs(folder: Path) -> Path | None:
    """The `blobs` of the hub cache in whose `snapshots/<revision>` the folder is or lies; None: in none."""
    for inner in (folder, *folder.parents):
        blobs = inner.parent.parent / "blobs"
        if inner.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            return blobs
    return None


class Attachment(PlainFile):
    """A file that is kept as it is, without a look inside. It is open only while it is read."""

    def __init__(self, file: FolderFile, what: str) -> None:
        """
        Args:
            what: names the file in errors.
        """
        self.path = file.path
        self.size = file.size
        self._file = file
        self._what = what

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, from the begin, each time; a chunk stays valid until the next one is asked for.

        Raises:
            InvalidInput: it is not the file that was listed; StorageError: it cannot be read.
        """
        with source_errors(self._file.place):
            # A link or a pipe may have taken its place.
            opened = os.open(self._file.place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if _identity(os.fstat(opened)) != self._file.identity:
                raise self._changed()
            buffer = memoryview(bytearray(min(CHUNK_BYTES, self.size)))
            left = self.size
            while left:
                try:
                    read = os.readv(opened, [buffer[:left]])
                except OSError as error:
                    raise StorageError(error.errno, f"cannot read {self._what}: {error.strerror}") from error
                if read == 0:
                    raise self._changed()
                left -= read
                yield buffer[:read]
        finally:
            os.close(opened)

    def is_unchanged(self) -> bool:
        with suppress(OSError):
            return _identity(os.lstat(self._file.place)) == self._file.identity
        return False

    def _changed(self) -> InvalidInput:
        return InvalidInput(f"{self._what} changed while it was read; push it when nobody writes it")


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def attachments(
    listing: FolderListing,
    known: Collection[str],
    *,
    same_in_another_form: Collection[str] = (),
    limit: int | None = ATTACHMENT_LIMIT,
) -> tuple[tuple[Attachment, ...], tuple[str, ...]]:
    """The files of a folder that are kept as they are.

    Args:
        known: files that are more than attachments.
        same_in_another_form: files that are left out, as they hold what a known file does.
        limit: bytes of one file; None: all are left out.

    Returns:
        them, sorted by path; and notes on what is left out.

    Raises:
        InvalidInput: a symbolic link, something that is no regular file, a path that may not stand in a version, or a
            file over the limit; names the file, its size and the mend.
    """
    notes = []
    if same_in_another_form:
        notes.append(f"left out (the same weights in another form): {_list(same_in_another_form)}")
    if listing.left_out:
        notes.append(f"left out (folders of tools): {_list(listing.left_out)}")
    others = [file for file in listing.files if file.path not in known and file.path not in same_in_another_form]
    if limit is None:
        if others:
            notes.append(f"left out (no attachments): {_list([file.path for file in others])}")
        return (), tuple(notes)
    for file in others:
        if file.refusal is not None:
            raise InvalidInput(
                f"{_named(listing, file)} cannot be kept: {file.refusal}, or leave all such files out: --no-attachments"
            )
    large = [file for file in others if file.size > limit]
    if large:
        more = f" (and {len(large) - 1} more are too large)" if len(large) > 1 else ""
        raise InvalidInput(
            f"{_named(listing, large[0])} has {large[0].size} bytes{more}; an attachment has {limit} at most. Take it "
            f"away, allow it with --attachment-limit, or leave all such files out with --no-attachments"
        )
    return tuple(Attachment(file, _named(listing, file)) for file in others), tuple(notes)


def _list(paths: Collection[str]) -> str:
    return shown(", ".join(sorted(paths)), 400)


def _named(listing: FolderListing, file: FolderFile) -> str:
    return shown(str(listing.folder / file.path), 200)
