"""From a question to version ids: patterns, tags, bases and `--where` conditions put together and sorted, in
statements that are fast without statistics (`benchmarks/catalog_queries.py` measures them)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Select, and_, select

from registry.catalog.conditions import (
    COLUMNS,
    Named,
    Said,
    check_texts,
    condition_sql,
    has_tag,
    is_latest,
    matches,
    on_base,
)
from registry.catalog.tables import artifact, layout, lora_config, metric, tag, version, version_metadata
from registry.core.query import Condition, SortKey
from registry.core.reference import LATEST

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


def find_ids(connection: Connection, search: Search) -> list[int]:
    """Row ids of the present versions that satisfy all of the search, sorted.

    The default order is by name, newest version first.

    Raises:
        InvalidQuery: a value of the wrong type for its field.
        InvalidReference, NotFound: of a base.
    """
    if search.sort is not None:
        check_texts(search.sort.key)
    if search.sort is not None and search.sort.field == "metric":
        return _by_metric(connection, search, search.sort)
    return _ids(connection, search, _statement(connection, search))


def _ids(connection: Connection, search: Search, statement: Select[int]) -> list[int]:
    statement = _sorted(statement, search.sort)
    if search.limit is not None:
        statement = statement.limit(min(search.limit, _MOST))
    return list(connection.execute(statement).scalars())


def _by_metric(connection: Connection, search: Search, sort: SortKey) -> list[int]:
    """First those that have a finite value, from its index and no more than are wanted; then the others by name."""
    statement = _statement(connection, search)
    finite = and_(metric.c.version_id == version.c.id, metric.c.key == sort.key, metric.c.kind == "finite")
    found = _ids(connection, search, statement.join(metric, finite))
    left = None if search.limit is None else search.limit - len(found)
    if left != 0:
        without = statement.where(~select(metric.c.version_id).where(finite).correlate(version).exists())
        found += _ids(connection, replace(search, sort=None, limit=left), without)
    return found


def _statement(connection: Connection, search: Search) -> Select[int]:
    plain, named, said = _conditions(connection, search)
    rare = [condition.is_rare(connection) for condition in said]
    asked = [one.as_list() if few else one.asked_each() for one, few in zip(said, rare, strict=True)]
    artifact_id: ColumnElement[int] = artifact.c.id
    if connection.dialect.name == "sqlite" and not any(rare):
        by_name = search.limit is not None and (search.sort is None or search.sort.field == "name")
        if named or (by_name and not plain and len(said) <= 1):
            # Names first. They are few where a condition is on them; and where most versions satisfy what is asked,
            # they are walked in their order until there are enough. Without the sum SQLite, which has no statistics,
            # goes through all versions, looks up the name of each and sorts them.
            artifact_id = artifact.c.id + 0
    return (
        select(version.c.id)
        .join(artifact, artifact_id == version.c.artifact_id)
        .outerjoin(lora_config, lora_config.c.id == version.c.lora_config_id)
        .outerjoin(layout, layout.c.id == version.c.layout_id)
        .where(version.c.state == "present", *plain, *named, *asked)
    )


def _conditions(
    connection: Connection, search: Search
) -> tuple[list[ColumnElement[bool]], list[ColumnElement[bool]], list[Said]]:
    """Conditions on a version's own columns, on its name, and on what was said of it."""
    made: list[ColumnElement[bool] | Said | Named] = []
    if search.pattern is not None:
        made.append(matches(search.pattern, connection.dialect.name))
    if search.kind is not None:
        made.append(version.c.kind == search.kind)
    if search.tag is not None:
        made.append(Named(is_latest()) if search.tag == LATEST else has_tag(tag.c.name == search.tag))
    if search.base is not None:
        made.append(on_base(connection, search.base))
    made += [condition_sql(connection, condition) for condition in search.where]
    return (
        [one for one in made if not isinstance(one, Said | Named)],
        [one.matching for one in made if isinstance(one, Named)],
        [one for one in made if isinstance(one, Said)],
    )


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
    descending = sort is not None and sort.descending
    ordered = [_direction(key, descending) for key in keys]
    return statement.order_by(*ordered, *by_name, version.c.number.desc())


def _direction(key: ColumnElement[Any], descending: bool) -> ColumnElement[Any]:
    ordered = key.desc() if descending else key.asc()
    # Only where there may be none: NULLS LAST keeps SQLite from an index that has the order.
    always = isinstance(key, Column) and (
        key is metric.c.value or (key.table in (artifact, version) and not key.nullable)
    )
    return ordered if always else ordered.nulls_last()
