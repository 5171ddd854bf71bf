"""Opening the catalog's database: URLs, pragmas, transactions, and errors of the drivers turned into
ours. SQLite: WAL, full sync, foreign keys, writers begin IMMEDIATE; a registry that cannot be written
is opened read-only. Engines survive threads and forks."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool, QueuePool

from registry.catalog.schema import check_revision
from registry.core.errors import (
    Contended,
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

BUSY_TURN_MILLISECONDS = 200

CONNECT_SECONDS = 10
"""How long a server may take to answer, where the URL does not say (`?connect_timeout=`)."""

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class _ForkGate:
    """Keeps forks and SQLite transactions apart.

    SQLite counts a process's locks in memory that a fork copies: with a connection open at the fork, the child's own
    connections would take no locks of the file any more, and the parent's last close would unlink the WAL that the
    child still writes to. So a fork waits for the transactions of other threads and closes the idle connections.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: Counter[int] = Counter()  # open transactions by thread
        self._forking = 0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: not self._forking or self._busy[me])
            self._busy[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy[me] -= 1
                if self._busy[me] <= 0:
                    del self._busy[me]
                self._changed.notify_all()

    def before(self) -> None:
        me = threading.get_ident()
        self._changed.acquire()
        self._forking += 1
        self._changed.wait_for(lambda: set(self._busy) <= {me})
        for engine in list(_engines):
            if engine.dialect.name == "sqlite":
                engine.dispose()

    def in_parent(self) -> None:
        self._forking -= 1
        self._changed.notify_all()
        self._changed.release()

    def in_child(self) -> None:
        # The other threads are not here, and what they held of the lock must not be either.
        self._changed, self._busy, self._forking = threading.Condition(), Counter(), 0
        for engine in list(_engines):
            engine.dispose(close=False)


_gate = _ForkGate()
os.register_at_fork(before=_gate.before, after_in_parent=_gate.in_parent, after_in_child=_gate.in_child)


class Database:
    """A catalog's database: `reading()` and `writing()` give connections in a transaction.

    Attributes:
        what: how errors name it; never holds a password.
        writable: False for a SQLite file that this user cannot write; a server tells only when asked.
    """

    def __init__(self, engine: Engine, what: str, *, writable: bool = True) -> None:
        self.engine = engine
        self.what = what
        self.writable = writable
        _engines.add(engine)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One snapshot for all statements within."""
        steady = nullcontext() if self.writable else _steady(Path(self.what))
        with steady, translated(self.what), self._transaction(), self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that may write; commits at the end, rolls back on an exception."""
        with translated(self.what), self._transaction(), self.engine.connect() as plain:
            connection = plain.execution_options(registry_writes=True)
            with connection.begin():
                yield connection

    @contextmanager
    def upgrading(self) -> Iterator[Connection]:
        """A transaction that may change the schema.

        A revision rebuilds a table of SQLite by dropping the old one, which must not count as deleting what others
        refer to: foreign keys are off in it, and the revisions' environment checks them before each commit.
        """
        with translated(self.what), self._transaction(), self.engine.connect() as plain:
            connection = plain.execution_options(registry_writes=True)
            sqlite = connection.dialect.name == "sqlite"
            if sqlite:  # on the driver's connection: within a transaction SQLite ignores it
                connection.connection.cursor().execute("PRAGMA foreign_keys = OFF")
            try:
                with connection.begin():
                    yield connection
            finally:
                if sqlite:
                    connection.connection.cursor().execute("PRAGMA foreign_keys = ON")

    def _transaction(self) -> AbstractContextManager[None]:
        return _gate.transaction() if self.engine.dialect.name == "sqlite" else nullcontext()

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
        StorageError: a folder on the way cannot be entered.
    """
    if "://" not in url:
        path = Path(url)
        try:
            found = path.is_file()
        except OSError as error:
            raise StorageError(error.errno, f"cannot look for a registry at {path.parent}: {error.strerror}") from error
        if not found:
            raise RegistryNotFound(f"no registry at {path.parent}; make one with 'registry init {path.parent}'")
        return Database(sqlite_engine(path), str(path), writable=sqlite_writable(path))
    return Database(postgresql_engine(url), shown_url(url))


def shown_url(url: str) -> str:
    """The URL without its password, wherever libpq would take one."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return url.partition("://")[0] + "://..."
    if "@" in (parsed.host or ""):  # of a password with a plain @ only the first half would be hidden
        return f"{parsed.drivername}://..."
    secret = [key for key in parsed.query if "pass" in key.lower()]
    return parsed.difference_update_query(secret).render_as_string(hide_password=True)


def postgresql_engine(url: str) -> Engine:
    """
    Raises:
        InvalidInput: not a postgresql:// URL, or psycopg is missing.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise InvalidInput(f"not a database URL: {shown_url(url)}") from error
    if "@" in (parsed.host or ""):
        raise InvalidInput(f"not a database URL: {shown_url(url)}; write '@' in a password as %40")
    if parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise InvalidInput(
            f"a registry is a path or a postgresql:// URL, not {parsed.drivername}:// (other servers come later)"
        )
    try:
        waiting = {} if "connect_timeout" in parsed.query else {"connect_timeout": CONNECT_SECONDS}
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            # Whatever the server's default is: who waited for a lock has to see what was committed meanwhile.
            isolation_level="READ COMMITTED",
            pool_pre_ping=True,
            connect_args=waiting,
        )
    except (ImportError, NoSuchModuleError) as error:
        raise InvalidInput("postgresql:// needs psycopg: pip install 'lora-registry[postgresql]'") from error


def sqlite_engine(path: Path) -> Engine:
    """An engine on a SQLite file, read-only where the file or its folder cannot be written."""
    writable = sqlite_writable(path)

    def connect() -> sqlite3.Connection:
        # Decided at each connect: a folder that another user writes has a WAL only while they do.
        uri = f"file:{quote(str(path.absolute()))}"
        if not writable:
            uri += "?mode=ro" if _in_use(path) else "?mode=ro&immutable=1"
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
            _begin_writing(connection)
        else:
            connection.exec_driver_sql("BEGIN")

    @event.listens_for(engine, "invalidate")
    def _release(driver_connection: Any, *_: object) -> None:
        # After a Ctrl-C within a query the connection is closed with a cursor open that the traceback keeps alive (in a
        # notebook for hours), and SQLite would keep the transaction and its locks until then.
        with suppress(sqlite3.Error):
            driver_connection.rollback()

    return engine


def _begin_writing(connection: Connection) -> None:
    """Waits for the other writers in short turns: within SQLite's own wait Python hears no Ctrl-C."""
    driver: Any = connection.connection.driver_connection
    deadline = time.monotonic() + BUSY_SECONDS
    driver.execute(f"PRAGMA busy_timeout = {BUSY_TURN_MILLISECONDS}")
    try:
        while not driver.in_transaction:
            try:
                driver.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
    finally:
        driver.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")


def sqlite_writable(path: Path) -> bool:
    """Whether this process may write the database; a file that is still to be made counts by its folder."""
    return os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))


def _in_use(path: Path) -> bool:
    """Whether another process has the database open, or crashed with it open. An empty WAL counts: it will fill."""
    return any(path.with_name(path.name + suffix).exists() for suffix in ("-wal", "-shm"))


@contextmanager
def _steady(path: Path) -> Iterator[None]:
    """Around a read without locks (`immutable`), which a writer that comes in the middle can spoil.

    Raises:
        StorageError: one came.
    """
    if _in_use(path):  # then there are locks
        yield
        return
    before = _stamp(path)
    try:
        yield
    finally:
        if _stamp(path) != before:
            raise StorageError(f"{path} was written while it was read; try again")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:  # the read itself says what is wrong
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def create_sqlite(path: Path) -> None:
    """Makes an empty database file in WAL mode, which then stays in the file.

    Raises:
        NoSpace, ReadOnly, StorageError
    """
    with translated(str(path)), closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns errors of the database drivers into ours, with the driver's words and the mend.

    What is left as it was (a broken constraint, wrong SQL) is a bug.
    """
    try:
        yield
    except DBAPIError as error:
        known = _known_sqlite if isinstance(error.orig, sqlite3.Error) else _known_postgresql
        if (ours := known(error.orig, error.connection_invalidated, what)) is None:
            raise
        raise ours from error
    except sqlite3.Error as error:
        if (ours := _known_sqlite(error, False, what)) is None:
            raise
        raise ours from error
    except PoolTimeout as error:
        raise StorageError(f"{what}: too many threads of this process use it at once; try again") from error


def _known_postgresql(error: BaseException | None, lost: bool, what: str) -> RegistryError | None:
    state = getattr(error, "sqlstate", None) or ""
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    if state == "53100":
        return NoSpace(f"{what}: {words}")
    if state in ("25006", "42501"):
        return ReadOnly(f"{what}: {words}")
    if state in ("40001", "40P01"):
        return Contended(f"{what}: {words}: another writer was in the way; try again")
    if state.startswith(("XX001", "XX002")):
        return Corrupt(f"{what}: {words}")
    if state.startswith("54"):
        return InvalidInput(f"{what}: a text is too long for this server: {words}")
    if lost or state.startswith(("08", "57P", "28", "3D", "53")):
        return StoreUnreachable(f"cannot reach {what}: {words}")
    if state.startswith("58"):
        return StorageError(f"{what}: {words}")
    if not state and type(error).__name__ in ("OperationalError", "InterfaceError"):  # libpq's own, such as "refused"
        return StoreUnreachable(f"cannot reach {what}: {words}")
    if not state and "invalid connection option" in words:
        return InvalidInput(f"{what}: {words}")
    return None


def _known_sqlite(error: BaseException | None, lost: bool, what: str) -> RegistryError | None:
    extended = getattr(error, "sqlite_errorcode", 0)
    # Before it can read even, SQLite has to make the index of the WAL.
    code = sqlite3.SQLITE_FULL if extended == sqlite3.SQLITE_IOERR_SHMSIZE else extended & 0xFF
    table: dict[int, tuple[type[RegistryError], str]] = {
        sqlite3.SQLITE_FULL: (NoSpace, "the disk is full; free space there"),
        sqlite3.SQLITE_READONLY: (ReadOnly, "the registry cannot be written by this user"),
        sqlite3.SQLITE_PERM: (ReadOnly, "the registry cannot be written by this user"),
        sqlite3.SQLITE_BUSY: (StorageError, f"other writers kept it locked for {BUSY_SECONDS:.0f} s; try again"),
        sqlite3.SQLITE_PROTOCOL: (StorageError, "other processes kept it locked; try again"),
        sqlite3.SQLITE_CANTOPEN: (StoreUnreachable, "the database file cannot be opened"),
        sqlite3.SQLITE_IOERR: (StorageError, "input or output error"),
        sqlite3.SQLITE_CORRUPT: (Corrupt, "the database file is damaged; 'registry reindex' makes it again"),
        sqlite3.SQLITE_NOTADB: (Corrupt, "the file is not a SQLite database; 'registry reindex' makes it again"),
    }
    if code not in table:
        return None
    kind, mend = table[code]
    return kind(f"{what}: {error}: {mend}")
