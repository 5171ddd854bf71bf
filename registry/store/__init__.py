"""Where the bytes are: blobs named by their sha256, and the journal. `open_store` and `create_store` are
what the rooms above call; which implementation answers is decided here alone."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.store.local import LocalStore

if TYPE_CHECKING:
    from registry.store.interface import Store

__all__ = ["create_store", "local_root", "open_store"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_store(url_or_path: str | os.PathLike[str]) -> Store:
    """Opens the store at a path or `file://` URL.

    Raises:
        InvalidInput: a URL of another scheme, or a malformed one.
        RegistryNotFound: no store there.
        SchemaOutOfDate: a store of a newer format.
        Corrupt: a store whose `registry.json` is not what it must be.
        StorageError: it cannot be read.
    """
    return LocalStore.open(local_root(url_or_path))


def create_store(url_or_path: str | os.PathLike[str], registry_id: str) -> Store:
    """Makes a store at a path or `file://` URL; the folder may exist and hold other things (the catalog).

    Args:
        registry_id: `uuid4().hex`; the catalog carries the same.

    Raises:
        InvalidInput: as `open_store`, or the id is not 32 lower-case hex digits.
        Conflict: another registry is there; the same one is opened.
        NoSpace, ReadOnly, StorageError: there is no store then.
    """
    return LocalStore.create(local_root(url_or_path), registry_id)


def local_root(url_or_path: str | os.PathLike[str]) -> Path:
    """The folder that a path or `file://` URL names.

    Raises:
        InvalidInput: it names none.
    """
    text = os.fspath(url_or_path)
    if match := _SCHEME.match(text):
        text = _file_url_path(text, match[1].lower())
    if not text or "\0" in text:
        raise InvalidInput("the place of a registry is a path or a file:// URL; this one is empty or has a NUL in it")
    return Path(text)


def _file_url_path(url: str, scheme: str) -> str:
    # Only the scheme is shown: such a URL may carry a password.
    if scheme == "s3":
        raise InvalidInput("a store at s3:// is not supported yet; give a path or a file:// URL")
    if scheme != "file":
        raise InvalidInput(f"no store can be opened at {scheme}://; give a path or a file:// URL")
    host, slash, path = url.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise InvalidInput(f"'{shown(url)}': a file:// URL names no host; for an absolute path write file:///path")
    if "?" in path or "#" in path:
        raise InvalidInput(f"'{shown(url)}': write '?' and '#' in a file:// URL as %3F and %23")
    return os.fsdecode(unquote_to_bytes(slash + path))
