"""Catalogs to test on: a schema is built once for each database, and every test gets a copy of it. Used by
`tests/catalog` and `tests/properties`, whose conftest files import the fixtures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import insert
from sqlalchemy.engine import make_url

from registry import Registry
from registry.catalog import schema
from registry.catalog.engine import Database, create_sqlite, open_database
from registry.catalog.tables import registry_meta
from registry.store import create_store

KINDS = ("sqlite", "postgresql")


class Catalogs:
    """Makes databases with the schema in them; PostgreSQL's are dropped at the end of the session."""

    def __init__(self, folder: Path, server: str) -> None:
        self._folder = folder
        self._server = make_url(server).set(drivername="postgresql")
        self._templates: dict[str, str] = {}
        self._made: list[str] = []

    def database(self, kind: str) -> str:
        """The path or URL of a fresh database."""
        if kind not in self._templates:
            self._templates[kind] = self._template(kind)
        if kind == "sqlite":
            path = self._folder / f"{uuid4().hex}.sqlite"
            shutil.copy(self._templates[kind], path)
            return str(path)
        return self._create(f"TEMPLATE {self._templates[kind].rpartition('/')[2].partition('?')[0]}")

    def blank(self, kind: str) -> str:
        """The same without a schema."""
        if kind == "postgresql":
            return self._create()
        path = self._folder / f"{uuid4().hex}.sqlite"
        create_sqlite(path)
        return str(path)

    def registry(self, kind: str, folder: Path) -> str:
        """What `Registry.open` takes, of a fresh registry whose blobs are in `folder`."""
        made = self.database(kind)
        folder.mkdir(exist_ok=True)
        store = create_store(folder, uuid4().hex)
        if kind == "sqlite":
            made = str(shutil.move(made, folder / "catalog.sqlite"))
        database = open_database(made)
        with database.writing() as connection:
            url = None if kind == "sqlite" else str(folder)
            row = {
                "one": 1,
                "registry_id": store.registry_id,
                "store_format": 1,
                "store_url": url,
            }
            connection.execute(insert(registry_meta).values(**row, created_at=datetime.now(UTC)))
        database.close()
        return str(folder) if kind == "sqlite" else made

    def _template(self, kind: str) -> str:
        made = self.blank(kind)
        database = open_database(made)
        with database.writing() as connection:
            schema.upgrade(connection)
        database.close()
        return made

    def _create(self, how: str = "") -> str:
        name = f"registry_test_{uuid4().hex}"
        with self._admin() as admin:
            admin.execute(f"CREATE DATABASE {name} {how}")
        self._made.append(name)
        return self._server.set(database=name).render_as_string(hide_password=False)

    def drop(self) -> None:
        if not os.environ.get("DATABASE_URL"):
            return  # the server itself goes
        with self._admin() as admin:
            for name in self._made:
                admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _admin(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self._server.render_as_string(hide_password=False), autocommit=True)


@pytest.fixture(scope="session")
def catalogs(tmp_path_factory: pytest.TempPathFactory, postgresql_server: str) -> Iterator[Catalogs]:
    made = Catalogs(tmp_path_factory.mktemp("catalogs"), postgresql_server)
    yield made
    made.drop()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each test that uses it, also by one of the fixtures below, runs on both databases."""
    return str(request.param)


@pytest.fixture
def database(kind: str, catalogs: Catalogs) -> Iterator[Database]:
    """A database with the schema and no rows."""
    made = open_database(catalogs.database(kind))
    yield made
    made.close()


@pytest.fixture
def registry_url(kind: str, catalogs: Catalogs, tmp_path: Path) -> str:
    """A registry with nothing in it."""
    return catalogs.registry(kind, tmp_path / "registry")


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    with Registry.open(registry_url) as opened:
        yield opened
