"""Opening the catalog's database: URLs, pragmas, transactions, and errors of the drivers turned into
ours. SQLite: WAL, full sync, foreign keys, writers begin IMMEDIATE; a registry that cannot be written
is opened read-only. Engines survive threads and forks."""

from __future__ import annotations

import os
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool, QueuePool

from registry.catalog.schema import check_revision
from registry.core.errors import (
    Corrupt,
    InvalidInput,
    NoSpace,
    ReadOnly,
    RegistryError,
    RegistryNotFound,
    StorageError,
    StoreUnreachable,
)

BUSY_SECONDS = 120.0
"""How long a SQLite writer waits for the others; each transaction takes milliseconds."""

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _forget_connections() -> None:
    for engine in list(_engines):
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_connections)


class Database:
    """A catalog's database: `reading()` and `writing()` give connections in a transaction.

    Attributes:
        what: how errors name it; never holds a password.
    """

    def __init__(self, engine: Engine, what: str) -> None:
        self.engine = engine
        self.what = what
        _engines.add(engine)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One snapshot for all statements within."""
        with translated(self.what), self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that may write; commits at the end, rolls back on an exception."""
        with translated(self.what), self.engine.connect() as plain:
            connection = plain.execution_options(registry_writes=True)
            with connection.begin():
                yield connection

    def check(self) -> None:
        """
        Raises:
            RegistryNotFound, SchemaOutOfDate, StoreUnreachable
        """
        with self.reading() as connection:
            check_revision(connection, self.what)

    def close(self) -> None:
        self.engine.dispose()


def open_database(url: str) -> Database:
    """Opens a database, without making one.

    Args:
        url: the path of a SQLite file, or `postgresql://...`.

    Raises:
        RegistryNotFound: the file does not exist.
        InvalidInput: another kind of URL, or the driver is not installed.
    """
    if "://" not in url:
        path = Path(url)
        if not path.is_file():
            raise RegistryNotFound(f"no registry at {path.parent}; make one with 'registry init {path.parent}'")
        return Database(sqlite_engine(path), str(path))
    return Database(postgresql_engine(url), shown_url(url))


def shown_url(url: str) -> str:
    """The URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url.partition("://")[0] + "://..."


def postgresql_engine(url: str) -> Engine:
    """
    Raises:
        InvalidInput: not a postgresql:// URL, or psycopg is missing.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise InvalidInput(f"not a database URL: {shown_url(url)}") from error
    if parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise InvalidInput(
            f"a registry is a path or a postgresql:// URL, not {parsed.drivername}:// (other servers come later)"
        )
    try:
        return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    except (ImportError, NoSuchModuleError) as error:
        raise InvalidInput("postgresql:// needs psycopg: pip install 'lora-registry[postgresql]'") from error


def sqlite_engine(path: Path) -> Engine:
    """An engine on a SQLite file, read-only where the file or its folder cannot be written."""
    writable = sqlite_writable(path)

    def connect() -> sqlite3.Connection:
        # Decided at each connect: a folder that another user writes has a WAL only while they do.
        uri = f"file:{quote(str(path.absolute()))}"
        if not writable:
            uri += "?mode=ro" if _has_wal(path) else "?mode=ro&immutable=1"
        else:
            uri += "?mode=rw"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA trusted_schema = OFF")
        if writable:
            connection.execute("PRAGMA synchronous = FULL")
        else:
            connection.execute("PRAGMA query_only = ON")
        return connection

    pool: dict[str, Any] = {"poolclass": QueuePool, "max_overflow": 60} if writable else {"poolclass": NullPool}
    engine = create_engine("sqlite://", creator=connect, **pool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if connection.get_execution_options().get("registry_writes"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.exec_driver_sql("BEGIN")

    return engine


def sqlite_writable(path: Path) -> bool:
    """Whether this process may write the database; a file that is still to be made counts by its folder."""
    return os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))


def _has_wal(path: Path) -> bool:
    wal = path.with_name(path.name + "-wal")
    return wal.exists() and wal.stat().st_size > 0


def create_sqlite(path: Path) -> None:
    """Makes an empty database file in WAL mode, which then stays in the file."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns errors of the database drivers into ours, with the driver's words and the mend."""
    try:
        yield
    except DBAPIError as error:
        raise _translate(error, what) from error
    except sqlite3.Error as error:
        raise _translate_sqlite(error, what) from error


def _translate(error: DBAPIError, what: str) -> Exception:
    original = error.orig
    if isinstance(original, sqlite3.Error):
        return _translate_sqlite(original, what)
    state = getattr(original, "sqlstate", None) or ""
    words = str(original).strip().splitlines()[0] if str(original).strip() else type(original).__name__
    if state.startswith("53"):
        return NoSpace(f"{what}: {words}")
    if state in ("25006", "42501"):
        return ReadOnly(f"{what}: {words}")
    if error.connection_invalidated or state.startswith(("08", "57P", "28", "3D")) or not state:
        return StoreUnreachable(f"cannot reach {what}: {words}")
    return error


def _translate_sqlite(error: sqlite3.Error, what: str) -> Exception:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    table: dict[int, tuple[type[RegistryError], str]] = {
        sqlite3.SQLITE_FULL: (NoSpace, "the disk is full; nothing of this operation is visible"),
        sqlite3.SQLITE_READONLY: (ReadOnly, "the registry cannot be written by this user"),
        sqlite3.SQLITE_PERM: (ReadOnly, "the registry cannot be written by this user"),
        sqlite3.SQLITE_BUSY: (StorageError, f"other writers kept it locked for {BUSY_SECONDS:.0f} s; try again"),
        sqlite3.SQLITE_CANTOPEN: (StoreUnreachable, "the database file cannot be opened"),
        sqlite3.SQLITE_IOERR: (StorageError, "input or output error"),
        sqlite3.SQLITE_CORRUPT: (Corrupt, "the database file is damaged"),
        sqlite3.SQLITE_NOTADB: (Corrupt, "the file is not a SQLite database"),
    }
    if code in table:
        kind, mend = table[code]
        return kind(f"{what}: {error}: {mend}")
    return error
