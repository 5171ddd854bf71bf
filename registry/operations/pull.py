"""Pulling: a version's files written to a path, proven, and all or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from registry.catalog.contents import Contents, StoredFile, read_contents
from registry.catalog.versions import VersionRecord, records, resolve
from registry.core.errors import DestinationExists, InvalidInput, NoSpace, ReadOnly, SourceNotFound, StorageError
from registry.core.reference import parse_reference
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_TENSORS
from registry.operations.context import Context
from registry.operations.reading import BlobReader, file_bytes

PullFormat = Literal["native", "peft"]
FORMATS: tuple[PullFormat, ...] = ("native", "peft")


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
    if format not in FORMATS:
        raise InvalidInput(f"format {format!r}; expected one of {', '.join(FORMATS)}")
    with context.reading() as connection:
        key = resolve(connection, parse_reference(reference))
        record = records(connection, [key.id])[0]
        contents = read_contents(connection, key.id)
    extra: dict[str, bytes] = {}
    if format == "peft":
        extra = _peft_files(context, record, contents)
    single = len(contents.files) == 1 and not extra
    written = _write(context, contents, extra, _place(destination, contents.files, single), single, force)
    total = sum(path.stat().st_size for path in written)
    return PullResult(record.reference, record.digest, written[0] if single else destination, tuple(written), total)


def _peft_files(context: Context, record: VersionRecord, contents: Contents) -> dict[str, bytes]:
    """The configuration as PEFT wants it; `peft_version` is added where the push captured it beside the content.

    Raises:
        InvalidInput: the version is no adapter with a configuration.
    """
    config = next((file for file in contents.files if file.path == ADAPTER_CONFIG), None)
    if config is None or not any(file.path == ADAPTER_TENSORS for file in contents.files):
        raise InvalidInput(f"{record.reference} has no {ADAPTER_CONFIG}, so it makes no PEFT folder; pull it as native")
    with BlobReader(context.store.blobs) as reader:
        data = b"".join(file_bytes(reader, context.store.blobs, config, None))
    document = json.loads(data)
    if record.peft_version is None or document.get("peft_version") is not None:
        return {}
    document["peft_version"] = record.peft_version
    return {ADAPTER_CONFIG: json.dumps(document, indent=2, sort_keys=True).encode("utf-8")}


def _place(destination: Path, files: Iterable[StoredFile], single: bool) -> Path:
    """Where to write: one file goes to the path itself, or into a folder that is there already."""
    if single and destination.is_dir():
        return destination / next(iter(files)).path
    return destination


def _write(
    context: Context,
    contents: Contents,
    extra: Mapping[str, bytes],
    target: Path,
    single: bool,
    force: bool,
) -> list[Path]:
    _check_target(target, contents.files, single, force)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".registry-pull-", dir=target.parent))
    except OSError as error:
        raise _write_error(error, target.parent) from error
    try:
        made = temporary / "content"
        try:
            _write_files(context, contents, extra, made, single)
            return _put_in_place(made, target, [file.path for file in contents.files], single)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise _write_error(error, target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(target: Path, files: Iterable[StoredFile], single: bool, force: bool) -> None:
    if not target.parent.is_dir():
        raise SourceNotFound(f"no such folder: {target.parent}; make it first")
    if single:
        if target.is_dir():
            raise InvalidInput(f"{target} is a folder; expected a file name")
        if target.exists() and not force:
            raise DestinationExists(f"{target} exists; pull with --force to replace it")
        return
    if target.exists() and not target.is_dir():
        raise InvalidInput(f"{target} is a file, and the version has several; give a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise DestinationExists(f"{target} is not empty; pull with --force to replace the version's files in it")
    for file in files:
        if (target / file.path).is_dir():
            raise InvalidInput(f"{target / file.path} is a folder; expected a file to replace")


def _write_files(context: Context, contents: Contents, extra: Mapping[str, bytes], made: Path, single: bool) -> None:
    if not single:
        made.mkdir()
    with BlobReader(context.store.blobs) as reader:
        for file in contents.files:
            path = made if single else made / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            component = contents.components.get(file.role) if file.role is not None else None
            with path.open("xb") as out:
                if file.path in extra:
                    out.write(extra[file.path])
                else:
                    out.writelines(file_bytes(reader, context.store.blobs, file, component))
                out.flush()
                os.fsync(out.fileno())


def _put_in_place(made: Path, target: Path, paths: list[str], single: bool) -> list[Path]:
    """One rename where the target is new or one file; into a folder that is there, file by file."""
    if single:
        os.replace(made, target)
        return [target]
    if target.is_dir() and any(target.iterdir()):
        for path in paths:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(made / path, target / path)
    else:
        os.replace(made, target)
    return [target / path for path in paths]


def _write_error(error: OSError, where: Path) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(error.errno, f"no space to write {where}; nothing was left behind")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ReadOnly(error.errno, f"{where} cannot be written by this user")
    return StorageError(error.errno, f"cannot write {where}: {error.strerror}")
