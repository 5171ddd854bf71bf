"""Alembic's environment. `registry.catalog.schema.upgrade` runs it on a connection of its own and in its
own transaction; the `alembic` command runs it on the database named by `-x registry=PATH_OR_URL`, one
transaction a revision.

On the command line `alembic check` and `revision --autogenerate` also compare what alembic leaves out:
the text of CHECK constraints, and WITHOUT ROWID (both on SQLite; PostgreSQL rewrites expressions, so
there only the names of CHECKs are compared).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from alembic import context
from alembic.operations import ops
from alembic.util import CommandError
from sqlalchemy import CheckConstraint, Connection, Engine, Table, TypeDecorator

from registry.catalog.tables import metadata
from registry.core.errors import RegistryError

REVISION_LENGTH = 32
"""Alembic's column for the revision is a VARCHAR(32), and PostgreSQL means it."""


def run(connection: Connection, **options: Any) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=True,  # SQLite can alter a table only so; PostgreSQL does not mind
        render_item=render_plainly,
        compare_type=True,
        compare_server_default=True,
        transactional_ddl=True,  # also on SQLite: the registry's engine says BEGIN itself
        transaction_per_migration=True,
        on_version_apply=refuse_broken_references,
        **options,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_command_line() -> None:
    if context.is_offline_mode():
        raise CommandError("--sql is not supported: SQLite's revisions read the tables that they rebuild")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("alembic.runtime.migration").setLevel(logging.INFO)
    engine = named_engine()
    try:
        with engine.connect().execution_options(registry_writes=True) as connection:
            if connection.dialect.name == "sqlite":
                # A rebuilt table is dropped under its old name, which must not delete what refers to it.
                # Only the driver's connection is outside of a transaction, where SQLite obeys.
                connection.connection.cursor().execute("PRAGMA foreign_keys = OFF")
            run(connection, process_revision_directives=name_revision, autogenerate_plugins=comparisons())
    finally:
        engine.dispose()


def render_plainly(kind: str, item: object, _autogen: object) -> str | Literal[False]:
    """Our column types as what they are in the database: a revision must not change when they do."""
    if kind == "type" and isinstance(item, TypeDecorator):
        return f"sa.{item.impl_instance!r}"
    return False


def named_engine() -> Engine:
    """The engine that the registry itself uses, on the database that the command line names."""
    from registry.catalog.engine import create_sqlite, postgresql_engine, sqlite_engine

    named = context.get_x_argument(as_dictionary=True).get("registry")
    named = named or context.config.get_main_option("sqlalchemy.url")
    if not named:
        raise CommandError("which database? alembic -x registry=PATH_OR_URL ... (a SQLite file or postgresql://...)")
    named = named.removeprefix("sqlite:///")
    if "://" in named:
        try:
            return postgresql_engine(named)
        except RegistryError as error:
            raise CommandError(str(error)) from error
    path = Path(named)
    if path.is_dir():
        raise CommandError(f"{path} is a folder: name the SQLite file")
    if not path.exists():
        create_sqlite(path)
    return sqlite_engine(path)


def refuse_broken_references(ctx: Any, step: Any, **_: Any) -> None:
    """Runs in a revision's transaction, which this error rolls back. PostgreSQL looks after itself."""
    if ctx.dialect.name == "sqlite":
        broken = ctx.connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(5)
        if broken:
            rows = ", ".join(f"{table} to {parent}" for table, _rowid, parent, _key in broken)
            raise CommandError(f"{step} leaves references to rows that are not there: {rows}")


def name_revision(_context: object, _revision: object, directives: list[ops.MigrationScript]) -> None:
    """Makes a new revision's id the day and the message: 20261123_first."""
    for script in directives:
        if not script.message:  # `alembic check` writes none
            continue
        slug = re.sub(r"[^a-z0-9]+", "_", script.message.lower()).strip("_")
        name = f"{datetime.now(UTC):%Y%m%d}_{slug}"
        if len(name) > REVISION_LENGTH:
            raise CommandError(f"{name!r} has {len(name)} letters, {REVISION_LENGTH} are room for: a shorter message")
        script.rev_id = name


def comparisons() -> list[str]:
    """Alembic's comparisons, CHECKs by name, and ours."""
    # In the function: `registry upgrade` must not need the alembic that has plug-ins (1.19.2).
    from alembic.runtime.plugins import Plugin, _all_plugins

    if "registry.sqlite" not in _all_plugins:  # this file may be executed more than once in a process
        plugin = Plugin("registry.sqlite")
        plugin.add_autogenerate_comparator(compare_checks, "table", "registry_checks", qualifier="sqlite")
        plugin.add_autogenerate_comparator(compare_rowid, "table", "registry_rowid", qualifier="sqlite")
    return ["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname", "registry.sqlite"]


def compare_checks(
    autogen: Any, changes: ops.ModifyTableOps, schema: str | None, name: str, found: Table | None, wanted: Table | None
) -> Any:
    """CHECKs of one name whose conditions differ: drop the old, add the new."""
    from alembic.util import PriorityDispatchResult

    if found is not None and wanted is not None:
        stands = {check["name"]: check["sqltext"] for check in autogen.inspector.get_check_constraints(name)}
        for check in checks(wanted):
            condition = str(check.sqltext.compile(dialect=autogen.dialect, compile_kwargs={"literal_binds": True}))
            if check.name in stands and words(stands[check.name]) != words(condition):
                old = CheckConstraint(stands[check.name], name=check.name, table=found)
                changes.ops += [ops.DropConstraintOp.from_constraint(old), ops.AddConstraintOp.from_constraint(check)]
    return PriorityDispatchResult.CONTINUE


def compare_rowid(
    autogen: Any, changes: ops.ModifyTableOps, schema: str | None, name: str, found: Table | None, wanted: Table | None
) -> Any:
    """WITHOUT ROWID, which a rebuilt table loses without a word. Alembic has no operation for it: an error."""
    from alembic.util import PriorityDispatchResult

    if found is not None and wanted is not None:
        statement = autogen.connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = ?", (name,))
        has_rowid = not re.search(r"\)\s*WITHOUT\s+ROWID\s*$", statement.scalar_one(), re.IGNORECASE)
        if has_rowid != wanted.dialect_options["sqlite"]["with_rowid"]:
            raise CommandError(
                f"table {name} {'has a rowid' if has_rowid else 'is WITHOUT ROWID'}, the models say the opposite: "
                "in its revision, op.batch_alter_table(..., recreate='always', table_kwargs={'sqlite_with_rowid': ...})"
            )
    return PriorityDispatchResult.CONTINUE


def checks(table: Table) -> Iterable[CheckConstraint]:
    named = [each for each in table.constraints if isinstance(each, CheckConstraint) and each.name is not None]
    return sorted(named, key=lambda each: str(each.name))


def words(condition: str) -> str:
    return " ".join(condition.split())


connection = context.config.attributes.get("connection")
if connection is not None:
    run(connection)
else:
    run_command_line()
