"""All that a catalog says, without row ids: rows by what they are about, so that two catalogs of one registry can be
held against each other, whatever database each is in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, select

from registry.catalog import tables
from registry.core.digest import index_prefix, unpack_digests

Key = tuple[Any, ...]
Row = dict[str, Any]
Rows = dict[Key, Row]
Dump = dict[str, Rows]
"""Rows by table and key. References to rows are `namespace/name`, `namespace/name@number` or a digest."""

LEFT_OUT = frozenset({"lease", "outbox", "tensor_index"})
"""Who is at work and what is still to be written are no part of a state; the index has a function of its own."""

LEFT_OUT_COLUMNS: Mapping[str, frozenset[str]] = {"registry_meta": frozenset({"created_at", "store_url"})}
"""When the catalog was made is nowhere else, and a store that was moved is the same store."""

_NATURAL: Mapping[str, tuple[str, ...]] = {
    "artifact": ("namespace", "name"),
    "layout": ("digest",),
    "architecture": ("digest",),
    "lora_config": ("digest",),
    "blob": ("digest",),
    "version": ("artifact_id", "number"),
}
_REFERENCES = {
    "artifact_id": "artifact",
    "version_id": "version",
    "base_id": "version",
    "child_id": "version",
    "parent_id": "version",
    "blob_id": "blob",
    "layout_id": "layout",
    "lora_config_id": "lora_config",
    "architecture_id": "architecture",
}


@dataclass(frozen=True)
class Difference:
    """One place in which two catalogs differ.

    Attributes:
        key: of the row, as in a dump.
        column: None where the whole row is in one of them only.
        expected, found: None where the row is not there.
    """

    table: str
    key: Key
    column: str | None
    expected: Any
    found: Any


def dump(connection: Connection) -> Dump:
    """Every row of every table but those of `LEFT_OUT`, from the caller's snapshot."""
    names = _names(connection)
    return {
        table.name: dict(_rows(connection, table, names))
        for table in tables.metadata.sorted_tables
        if table.name not in LEFT_OUT
    }


def differences(expected: Dump, found: Dump) -> Iterator[Difference]:
    """Where two dumps differ, in the order of the tables and of what they are about.

    A version whose form one of the two does not know (an older catalog's, or a document that cannot be read here) does
    not differ by that; and of forms only those are compared that both have: an older one of a version may stay.
    """
    forms = {key[0] for key in expected["architecture"].keys() & found["architecture"].keys()}
    for table, rows in expected.items():
        others = found[table]
        if table in ("architecture", "module"):
            rows, others = ({key: row for key, row in one.items() if key[0] in forms} for one in (rows, others))
        for key in sorted(rows.keys() | others.keys(), key=repr):
            ours, theirs = rows.get(key), others.get(key)
            if ours is None or theirs is None:
                yield Difference(table, key, None, ours, theirs)
                continue
            for column, value in ours.items():
                if value == theirs[column] or (column == "architecture_id" and None in (value, theirs[column])):
                    continue
                yield Difference(table, key, column, value, theirs[column])


def key_columns(table: str) -> tuple[str, ...]:
    """The columns that a row's key is made of."""
    if table in _NATURAL:
        return _NATURAL[table]
    return tuple(column.name for column in tables.metadata.tables[table].primary_key.columns)


def _names(connection: Connection) -> dict[str, dict[int, str]]:
    """What to say instead of each row id, by table."""
    artifacts = {
        row.id: f"{row.namespace}/{row.name}"
        for row in connection.execute(select(tables.artifact.c.id, tables.artifact.c.namespace, tables.artifact.c.name))
    }
    names: dict[str, dict[int, str]] = {"artifact": artifacts}
    version = tables.version
    names["version"] = {
        row.id: f"{artifacts.get(row.artifact_id, f'row {row.artifact_id}')}@{row.number}"
        for row in connection.execute(select(version.c.id, version.c.artifact_id, version.c.number))
    }
    for table in (tables.blob, tables.layout, tables.lora_config, tables.architecture):
        names[table.name] = {row.id: row.digest for row in connection.execute(select(table.c.id, table.c.digest))}
    return names


def _rows(connection: Connection, table: Table, names: Mapping[str, Mapping[int, str]]) -> Iterator[tuple[Key, Row]]:
    keys = key_columns(table.name)
    left_out = LEFT_OUT_COLUMNS.get(table.name, frozenset()) | ({"id"} if table.name in _NATURAL else set())
    columns = [column for column in table.columns if column.name not in left_out]
    known = [names.get(_REFERENCES.get(column.name, "")) for column in columns]
    for values in connection.execute(select(*columns)):
        row: Row = {}
        for column, name, value in zip(columns, known, values, strict=True):
            if name is not None and value is not None:
                value = name.get(value, f"row {value}, which is not there")
            row[column.name] = bytes(value) if isinstance(value, memoryview) else value
        yield tuple(row[key] for key in keys), row


@dataclass(frozen=True)
class IndexRow:
    """One tensor in the digest index, with the blob by its digest."""

    prefix: int
    blob: str
    ordinal: int


def index_rows(connection: Connection) -> set[IndexRow]:
    """All of the digest index. It names one of the blobs that hold a tensor, whichever was there first."""
    index, blob = tables.tensor_index, tables.blob
    rows = connection.execute(
        select(index.c.prefix, index.c.blob_id, index.c.ordinal, blob.c.digest).outerjoin(
            blob, blob.c.id == index.c.blob_id
        )
    )
    return {IndexRow(row.prefix, row.digest or f"row {row.blob_id}", row.ordinal) for row in rows}


def wrong_index_rows(rows: set[IndexRow], dumped: Dump) -> list[IndexRow]:
    """Those rows of an index that name a blob or a place in it where the tensor is not."""
    packed = {key[0]: row["digests"] for key, row in dumped["blob_tensors"].items()}
    prefixes: dict[str, list[int]] = {}
    wrong = []
    for row in sorted(rows, key=lambda one: (one.blob, one.ordinal, one.prefix)):
        if row.blob not in prefixes:
            prefixes[row.blob] = [index_prefix(one) for one in unpack_digests(packed.get(row.blob, b""))]
        held = prefixes[row.blob]
        if not 0 <= row.ordinal < len(held) or held[row.ordinal] != row.prefix:
            wrong.append(row)
    return wrong
