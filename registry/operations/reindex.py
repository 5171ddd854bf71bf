"""`reindex`: a catalog that was lost, damaged or is an older one is made again from the store: all of it in one
transaction, or nothing. The journal is what counts; nothing of the store is changed, but that events which the catalog
still has to write are written first."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection, select, text

from registry.catalog import tables
from registry.catalog.engine import Database, open_database
from registry.catalog.journal_rows import pending_events
from registry.catalog.schema import check_revision, revision, upgrade
from registry.core.errors import (
    Corrupt,
    InvalidInput,
    ReadOnly,
    RegistryNotFound,
    StorageError,
    WrongStore,
)
from registry.core.event import Event
from registry.operations.discover import CATALOG, Location, make_catalog, write_meta
from registry.operations.histories import read_histories
from registry.operations.holdings import Holdings
from registry.operations.replay import Replayed, Stop, replay
from registry.store import durable, open_store
from registry.store.files import storage_errors
from registry.store.interface import Store

SIDECARS = ("-wal", "-shm", "-journal")
_NAMED = 5
_PENDING = 1_000_000


@dataclass(frozen=True)
class Reindexed:
    """What a rebuilding did.

    Attributes:
        registry: its folder or URL, without a password.
        left_out: names that end early, or are missing, because their journal or what it names is damaged.
        unreadable: (blob, reason) of blobs of tensors that are missing or damaged. What the catalog says of them is
            right all the same; `registry fsck` says who suffers.
        rescued: events that the catalog had not written to the journal yet.
        kept_as: where the former catalog's file is now, if it was of no use.
    """

    registry: str
    names: int
    versions: int
    events: int
    left_out: tuple[Stop, ...]
    unreadable: tuple[tuple[str, str], ...]
    rescued: int
    kept_as: Path | None


def reindex(
    location: Location,
    *,
    store: str | None = None,
    skip_damaged: bool = False,
) -> Reindexed:
    """Makes a registry's catalog again; see `Registry.reindex`."""
    if not location.is_path:
        return _on_server(location, store, skip_damaged)
    if store is not None:
        raise InvalidInput("a registry in a folder keeps its blobs there; --store goes with a postgresql:// URL")
    held = open_store(location.url)
    if not held.writable:
        raise ReadOnly(f"the registry {location.url} cannot be written by this user; ask its owner")
    return _Rebuild(held, location.url, skip_damaged).in_folder(Path(location.url))


def _on_server(location: Location, store: str | None, skip_damaged: bool) -> Reindexed:
    database = open_database(location.database)
    try:
        with database.reading() as connection:
            there = revision(connection) is not None
            if there:
                check_revision(connection, database.what)
            meta = connection.execute(select(tables.registry_meta)).one_or_none() if there else None
        place = store or (None if meta is None else meta.store_url)
        if place is None:
            raise InvalidInput(
                f"{database.what} does not say where its blobs are; name their folder: registry reindex --store FOLDER"
            )
        held = open_store(place)
        if meta is not None and meta.registry_id != held.registry_id:
            raise WrongStore(
                f"catalog {database.what} is of registry {meta.registry_id}, the store at {place} of "
                f"{held.registry_id}: they do not belong together"
            )
        rebuild = _Rebuild(held, database.what, skip_damaged)
        return rebuild.in_place(database, None if meta is not None and store is None else str(Path(place).absolute()))
    finally:
        database.close()


class _Rebuild:
    def __init__(self, store: Store, registry: str, skip_damaged: bool) -> None:
        self._store = store
        self._registry = registry
        self._skip_damaged = skip_damaged
        self._rescued = 0
        self._replayed = Replayed()

    def in_folder(self, root: Path) -> Reindexed:
        catalog = root / CATALOG
        if catalog.exists():
            database = _usable(catalog, self._store.registry_id)
            if database is not None:
                try:
                    return self.in_place(database, None)
                finally:
                    database.close()
            _refuse_open_elsewhere(catalog)
        kept: Path | None = None

        def set_aside() -> None:
            nonlocal kept
            kept = _set_aside(catalog) if catalog.exists() else None

        if not make_catalog(catalog, self._store.registry_id, self._fill, before_naming=set_aside):
            raise StorageError(f"another process has made {catalog} meanwhile; if it is not whole, try again")
        return self._result(kept)

    def in_place(self, database: Database, store_url: str | None) -> Reindexed:
        """Empties a catalog and fills it again; readers see the old one until that is done."""
        with database.writing() as connection:
            if revision(connection) is None:
                upgrade(connection)
            _lock(connection)
            self._rescue(connection)
            _empty(connection)
            meta = connection.execute(select(tables.registry_meta.c.registry_id)).scalar()
            if store_url is not None or meta is None:
                connection.execute(tables.registry_meta.delete())
                write_meta(connection, self._store.registry_id, store_url)
            self._fill(connection)
        return self._result(None)

    def _rescue(self, connection: Connection) -> None:
        """Writes the events that were committed and not journaled. Where the journal has another, that one counts: it
        alone was ever acknowledged."""
        pending: list[Event] = []
        with suppress(ValueError):  # a damaged row
            pending = pending_events(connection, _PENDING)
        for event in pending:
            with suppress(Corrupt, InvalidInput):
                document = event.document(self._store.registry_id)
                self._store.journal.append(event.namespace, event.name, event.seq, document)
                self._rescued += 1

    def _fill(self, connection: Connection) -> None:
        self._replayed = replay(connection, read_histories(self._store), Holdings(self._store))
        if self._replayed.stops and not self._skip_damaged:
            # What only follows from another name's damage comes last.
            stops = sorted(self._replayed.stops, key=lambda stop: (stop.blamed is not None, stop.name))
            more = f" (and {len(stops) - _NAMED} more names)" if len(stops) > _NAMED else ""
            raise Corrupt(
                f"the catalog cannot be made whole: {'; '.join(map(str, stops[:_NAMED]))}{more}. Put back what is "
                "missing from a copy of the store, or leave out what follows it: registry reindex --skip-damaged"
            )

    def _result(self, kept: Path | None) -> Reindexed:
        done = self._replayed
        return Reindexed(
            self._registry,
            done.names,
            done.versions,
            done.events,
            tuple(done.stops),
            tuple(sorted(done.unreadable.items())),
            self._rescued,
            kept,
        )


def _lock(connection: Connection) -> None:
    """Keeps writers out, not readers; on SQLite the transaction does that already."""
    if connection.dialect.name == "postgresql":
        names = ", ".join(f'"{table.name}"' for table in tables.metadata.sorted_tables)
        connection.execute(text(f"LOCK TABLE {names} IN EXCLUSIVE MODE"))


def _empty(connection: Connection) -> None:
    # Not TRUNCATE, which readers whose snapshot is older would see.
    for table in reversed(tables.metadata.sorted_tables):
        if table.name != "registry_meta":
            connection.execute(table.delete())


def _usable(catalog: Path, registry_id: str) -> Database | None:
    """The database, where it is one that can be emptied and filled again; None where it is to be replaced.

    Raises:
        SchemaOutOfDate: an older or newer program's.
        WrongStore: another registry's.
        ReadOnly
    """
    database = open_database(str(catalog))
    try:
        if not database.writable:
            raise ReadOnly(f"the catalog {catalog} cannot be written by this user; ask its owner")
        try:
            with database.reading() as connection:
                if revision(connection) is None:
                    raise RegistryNotFound("no schema")
                check_revision(connection, database.what)
                listed = text("SELECT name FROM sqlite_master WHERE type = 'table'")
                whole = set(tables.metadata.tables) <= set(connection.execute(listed).scalars())
                whole = whole and connection.execute(text("PRAGMA integrity_check(1)")).scalar() == "ok"
                found = connection.execute(select(tables.registry_meta.c.registry_id)).scalar() if whole else None
        except (Corrupt, RegistryNotFound):
            whole, found = False, None
        if found not in (None, registry_id):
            raise WrongStore(
                f"the catalog {catalog} is of registry {found}, the store beside it of {registry_id}: move the catalog "
                "away if it does not belong here"
            )
        if whole:
            return database
    except BaseException:
        database.close()
        raise
    database.close()
    return None


def _refuse_open_elsewhere(catalog: Path) -> None:
    """
    Raises:
        StorageError: another process has the file open, as far as SQLite's locks tell.
    """
    with closing(sqlite3.connect(catalog, timeout=1, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN EXCLUSIVE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StorageError(
                    f"another process uses the damaged catalog {catalog}: end it, then try again"
                ) from error
        except sqlite3.DatabaseError:
            return  # so damaged that nobody can use it


def _set_aside(catalog: Path) -> Path:
    """Gives a damaged catalog another name, with what belongs to it."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for number in range(1000):
        kept = catalog.with_name(f"{catalog.name}.before-{stamp}{f'-{number}' if number else ''}")
        with storage_errors(f"keep {catalog} as {kept}"):
            if kept.exists():
                continue
            for suffix in (*SIDECARS, ""):  # the file last: a crash in between can be repeated
                part = catalog.with_name(catalog.name + suffix)
                if part.exists():
                    part.rename(kept.with_name(kept.name + suffix))
        durable.sync_folder(catalog.parent)
        return kept
    raise StorageError(f"there are a thousand catalogs beside {catalog}; take some away")
