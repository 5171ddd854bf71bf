"""From a question to version ids: patterns, tags, bases and `--where` conditions put together and sorted, in
statements that are fast without statistics (`benchmarks/catalog_queries.py` measures them)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Select, and_, func, select

from registry.catalog.conditions import (
    COLUMNS,
    SHARED,
    Clause,
    check_texts,
    clause_of,
    latest,
    matches,
    of_kind,
    on_base,
    tagged,
)
from registry.catalog.tables import artifact, metric, tag, version, version_metadata
from registry.core.query import Condition, SortKey
from registry.core.reference import LATEST

FEW = 1000
"""Below so many hits of a condition they are looked at before names are."""
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Search:
    """A question.

    Attributes:
        pattern: `namespace/name`, with `*` and `?`; without a `/` it is matched against both halves.
        base: a reference; `namespace/name` means any version of it.
        sort: either way, versions that lack the field and metrics that are not finite come last.
    """

    pattern: str | None = None
    base: str | None = None
    tag: str | None = None
    kind: str | None = None
    where: tuple[Condition, ...] = ()
    sort: SortKey | None = None
    limit: int | None = None


def find_ids(connection: Connection, search: Search, *more: Clause) -> list[int]:
    """Row ids of the present versions that satisfy all of the search, sorted.

    The default order is by name, newest version first.

    Args:
        more: conditions that no user writes.

    Raises:
        InvalidQuery: a value of the wrong type for its field.
        InvalidReference, NotFound: of a base.
    """
    if search.sort is not None:
        check_texts(search.sort.key)
    statement = _statement(connection, search, more)
    if search.sort is not None and search.sort.field == "metric":
        return _by_metric(connection, statement, search.sort, search.limit)
    return _ids(connection, _sorted(statement, search.sort), search.limit)


def _statement(connection: Connection, search: Search, more: Sequence[Clause]) -> Select[int]:
    """Present versions with their names that satisfy the search, in the form that is likely to be quick.

    Either hits are found by an index and then sorted, which takes as long as there are many; or versions are walked in
    order and asked one by one until there are enough, which takes as long as hits are rare. The two meet where hits are
    the root of the limit times all versions.
    """
    clauses = [*_clauses(connection, search), *more]
    asked = [clause.asked for clause in clauses]
    total: int = connection.execute(select(func.max(version.c.id))).scalar() or 1
    enough = math.isqrt(total * min(total, search.limit or 100))
    counts = [clause.count(connection, most=2 * enough + FEW) for clause in clauses]
    known = all(count is not None or clause.on_name for clause, count in zip(clauses, counts, strict=True))
    walked = search.limit is not None and known and _expected(total, counts) >= enough
    rare = {place: count for place, count in enumerate(counts) if count is not None and count < enough}
    if rare and not walked:
        first = min(rare, key=rare.__getitem__)
        listed = clauses[first].listed
        asked[first] = asked[first] if listed is None else listed
    artifact_id: ColumnElement[int] = artifact.c.id
    by_name = search.sort is None or search.sort.field == "name"
    few = any(count < FEW for count in rare.values())
    names_first = (walked and by_name) or (not few and any(clause.on_name for clause in clauses))
    if names_first and connection.dialect.name == "sqlite":
        # Without statistics SQLite would go through all versions and look up the name of each. The sum keeps it from
        # that, and so it begins with the names.
        artifact_id = artifact.c.id + 0
    named = select(version.c.id).join(artifact, artifact_id == version.c.artifact_id)
    return named.where(version.c.state == "present", *asked)


def _expected(total: int, counts: Sequence[int | None]) -> float:
    """Hits of all conditions together, as if one said nothing of another."""
    return total * math.prod(min(count / total, 1.0) for count in counts if count is not None)


def _clauses(connection: Connection, search: Search) -> list[Clause]:
    made = []
    if search.pattern is not None:
        made.append(matches(search.pattern, connection.dialect.name))
    if search.kind is not None:
        made.append(of_kind(search.kind))
    if search.tag is not None:
        made.append(latest() if search.tag == LATEST else tagged(tag.c.name == search.tag))
    if search.base is not None:
        made.append(on_base(connection, search.base))
    return [*made, *(clause_of(connection, condition) for condition in search.where)]


def _by_metric(connection: Connection, statement: Select[int], sort: SortKey, limit: int | None) -> list[int]:
    """First those that have a finite value, from its index and no more than are wanted; then the others by name."""
    finite = and_(metric.c.version_id == version.c.id, metric.c.key == sort.key, metric.c.kind == "finite")
    found = _ids(connection, _sorted(statement.join(metric, finite), sort), limit)
    left = None if limit is None else limit - len(found)
    if left != 0:
        without = statement.where(~select(metric.c.version_id).where(finite).correlate(version).exists())
        found += _ids(connection, _sorted(without, None), left)
    return found


def _ids(connection: Connection, statement: Select[int], limit: int | None) -> list[int]:
    if limit is not None:
        statement = statement.limit(min(limit, _MOST))
    return list(connection.execute(statement).scalars())


def _sorted(statement: Select[int], sort: SortKey | None) -> Select[int]:
    by_name = [artifact.c.namespace, artifact.c.name]
    keys: Sequence[ColumnElement[Any]] = ()
    if sort is None:
        pass
    elif sort.field == "name":
        keys, by_name = by_name, []
    elif sort.field == "metric":  # `_by_metric` has joined it
        keys = [metric.c.value]  # finite ones, none of them NULL
    elif sort.field == "meta":
        of_key = and_(version_metadata.c.version_id == version.c.id, version_metadata.c.key == sort.key)
        statement = statement.outerjoin(version_metadata, of_key)
        keys = [version_metadata.c.number_value, version_metadata.c.text_value]
    elif sort.field == "base":
        base, name = version.alias("base_version"), artifact.alias("base_artifact")
        statement = statement.outerjoin(base, base.c.id == version.c.base_id)
        statement = statement.outerjoin(name, name.c.id == base.c.artifact_id)
        keys = [name.c.namespace, name.c.name, base.c.number]
    else:
        keys = [COLUMNS[sort.field]]
        for table, reference in SHARED.items():
            if COLUMNS[sort.field].table is table:
                statement = statement.outerjoin(table, table.c.id == reference)
    descending = sort is not None and sort.descending
    ordered = [_direction(key, descending) for key in keys]
    return statement.order_by(*ordered, *by_name, version.c.number.desc())


def _direction(key: ColumnElement[Any], descending: bool) -> ColumnElement[Any]:
    ordered = key.desc() if descending else key.asc()
    if isinstance(key, Column) and (key is metric.c.value or (key.table in (artifact, version) and not key.nullable)):
        return ordered  # never NULL, and NULLS LAST would keep SQLite from an index that has the order
    return ordered.nulls_last()
