"""Pulling: a version's files written to a path, proven, and all or nothing."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from registry.catalog.contents import read_contents
from registry.catalog.versions import records, resolve
from registry.core.errors import (
    DestinationExists,
    InvalidInput,
    NoSpace,
    ReadOnly,
    RegistryError,
    SourceNotFound,
    StorageError,
)
from registry.core.reference import parse_reference, shown
from registry.operations.architectures import architecture
from registry.operations.context import Context
from registry.operations.converting import FORMATS, WITH_ARCHITECTURE, Output, outputs
from registry.operations.reading import BlobReader, refuse_external

TEMPORARY = ".registry-pull-"
"""How the name of a folder begins in which a pull writes; one that was killed leaves it."""


@dataclass(frozen=True)
class PullResult:
    """What a pull wrote.

    Attributes:
        path: the file, or the folder that holds the files.
        files: all that was written.
        bytes: their sum.
    """

    reference: str
    digest: str
    path: Path
    files: tuple[Path, ...]
    bytes: int


def pull(
    context: Context, reference: str, destination: Path, *, format: str = "native", force: bool = False
) -> PullResult:
    """Pulls a version; see `Registry.pull`."""
    if "\0" in str(destination):
        raise InvalidInput(f"destination '{shown(str(destination))}': a path has no NUL in it")
    wanted = next((known for known in FORMATS if known == format), None)
    if wanted is None:
        raise InvalidInput(f"format '{shown(str(format))}'; expected one of {', '.join(FORMATS)}")
    with context.reading() as connection:
        key = resolve(connection, parse_reference(reference))
        record = records(connection, [key.id])[0]
        contents = read_contents(connection, key.id)
    refuse_external(contents, record.reference)
    built = architecture(context, record.reference) if wanted in WITH_ARCHITECTURE else None
    with BlobReader(context.store.blobs) as reader, write_errors(destination):
        files = outputs(context.store.blobs, reader, record, contents, wanted, built)
        single = len(files) == 1 and format != "peft"
        written = _write(files, _place(destination, files, single), single, force)
        total = sum(path.stat().st_size for path in written)
    return PullResult(record.reference, record.digest, written[0] if single else destination, tuple(written), total)


def _place(destination: Path, files: Iterable[Output], single: bool) -> Path:
    """Where to write: one file goes to the path itself, or into a folder that is there already."""
    if single and destination.is_dir():
        return destination / next(iter(files)).path
    return destination


def _write(files: Sequence[Output], target: Path, single: bool, force: bool) -> list[Path]:
    # Into a folder that is there the files are renamed from within: it may be a link, a mount, somebody's working
    # folder, or the only one in which this user may write.
    inside = not single and target.is_dir()
    temporary = (target if inside else target.parent) / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        _check_target(target, files, single, force)
        temporary.mkdir(0o700)
        made = temporary / "content"
        _write_files(files, made, single)
        _check_target(target, files, single, force)  # again: what took long may have been overtaken
        return _put_in_place(made, target, [file.path for file in files], single)
    finally:
        _remove(temporary)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:  # a Ctrl-C in the cleaning up must not keep it from being done
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_target(target: Path, files: Iterable[Output], single: bool, force: bool) -> None:
    if not target.parent.is_dir():
        raise SourceNotFound(f"no such folder: {shown(str(target.parent), 200)}; make it first")
    what = shown(str(target), 200)
    if single:
        if os.path.lexists(target) and not force:
            raise DestinationExists(f"{what} exists; pull with --force to replace it")
        if target.exists() and not target.is_file():
            raise InvalidInput(f"{what} is a folder or device; expected a file name")
        return
    if os.path.lexists(target) and not target.is_dir():
        raise InvalidInput(f"{what} is no folder, and the version has several files; give a folder")
    if not target.is_dir():
        return
    if not force and any(not entry.name.startswith(TEMPORARY) for entry in target.iterdir()):
        raise DestinationExists(f"{what} is not empty; pull with --force to replace the version's files in it")
    for file in files:
        if (target / file.path).is_dir():
            raise InvalidInput(f"{shown(str(target / file.path), 200)} is a folder; expected a file to replace")


def _write_files(files: Iterable[Output], made: Path, single: bool) -> None:
    if not single:
        made.mkdir()
    for file in files:
        path = made if single else made / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as out:
            file.write(out)
            out.flush()
            os.fsync(out.fileno())


def _put_in_place(made: Path, target: Path, paths: list[str], single: bool) -> list[Path]:
    """One rename where the target is new or one file; into a folder that is there, file by file."""
    if single:
        os.replace(made, target)
        return [target]
    if target.is_dir():
        for path in paths:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(made / path, target / path)
    else:
        os.replace(made, target)
    return [target / path for path in paths]


@contextmanager
def write_errors(destination: Path) -> Iterator[None]:
    """Turns errors of the system about the destination into ours; those of the store are ours already."""
    try:
        yield
    except RegistryError:
        raise
    except OSError as error:
        what, reason = shown(str(destination), 200), error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpace(error.errno, f"no space to write {what} ({reason}); nothing was left behind") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ReadOnly(error.errno, f"{what} cannot be written by this user ({reason})") from error
        raise StorageError(error.errno, f"cannot write {what}: {reason}") from error
