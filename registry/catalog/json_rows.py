"""Many values as one parameter: JSON that a statement reads as a table. SQLite has room for 32,766 parameters in a
statement and PostgreSQL for 65,535, and a temporary table could not be made in a catalog that is read-only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Select,
    Text,
    cast,
    column,
    func,
    literal,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB

from registry.catalog.rows import BATCH

Value = Callable[[int, Any], ColumnElement[Any]]
"""One place of a JSON array, as a type."""


def members(tree: Mapping[str, int], dialect: str) -> tuple[FromClause, ColumnElement[str], ColumnElement[int]]:
    """A JSON object as a table: its keys, and its values."""
    given = literal(json.dumps(tree, ensure_ascii=False), Text)
    if dialect == "postgresql":
        each = func.jsonb_each_text(cast(given, JSONB)).table_valued("key", "value", name="named")
        return each, each.c.key, cast(each.c.value, BigInteger)
    each = func.json_each(given).table_valued("key", "value", name="named")
    return each, each.c.key, each.c.value


def elements(rows: Sequence[Any], dialect: str) -> tuple[FromClause, ColumnElement[int], Value]:
    """A JSON array of arrays as a table: the place of each, from 0, and what stands in it."""
    given = literal(json.dumps(rows), Text)
    if dialect == "postgresql":
        of_json = func.jsonb_array_elements(cast(given, JSONB))
        each = of_json.table_valued(column("value", JSONB), with_ordinality="place", name="numbered").render_derived()

        def of_array(at: int, type_: Any) -> ColumnElement[Any]:
            return cast(each.c.value[at].astext, type_)

        return each, each.c.place - 1, of_array
    each = func.json_each(given).table_valued("key", "value", name="numbered")

    def of_text(at: int, type_: Any) -> ColumnElement[Any]:
        return func.json_extract(each.c.value, literal_column(f"'$[{at}]'"), type_=type_)

    return each, each.c.key, of_text


def listed(values: Sequence[int], dialect: str) -> Sequence[int] | Select[int]:
    """Numbers for an IN: as they are where there are few, of which the planner then knows how many."""
    if len(values) <= BATCH:
        return values
    each, _, value = elements([[one] for one in values], dialect)
    return select(value(0, BigInteger)).select_from(each)


def listed_pairs(pairs: Sequence[tuple[int, int]], dialect: str) -> Select[int, int]:
    """Pairs of numbers for an IN."""
    each, _, value = elements(pairs, dialect)
    return select(value(0, BigInteger), value(1, BigInteger)).select_from(each)
