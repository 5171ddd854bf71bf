"""Small statements that several subjects share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, select

T = TypeVar("T")

BATCH = 400
"""Values in one IN list or rows in one INSERT: far below both databases' limits on parameters."""


def batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """The items in lists of at most `size`."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def insert_missing(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Inserts rows; one that clashes with a unique key that is there already is left as it is."""
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgresql_insert

        connection.execute(postgresql_insert(table).on_conflict_do_nothing(), list(rows))
    else:
        from sqlalchemy.dialects.sqlite import insert as sqlite_insert

        connection.execute(sqlite_insert(table).on_conflict_do_nothing(), list(rows))


def upsert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Inserts rows, or replaces the other columns of rows that have these keys already."""
    if not rows:
        return
    changed = [name for name in rows[0] if name not in keys]
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgresql_insert

        statement = postgresql_insert(table)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=list(keys), set_={name: statement.excluded[name] for name in changed}
            ),
            list(rows),
        )
    else:
        from sqlalchemy.dialects.sqlite import insert as sqlite_insert

        replacing = sqlite_insert(table)
        connection.execute(
            replacing.on_conflict_do_update(
                index_elements=list(keys), set_={name: replacing.excluded[name] for name in changed}
            ),
            list(rows),
        )


def ids_by_digest(connection: Connection, table: Table, digests: Iterable[str]) -> dict[str, int]:
    """Row ids of a table with `id` and `digest`, for those digests that are there."""
    found: dict[str, int] = {}
    for batch in batches(sorted(set(digests))):
        rows = connection.execute(select(table.c.digest, table.c.id).where(table.c.digest.in_(batch)))
        found.update((digest, identifier) for digest, identifier in rows)
    return found
