"""A store in a local folder: `registry.json`, `blobs/sha256/`, `journal/` and `tmp/`. How it is made, opened
and recognised; `local_blobs.py` and `local_journal.py` hold what is in it."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from registry.core.errors import Conflict, Corrupt, InvalidInput, RegistryNotFound, SchemaOutOfDate
from registry.core.reference import shown
from registry.store import durable, files
from registry.store.interface import Temporary
from registry.store.local_blobs import LocalBlobStore
from registry.store.local_journal import LocalJournal

STORE_FORMAT = 1

_IDENTITY_LIMIT = 64 << 10
_REGISTRY_ID = re.compile(r"[0-9a-f]{32}")


class LocalStore:
    """Blobs and journal of one registry in one folder. Safe to use from threads and after a fork.

    Attributes:
        root: the folder, absolute.
        registry_id: 32 hex digits, the same in the catalog.
    """

    def __init__(self, root: Path, registry_id: str) -> None:
        """For `open` and `create`; touches nothing on the disk."""
        self.root = root
        self.registry_id = registry_id
        self.blobs = LocalBlobStore(root / "blobs" / "sha256", root / "tmp")
        self.journal = LocalJournal(root / "journal", root / "tmp")

    @classmethod
    def open(cls, root: Path) -> LocalStore:
        """Opens the store in a folder.

        Raises:
            RegistryNotFound: there is none.
            SchemaOutOfDate: it was made by a newer program.
            Corrupt: its `registry.json` does not say what it must.
        """
        root = root.absolute()
        return cls(root, _read_identity(root))

    @classmethod
    def create(cls, root: Path, registry_id: str) -> LocalStore:
        """Makes a store; `registry.json` comes last and at once, so half a store is none.

        Creating the same store again opens it, so that a creation that was cut off can be repeated.

        Raises:
            InvalidInput: the id is not 32 lower-case hex digits.
            Conflict: another registry is there.
            NoSpace, ReadOnly, StorageError
        """
        if not _REGISTRY_ID.fullmatch(registry_id):
            raise InvalidInput(f"registry id '{shown(registry_id)}': expected 32 lower-case hex digits (uuid4().hex)")
        root = root.absolute()
        changed: set[Path] = set()
        for folder in (root / "blobs" / "sha256", root / "journal", root / "tmp"):
            changed.update(durable.make_folders(folder))
        durable.in_parallel(durable.sync_folder, sorted(changed))
        identity = json.dumps({"id": registry_id, "store_format": STORE_FORMAT}, separators=(",", ":"))
        if not durable.create_once(root / "registry.json", identity.encode(), top=root, temporaries=root / "tmp"):
            found = _read_identity(root)
            if found != registry_id:
                raise Conflict(f"{root} already holds the registry {found}; open it, or choose another folder")
        return cls(root, registry_id)

    @property
    def writable(self) -> bool:
        """Whether this user may add to the store, as far as modes and mount options tell."""
        return all(
            os.access(_existing(self.root / folder), os.W_OK | os.X_OK) for folder in ("blobs/sha256", "journal", "tmp")
        )

    def stale_temporaries(self, before: datetime) -> list[Temporary]:
        limit = before.timestamp()
        stale = []
        for entry in files.entries(self.root / "tmp"):
            with files.storage_errors(f"look at {entry.path}", writing=False), suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if not entry.is_dir(follow_symlinks=False) and found.st_mtime < limit:
                    stale.append(Temporary(entry.name, found.st_size))
        return stale

    def remove_temporary(self, name: str) -> None:
        durable.remove(self.root / "tmp" / Path(name).name)


def _existing(path: Path) -> Path:
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _read_identity(root: Path) -> str:
    path = root / "registry.json"
    document = files.read_regular(path, limit=_IDENTITY_LIMIT)
    if document is None:
        if os.path.lexists(root) and not root.is_dir():
            raise RegistryNotFound(f"no registry at {root}: it is not a folder")
        raise RegistryNotFound(f"no registry at {root}: {path.name} is missing there; `registry init {root}` makes one")
    try:
        identity = json.loads(document, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path}: expected a JSON object with id and store_format: {error}") from error
    if not isinstance(identity, dict):
        raise Corrupt(f"{path}: expected a JSON object with id and store_format, found {type(identity).__name__}")
    store_format = identity.get("store_format")
    if type(store_format) is int and store_format > STORE_FORMAT:
        raise SchemaOutOfDate(
            f"{path}: store format {store_format}, this program knows up to {STORE_FORMAT}; "
            "install a newer lora-registry"
        )
    registry_id = identity.get("id")
    well_formed = isinstance(registry_id, str) and _REGISTRY_ID.fullmatch(registry_id)
    if set(identity) != {"id", "store_format"} or type(store_format) is not int or store_format < 1 or not well_formed:
        raise Corrupt(
            f"{path}: expected id (32 hex digits) and store_format {STORE_FORMAT}, found {shown(str(identity))}"
        )
    return str(registry_id)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found
