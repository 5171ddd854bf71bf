"""Where a registry lives, making one, and opening one."""

from __future__ import annotations

import errno
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, func, insert, select

from registry.catalog.engine import create_sqlite, open_database
from registry.catalog.schema import revision, upgrade
from registry.catalog.tables import registry_meta
from registry.core.errors import (
    Conflict,
    InvalidInput,
    NoSpace,
    ReadOnly,
    RegistryNotFound,
    SchemaOutOfDate,
    StorageError,
    WrongStore,
)
from registry.operations.context import Context, now
from registry.store import create_store, open_store

CATALOG = "catalog.sqlite"
FOLDER = ".registry"
STORE_FORMAT = 1
MARKER = "registry.json"
STORE_ENTRIES = frozenset({MARKER, "blobs", "journal", "tmp"})
_INIT_LOCK = 0x6C6F7261


@dataclass(frozen=True)
class Location:
    """Where a registry is.

    Attributes:
        url: a folder, or a `postgresql://` URL.
        default: True for the user's data folder, which is made on first use.
    """

    url: str
    default: bool = False

    @property
    def is_path(self) -> bool:
        return "://" not in self.url

    @property
    def database(self) -> str:
        return str(Path(self.url) / CATALOG) if self.is_path else self.url


def locate(url: str | os.PathLike[str] | None = None) -> Location:
    """`url`, else `$REGISTRY_URL`, else the nearest `.registry/` upward, else the user's data folder."""
    given = os.fspath(url) if url is not None else os.environ.get("REGISTRY_URL", "")
    if given:
        if given.startswith("file://"):
            given = given.removeprefix("file://")
        return Location(given if "://" in given else str(Path(given).expanduser()))
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / FOLDER / CATALOG).is_file():
            return Location(str(folder / FOLDER))
    from platformdirs import user_data_path

    return Location(str(user_data_path("lora-registry", appauthor=False)), default=True)


def create(location: Location, *, store: str | None = None) -> tuple[Context, bool]:
    """Makes a registry, or opens the one that is there.

    Args:
        store: folder of the blobs; needed beside a database server, and the registry's own folder otherwise.

    Returns:
        The registry and whether it was made.

    Raises:
        InvalidInput, ReadOnly, NoSpace, Conflict
    """
    if location.is_path:
        if store is not None:
            raise InvalidInput("a registry in a folder keeps its blobs there; --store goes with a postgresql:// URL")
        return _create_embedded(Path(location.url))
    return _create_on_server(location, store)


def _create_embedded(folder: Path) -> tuple[Context, bool]:
    if (folder / CATALOG).exists():
        return open_registry(Location(str(folder))), False
    _refuse_foreign(folder)
    temporary = folder / f".{CATALOG}.{os.getpid()}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        registry_id = _make_store(folder)
        create_sqlite(temporary)
        database = open_database(str(temporary))
        try:
            with database.writing() as connection:
                upgrade(connection)
                _write_meta(connection, registry_id, None)
        finally:
            database.close()
        made = _place_catalog(temporary, folder / CATALOG)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise _cannot_create(error, folder) from error
    finally:
        for leftover in folder.glob(f"{temporary.name}*"):
            leftover.unlink()
    return open_registry(Location(str(folder))), made


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"{folder} is a file; a registry is a folder")
    entries = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    ours = {name for name in entries if name in STORE_ENTRIES or name.startswith(f".{CATALOG}.")}
    if entries != ours:
        raise Conflict(f"{folder} holds other files, {min(entries - ours)} for one; choose a new or empty folder")


def _make_store(root: Path) -> str:
    """Makes the store, or takes over one that an interrupted init left without an event.

    Returns:
        Its registry id.

    Raises:
        Conflict: the store has been used, so its catalog is missing or elsewhere.
    """
    if not (root / MARKER).exists():
        create_store(root, uuid.uuid4().hex)
    store = open_store(str(root))
    if next(store.journal.names(), None) is not None:
        raise Conflict(
            f"the store at {root} belongs to registry {store.registry_id} and is in use; its catalog is not here: "
            "put the catalog back, or choose another folder"
        )
    return store.registry_id


def _place_catalog(temporary: Path, catalog: Path) -> bool:
    """Gives a finished database its name; False where another process was first."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(temporary, catalog)
    except FileExistsError:
        return False
    folder = os.open(catalog.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def _cannot_create(error: OSError, folder: Path) -> StorageError:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ReadOnly(error.errno, f"cannot make a registry at {folder}: {error.strerror}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(error.errno, f"no space for a registry at {folder}")
    return StorageError(error.errno, f"cannot make a registry at {folder}: {error.strerror}")


def _create_on_server(location: Location, store: str | None) -> tuple[Context, bool]:
    database = open_database(location.database)
    try:
        with database.writing() as connection:
            connection.execute(select(func.pg_advisory_xact_lock(_INIT_LOCK)))
            made = revision(connection) is None
            if made:
                if store is None:
                    raise InvalidInput(
                        f"{database.what} needs a place for the blobs: registry init {database.what} --store FOLDER"
                    )
                root = Path(store.removeprefix("file://")).expanduser().absolute()
                root.mkdir(parents=True, exist_ok=True)
                upgrade(connection)
                _write_meta(connection, _make_store(root), str(root))
    finally:
        database.close()
    return open_registry(location), made


def _write_meta(connection: Connection, registry_id: str, store_url: str | None) -> None:
    connection.execute(
        insert(registry_meta).values(
            one=1, registry_id=registry_id, store_format=STORE_FORMAT, store_url=store_url, created_at=now()
        )
    )


def open_registry(location: Location) -> Context:
    """Opens a registry, and writes what a crash left in its outbox.

    Raises:
        RegistryNotFound, SchemaOutOfDate, WrongStore, StoreUnreachable
    """
    if location.is_path and Path(location.url).is_file():
        raise InvalidInput(f"{location.url} is a file; a registry is a folder (or a postgresql:// URL)")
    database = open_database(location.database)
    try:
        database.check()
        with database.reading() as connection:
            meta = connection.execute(select(registry_meta)).one_or_none()
        if meta is None:
            raise RegistryNotFound(f"{database.what} was never finished; run 'registry init' again")
        if meta.store_format > STORE_FORMAT:
            raise SchemaOutOfDate(
                f"{database.what} has store format {meta.store_format}, expected {STORE_FORMAT}: upgrade the program"
            )
        store = open_store(meta.store_url or location.url)
        if store.registry_id != meta.registry_id:
            raise WrongStore(
                f"catalog {database.what} is of registry {meta.registry_id}, the store at "
                f"{meta.store_url or location.url} of {store.registry_id}: they do not belong together"
            )
    except BaseException:
        database.close()
        raise
    context = Context(database, store)
    if context.writable:
        context.flush_outbox()
    return context


def upgrade_registry(location: Location) -> tuple[str | None, str | None]:
    """Brings a registry's database to this program's schema.

    Returns:
        The revision before and after.

    Raises:
        RegistryNotFound, SchemaOutOfDate
    """
    database = open_database(location.database)
    try:
        with database.writing() as connection:
            before = revision(connection)
            if before is None:
                raise RegistryNotFound(f"{database.what} holds no registry; make one with 'registry init'")
            upgrade(connection)
            return before, revision(connection)
    finally:
        database.close()
