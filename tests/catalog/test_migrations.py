"""The schema: what the revisions build is what the tables say, and a database of another revision is refused."""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, func, inspect, select, text

from benchmarks.synthetic_catalog import fill
from registry import Registry
from registry.catalog import schema, tables
from registry.catalog.engine import Database, open_database
from registry.core.errors import RegistryNotFound, SchemaOutOfDate
from registry.operations.discover import locate, upgrade_registry
from tests.catalog.fixtures import Catalogs

NEWEST = schema.HEAD
SECOND = '''"""second: rebuilds the table that most others refer to"""
import sqlalchemy as sa
from alembic import op
revision = "20991231_second"
down_revision = "{first}"
def upgrade():
    with op.batch_alter_table("version", recreate="auto") as batch:
        batch.add_column(sa.Column("note", sa.Text()))
        batch.create_check_constraint(op.f("ck_version_note"), "note <> ''")
    {then}
def downgrade():
    with op.batch_alter_table("version") as batch:
        batch.drop_constraint(op.f("ck_version_note"), type_="check")
        batch.drop_column("note")
'''


@pytest.fixture
def empty(kind: str, catalogs: Catalogs) -> Iterator[Database]:
    """A database without a schema."""
    database = open_database(catalogs.blank(kind))
    yield database
    database.close()


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A program with one more revision; gives that revision's file."""
    folder = Path(shutil.copytree(schema.migrations_path(), tmp_path / "migrations"))
    path = folder / "versions" / "20991231_second.py"
    path.write_text(SECOND.format(first=schema.HEAD, then="pass"))
    with monkeypatch.context() as patch:
        patch.setattr(schema, "migrations_path", lambda: folder)
        patch.setattr(schema, "HEAD", path.stem)
        yield path


def alembic(url: str) -> Config:
    """What `alembic -x registry=URL` reads."""
    config = Config(cmd_opts=Namespace(x=[f"registry={url}"]))
    config.set_main_option("script_location", str(schema.migrations_path()))
    return config


def described(connection: Connection) -> dict[str, Any]:
    """The schema as the database itself tells it, in no order that matters."""
    inspector = inspect(connection)
    found: dict[str, Any] = {}
    for table in sorted(set(inspector.get_table_names()) - {"alembic_version"}):
        found[table] = {
            "columns": {
                one["name"]: (str(one["type"]), one["nullable"], str(one["default"]).strip("()"), one.get("comment"))
                for one in inspector.get_columns(table)
            },
            "key": inspector.get_pk_constraint(table),
            "unique": sorted(inspector.get_unique_constraints(table), key=str),
            "checks": {one["name"]: " ".join(one["sqltext"].split()) for one in inspector.get_check_constraints(table)},
            "references": sorted(inspector.get_foreign_keys(table), key=str),
            "indexes": sorted(map(index_text, inspector.get_indexes(table))),
        }
    if connection.dialect.name == "sqlite":
        for name, sql in connection.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'table'")):
            if name in found:
                found[name]["rowid"] = not re.search(r"WITHOUT\s+ROWID", sql)
                found[name]["types"] = connection.execute(text(f"PRAGMA table_xinfo('{name}')")).all()
    else:
        columns = "SELECT table_name, column_name, data_type, collation_name FROM information_schema.columns"
        rows = connection.execute(text(f"{columns} WHERE table_schema = 'public' AND table_name <> 'alembic_version'"))
        found["types"] = sorted(map(tuple, rows))
    return found


def index_text(index: Any) -> str:
    options = {key: str(value) for key, value in index.pop("dialect_options", {}).items()}
    return str({**index, **options})


def test_the_newest_revision_is_alembics_head() -> None:
    scripts = ScriptDirectory(str(schema.migrations_path()))
    assert scripts.get_heads() == [schema.HEAD]
    assert {script.revision for script in scripts.walk_revisions()} == schema.known_revisions()


def test_revisions_build_what_the_tables_say(kind: str, database: Database, empty: Database) -> None:
    with empty.writing() as connection:
        tables.metadata.create_all(connection)
    with empty.reading() as connection:
        wanted = described(connection)
    with database.reading() as connection:
        found = described(connection)
    assert found == wanted
    assert {"version", "metadata", "event"} < set(found)
    assert kind != "sqlite" or not found["metric"]["rowid"]


def test_alembic_sees_no_difference(database: Database) -> None:
    command.check(alembic(url_of(database)))


@pytest.mark.parametrize(
    "change", ["DROP INDEX ix_version_base_id_id", "ALTER TABLE tag ADD COLUMN stray INTEGER", "DROP TABLE lease"]
)
def test_alembic_sees_a_difference(database: Database, change: str) -> None:
    with database.writing() as connection:
        connection.execute(text(change))
    with pytest.raises(CommandError, match="New upgrade operations"):
        command.check(alembic(url_of(database)))


def test_every_text_that_is_compared_sorts_by_code_point() -> None:
    """Else `--sort` and `<` would depend on the locale that a server was made with."""
    from registry.catalog.conditions import COLUMNS

    for field, column in COLUMNS.items():
        there = column.type.dialect_impl(postgresql_dialect())
        if isinstance(there.python_type, type) and there.python_type is str:
            assert getattr(there, "collation", None) == "C", field


def test_revisions_go_up_down_and_up_again_with_data(empty: Database) -> None:
    for _ in range(2):
        with empty.writing() as connection:
            schema.upgrade(connection)
            fill(connection, 60)
            assert connection.execute(select(func.count()).select_from(tables.version)).scalar_one() == 80
        empty.close()
        command.downgrade(alembic(url_of(empty)), "base")
        with empty.reading() as connection:
            assert inspect(connection).get_table_names() == ["alembic_version"]
            assert schema.revision(connection) is None


def test_an_older_database_is_refused_until_it_is_upgraded(registry_url: str, later: Path) -> None:
    with pytest.raises(SchemaOutOfDate, match=r"revision 20\d+_\w+, expected 20991231_second: run 'registry upgrade'"):
        Registry.open(registry_url)
    assert upgrade_registry(locate(registry_url)) == (NEWEST, "20991231_second")
    assert upgrade_registry(locate(registry_url)) == ("20991231_second", "20991231_second")
    Registry.open(registry_url).close()


def test_an_upgrade_rebuilds_a_table_that_others_refer_to(database: Database, later: Path) -> None:
    with database.writing() as connection:
        fill(connection, 60)
        before = counts(connection)
    with database.upgrading() as connection:
        schema.upgrade(connection)
    with database.reading() as connection:
        assert counts(connection) == before
        assert "note" in {one["name"] for one in inspect(connection).get_columns("version")}
        if connection.dialect.name == "sqlite":
            assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
    command.downgrade(alembic(url_of(database)), NEWEST)
    with database.reading() as connection:
        assert counts(connection) == before


def test_an_upgrade_that_fails_changes_nothing(registry_url: str, later: Path) -> None:
    later.write_text(SECOND.format(first=NEWEST, then="op.execute('SELECT no_such_column FROM version')"))
    with pytest.raises(Exception, match="no_such_column"):
        upgrade_registry(locate(registry_url))
    database = open_database(locate(registry_url).database)
    with database.reading() as connection:
        assert schema.revision(connection) == NEWEST
        assert "note" not in {one["name"] for one in inspect(connection).get_columns("version")}
    database.close()


@pytest.mark.parametrize("kind", ["sqlite"])
def test_an_upgrade_that_loses_a_row_that_others_need_is_refused(database: Database, later: Path) -> None:
    later.write_text(SECOND.format(first=NEWEST, then="op.execute('DELETE FROM layout')"))
    with database.writing() as connection:
        fill(connection, 60)
    with pytest.raises(CommandError, match="references to rows that are not there"), database.upgrading() as connection:
        schema.upgrade(connection)
    with database.reading() as connection:
        assert schema.revision(connection) == NEWEST
        assert counts(connection)["layout"] == 30


def test_two_upgrades_at_once_are_one(registry_url: str, later: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: upgrade_registry(locate(registry_url)), range(4)))
    assert {after for _, after in done} == {"20991231_second"}
    Registry.open(registry_url).close()


def test_a_newer_database_is_refused_by_every_way_in(registry_url: str) -> None:
    database = open_database(locate(registry_url).database)
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '20991231_future'"))
    database.close()
    for way_in in (Registry.open, lambda url: upgrade_registry(locate(url))):
        with pytest.raises(SchemaOutOfDate, match=r"20991231_future.*newer lora-registry; upgrade the program"):
            way_in(registry_url)


def test_a_database_without_a_schema_is_no_registry(empty: Database) -> None:
    with pytest.raises(RegistryNotFound, match="registry init"):
        empty.check()


def url_of(database: Database) -> str:
    url = database.engine.url
    if database.engine.dialect.name == "sqlite":
        return database.what
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def counts(connection: Connection) -> dict[str, int]:
    """Rows by table."""
    found = {}
    for table in tables.metadata.sorted_tables:
        found[table.name] = connection.execute(select(func.count()).select_from(table)).scalar_one()
    return found


def postgresql_dialect() -> Any:
    from sqlalchemy.dialects import postgresql

    return postgresql.dialect()
