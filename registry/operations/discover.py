"""Where a registry lives, making one, and opening one."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, func, insert, select

from registry.catalog.engine import Database, create_sqlite, open_database
from registry.catalog.schema import revision, upgrade
from registry.catalog.tables import registry_meta
from registry.core.errors import (
    Conflict,
    Corrupt,
    InvalidInput,
    NoSpace,
    ReadOnly,
    RegistryError,
    RegistryNotFound,
    SchemaOutOfDate,
    StorageError,
    WrongStore,
)
from registry.core.reference import shown
from registry.operations.context import Context, now
from registry.store import create_store, durable, local_root, open_store
from registry.store.files import storage_errors
from registry.store.interface import Store

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
    """`url`, else `$REGISTRY_URL`, else the nearest `.registry/` upward, else the user's data folder.

    Raises:
        InvalidInput: neither a path nor a URL.
        StorageError: it cannot be told whether one of the folders upward holds a registry.
    """
    given = os.environ.get("REGISTRY_URL") or None if url is None else os.fspath(url)
    if given is not None:
        return _given(given)
    here = working_folder()
    for folder in (here, *here.parents):
        with storage_errors(f"look for a registry in {folder / FOLDER}", writing=False):
            # Also where the catalog is lost: another registry would not be the one that was meant.
            if any((folder / FOLDER / name).is_file() for name in (CATALOG, MARKER)):
                return Location(str(folder / FOLDER))
    from platformdirs import user_data_path

    return Location(str(user_data_path("lora-registry", appauthor=False)), default=True)


def _given(text: str) -> Location:
    if "://" in text and not text.lower().startswith("file://"):
        return Location(text)
    path = local_root(text)
    try:
        path = path.expanduser()
    except RuntimeError as error:  # ~nobody-of-that-name
        raise InvalidInput(f"'{shown(text)}': {error}") from error
    # Absolute from here on: the process may change its working folder while the registry is open.
    return Location(str(path if path.is_absolute() else working_folder() / path))


def working_folder() -> Path:
    """
    Raises:
        StorageError: it was removed.
    """
    with storage_errors("find the working folder", writing=False):
        return Path.cwd()


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
    catalog, made = folder / CATALOG, False
    with _creating(folder):
        if not catalog.exists():
            try:
                _refuse_foreign(folder)
                made = make_catalog(catalog, _make_store(folder))
            except Conflict:
                if not catalog.exists():  # else another init was faster, and may have had its first push
                    raise
    return open_registry(Location(str(folder))), made


def make_catalog(
    catalog: Path,
    registry_id: str,
    fill: Callable[[Connection], None] | None = None,
    *,
    before_naming: Callable[[], None] = lambda: None,
) -> bool:
    """Makes the database beside its place and then gives it its name, so that half of one is never seen.

    Args:
        fill: fills it, in the transaction that makes it.
        before_naming: called when it is finished.

    Returns:
        False where another process was first.
    """
    durable.make_folders(catalog.parent / "tmp")  # a copy of a store may have come without this empty folder
    temporary = durable.new_temporary(catalog.parent / "tmp")
    wal = temporary.with_name(f"{temporary.name}-wal")
    try:
        create_sqlite(temporary)
        database = open_database(str(temporary))
        try:
            with database.upgrading() as connection:
                upgrade(connection)
                write_meta(connection, registry_id, None)
                if fill is not None:
                    fill(connection)
        finally:
            database.close()
        if wal.exists():  # closing moves it into the file, and is silent about a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        before_naming()
        made = durable.name_once(temporary, catalog)
        durable.sync_folder(catalog.parent)
        return made
    finally:
        for leftover in (temporary, wal, temporary.with_name(f"{temporary.name}-shm")):
            durable.remove(leftover)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"{folder} is a file; a registry is a folder")
    entries = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if strangers := entries - STORE_ENTRIES:
        raise Conflict(f"{folder} holds other files, {shown(min(strangers))} for one; choose a new or empty folder")


def _make_store(root: Path) -> str:
    """Makes the store, or takes over one that an interrupted init left without an event.

    Returns:
        Its registry id.

    Raises:
        Conflict: the store has been used, so its catalog is missing or elsewhere.
    """
    if not (root / MARKER).exists():
        with suppress(Conflict):  # another init was faster, and this one goes on with its id
            create_store(root, uuid.uuid4().hex)
    store = open_store(str(root))
    if next(store.journal.names(), None) is not None:
        raise Conflict(
            f"the store at {root} belongs to registry {store.registry_id} and is in use; its catalog is not here: "
            "make it again with 'registry reindex', put it back, or choose another folder"
        )
    return store.registry_id


@contextmanager
def _creating(folder: Path) -> Iterator[None]:
    try:
        yield
    except RegistryError:
        raise
    except OSError as error:
        what = f"cannot make a registry at {folder}: {error.strerror}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ReadOnly(error.errno, what) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpace(error.errno, what) from error
        raise StorageError(error.errno, what) from error


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
                place = _given(store)
                if not place.is_path:
                    raise InvalidInput(f"--store '{shown(store)}': the blobs lie in a folder; object stores come later")
                root = Path(place.url)
                upgrade(connection)
                with _creating(root):
                    if (root / CATALOG).exists():
                        raise Conflict(f"{root} is a registry of its own; choose another folder for the blobs")
                    write_meta(connection, _make_store(root), str(root))
    finally:
        database.close()
    return open_registry(location), made


def write_meta(connection: Connection, registry_id: str, store_url: str | None) -> None:
    connection.execute(
        insert(registry_meta).values(
            one=1, registry_id=registry_id, store_format=STORE_FORMAT, store_url=store_url, created_at=now()
        )
    )


def open_registry(location: Location) -> Context:
    """Opens a registry, and writes what a crash left in its outbox.

    Raises:
        RegistryNotFound, SchemaOutOfDate, WrongStore, StoreUnreachable
        Corrupt: among others, a journal entry that contradicts the event to be written there.
    """
    if location.is_path:
        with storage_errors(f"open {location.url}", writing=False):
            if Path(location.url).is_file():
                raise InvalidInput(f"{location.url} is a file; a registry is a folder (or a postgresql:// URL)")
    try:
        database = open_database(location.database)
    except RegistryNotFound as error:
        raise _lost(location) or error from None
    try:
        try:
            database.check()
        except RegistryNotFound as error:
            raise _lost(location) or error from None
        with database.reading() as connection:
            meta = connection.execute(select(registry_meta)).one_or_none()
        if meta is None:
            lost = _lost(location)
            raise lost or RegistryNotFound(f"{database.what} was never finished; run 'registry init' again")
        if meta.store_format > STORE_FORMAT:
            raise SchemaOutOfDate(
                f"{database.what} has store format {meta.store_format}, expected {STORE_FORMAT}: upgrade the program"
            )
        context = Context(database, _open_its_store(database.what, meta.registry_id, meta.store_url or location.url))
        if context.writable:
            # What is committed can be read all the same, and the next open tries again.
            with suppress(NoSpace, ReadOnly):
                context.flush_outbox()
    except BaseException:
        database.close()
        raise
    return context


def _lost(location: Location) -> Corrupt | None:
    """The error for a store in use whose catalog is not there."""
    if not location.is_path or not (Path(location.url) / MARKER).is_file():
        return None
    if next(open_store(location.url).journal.names(), None) is None:
        return None
    return Corrupt(
        f"the registry {location.url} has lost its catalog ({CATALOG}); make it again from the journal: registry "
        f"reindex --registry {location.url} (a catalog on a server is named by its URL)"
    )


def _open_its_store(catalog: str, registry_id: str, url: str) -> Store:
    """
    Raises:
        WrongStore: none is there, or another registry's.
    """
    try:
        store = open_store(url)
    except RegistryNotFound as error:
        what = f"catalog {catalog} is of registry {registry_id}, and its store is not at {url}: put it back"
        raise WrongStore(what) from error
    if store.registry_id != registry_id:
        raise WrongStore(
            f"catalog {catalog} is of registry {registry_id}, the store at {url} of {store.registry_id}: "
            "they do not belong together"
        )
    return store


def upgrade_registry(location: Location) -> tuple[str | None, str | None]:
    """Brings a registry's database to this program's schema.

    Returns:
        The revision before and after.

    Raises:
        RegistryNotFound, SchemaOutOfDate
    """
    database = open_database(location.database)
    try:
        with database.upgrading() as connection:
            before = revision(connection)
            if before is None:
                raise RegistryNotFound(f"{database.what} holds no registry; make one with 'registry init'")
            upgrade(connection)
            return before, revision(connection)
    finally:
        database.close()


@dataclass(frozen=True)
class Unchanged:
    """A registry opened to be looked at, whatever state it is in.

    Attributes:
        database: None where the catalog is missing or cannot be read; `fault` says why.
        registry_id: as the catalog has it.
    """

    what: str
    database: Database | None
    registry_id: str | None
    store_url: str
    fault: str


def open_unchanged(location: Location) -> Unchanged:
    """Opens a registry without writing anything, its outbox included.

    Raises:
        RegistryNotFound: there is neither a catalog nor a store.
        SchemaOutOfDate, StoreUnreachable
    """
    database: Database | None = None
    try:
        database = open_database(location.database)
        database.check()
        with database.reading() as connection:
            meta = connection.execute(select(registry_meta)).one_or_none()
        if meta is None:
            raise RegistryNotFound(f"{database.what} was never finished")
        return Unchanged(database.what, database, meta.registry_id, meta.store_url or location.url, "")
    except (RegistryNotFound, Corrupt) as error:
        if database is not None:
            database.close()
        if not location.is_path or not (Path(location.url) / MARKER).is_file():
            raise
        return Unchanged(location.database, None, None, location.url, str(error).partition(";")[0])
    except BaseException:
        if database is not None:
            database.close()
        raise
