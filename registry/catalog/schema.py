"""Creating and upgrading the schema. alembic is imported only here and only when it is needed; whether
a database is of this program's revision is read in plain SQL."""

from __future__ import annotations

import threading
from pathlib import Path

from sqlalchemy import Connection, func, select, text

from registry.core.errors import RegistryNotFound, SchemaOutOfDate

HEAD = "20261129_model_forms"
"""The newest revision in `migrations/versions`; a test holds it against alembic's own answer."""

_UPGRADE_LOCK = 0x6C6F7262
_alembic = threading.Lock()
"""Alembic keeps the running environment in its modules, so a process runs one at a time."""


def migrations_path() -> Path:
    """The folder with alembic's environment: inside the installed package, else beside it (checkout, editable).

    Raises:
        SchemaOutOfDate: it is nowhere, so the installation is broken.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise SchemaOutOfDate(f"no migrations beside {package}: install lora-registry again")


def revision(connection: Connection) -> str | None:
    """The database's revision; None for a database without a schema of ours."""
    if connection.dialect.name == "sqlite":
        there = text("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'")
    else:
        there = text("SELECT to_regclass('alembic_version')")
    if connection.execute(there).scalar() is None:
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
    return str(found[0]) if found else None


def check_revision(connection: Connection, what: str) -> None:
    """
    Raises:
        RegistryNotFound: no schema of ours.
        SchemaOutOfDate: older (says `registry upgrade`) or newer (says to upgrade the program).
    """
    found = revision(connection)
    if found == HEAD:
        return
    if found is None:
        raise RegistryNotFound(f"{what} holds no registry; make one with 'registry init'")
    if found in known_revisions():
        raise SchemaOutOfDate(f"{what} has schema revision {found}, expected {HEAD}: run 'registry upgrade'")
    raise SchemaOutOfDate(
        f"{what} has schema revision {found}, which this program (revision {HEAD}) does not know: "
        "it was written by a newer lora-registry; upgrade the program"
    )


def known_revisions() -> set[str]:
    """Names of the revision files; each file is named by its revision."""
    return {path.stem for path in (migrations_path() / "versions").glob("*.py")}


def upgrade(connection: Connection, revision_to: str = "head") -> None:
    """Brings the schema to a revision (forward) inside the caller's transaction, which waits for others that do so.

    Raises:
        SchemaOutOfDate: the database is of a revision that this program does not know.
    """
    from alembic import command
    from alembic.config import Config

    if connection.dialect.name == "postgresql":  # on SQLite the writing transaction is lock enough
        connection.execute(select(func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
    found = revision(connection)
    if found is not None and found not in known_revisions():
        check_revision(connection, "the database")
    config = Config()
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.attributes["connection"] = connection
    with _alembic:
        command.upgrade(config, revision_to)
