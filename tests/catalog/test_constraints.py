"""Rows that must not be: for every CHECK, UNIQUE, key, reference and NOT NULL of the tables, one that breaks it and is
refused, on both databases. A constraint that is added without its wrong row fails here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import (
    CheckConstraint,
    Connection,
    Double,
    ForeignKeyConstraint,
    Integer,
    PrimaryKeyConstraint,
    Table,
    UniqueConstraint,
    insert,
    select,
)
from sqlalchemy.exc import DataError, IntegrityError

from registry.catalog import tables
from registry.catalog.engine import open_database
from registry.catalog.types import Digest
from registry.core.digest import sha256_hex
from tests.catalog.fixtures import KINDS, Catalogs

NOW = datetime(2026, 11, 23, tzinfo=UTC)
LATER = datetime(2026, 11, 24, tzinfo=UTC)
NOWHERE = 10**9


def digest(name: str) -> str:
    return sha256_hex(name.encode())


def version(number: int, **changed: Any) -> dict[str, Any]:
    row = {"id": number, "artifact_id": 1, "number": number, "kind": "adapter", "state": "present", "base_id": None}
    digests = {"manifest_digest": digest(f"manifest {number}"), "content_digest": digest("content")}
    refers = {"layout_id": 1, "lora_config_id": 1, "architecture_id": 1}
    return {**row, **digests, **refers, "size": 0, "bytes_new": 0, "created_by": "me", "created_at": NOW, **changed}


SHARED = {"created_at": NOW}
ROWS: dict[str, list[dict[str, Any]]] = {
    "registry_meta": [{"one": 1, "registry_id": "a", "store_format": 1}],
    "artifact": [{"id": 1, "namespace": "a", "name": "b", "last_number": 0, "last_seq": 0, "last_event_at": NOW}],
    "layout": [{"id": 1, "digest": digest("layout"), "tensors": 0, "parameters": 0, "nbytes": 0}],
    "layout_tensor": [{"layout_id": 1, "position": 0, "name": "t", "dtype": "F32", "shape": ""}],
    "target": [{"layout_id": 1, "module": "m", "kind": "linear", "rank": 0}],
    "architecture": [
        {"id": 1, "digest": digest("architecture"), "source_fingerprint": digest("source")}
        | {"exact": True, "document": "{}"}
    ],
    "module": [{"architecture_id": 1, "path": "m", "kind": "linear", "groups": 1}],
    "lora_config": [{"id": 1, "digest": digest("config"), "peft_type": "LORA", "r": 0, "lora_alpha": 1.0}],
    "lora_target": [{"lora_config_id": 1, "target": "q_proj"}],
    "blob": [{"id": 1, "digest": digest("blob"), "size": 0, "state": "present", "layout_id": 1}],
    "blob_tensors": [{"blob_id": 1, "digests": b""}],
    "tensor_index": [{"prefix": 0, "blob_id": 1, "ordinal": 0}],
    "version": [version(1), version(2, base_id=1), version(4)],
    "component": [{"version_id": 1, "role": "adapter", "layout_id": 1, "digests": bytes(32), "placement": bytes(8)}],
    "version_blob": [{"version_id": 1, "position": 0, "blob_id": 1, "role": "tensors"}],
    "version_file": [
        {"version_id": 1, "path": "f", "sha256": digest("file"), "size": 0, "blob_position": 0, "whole": True}
    ],
    "tag": [{"artifact_id": 1, "name": "prod", "version_id": 1, "protected": False, "moved_at": NOW}],
    "event": [
        {"artifact_id": 1, "seq": seq, "kind": "pushed", "version_id": 1, "at": NOW, "actor": "me", "payload": "{}"}
        for seq in (1, 2)
    ],
    "outbox": [{"artifact_id": 1, "seq": 1}],
    "described_blob": [{"artifact_id": 1, "seq": 1, "role": "probe", "blob_id": 1}],
    "lineage": [{"child_id": 2, "parent_id": 1, "relation": "merged_from", "weight": 0.5}],
    "metadata": [{"version_id": 1, "key": "k", "text_value": "1", "number_value": 1.0}],
    "metric": [{"version_id": 1, "key": "k", "value": 1.0, "kind": "finite", "step": 1, "at": NOW}],
    "finding": [
        {"version_id": 1, "position": 0, "code": "C01", "severity": "error", "subject": "", "message": "m"}
        | {"expected": "", "found": "", "mend": ""}
    ],
    "lease": [{"id": "l", "purpose": "gc", "holder": "me", "acquired_at": NOW, "expires_at": LATER}],
}
"""Good rows of every table. The last of each is also what a wrong row is made from."""

WRONG: dict[str, list[dict[str, Any]]] = {
    "ck_registry_meta_one_row": [{"one": number} for number in (0, 2)],
    "ck_artifact_name_length": [{"namespace": ""}, {"name": ""}, {"namespace": "n" * 129}, {"name": "n" * 129}],
    "ck_artifact_counters": [{"last_number": -1}, {"last_seq": -1}],
    "ck_layout_sizes": [{"tensors": -1}, {"parameters": -1}, {"nbytes": -1}],
    "ck_target_rank": [{"rank": -1}],
    "ck_module_kind_known": [{"kind": "norm"}, {"kind": "Linear"}],
    "ck_module_groups": [{"groups": 0}],
    "ck_lora_config_r": [{"r": -1}],
    "ck_blob_state_known": [{"state": "gone"}, {"state": ""}],
    "ck_blob_size": [{"size": -1}],
    "ck_blob_tensors_digests_length": [{"digests": bytes(31)}, {"digests": bytes(33)}],
    "ck_version_number": [{"number": 0}, {"number": -1}],
    "ck_version_base_is_older": [{"base_id": 5}, {"id": 3, "base_id": 4}],
    "ck_version_sizes": [{"size": -1}, {"bytes_new": -1}],
    "ck_version_kind_known": [{"kind": "lora"}, {"kind": "Adapter"}],
    "ck_version_state_known": [{"state": "deleting"}],
    "ck_component_lengths": [
        {"digests": bytes(33), "placement": bytes(8)},
        {"digests": bytes(64), "placement": bytes(8)},
        {"digests": bytes(32), "placement": b""},
    ],
    "ck_version_blob_role_known": [{"role": "adapter"}],
    "ck_version_file_size": [{"size": -1}],
    "ck_version_file_splices_of_skeleton": [{"splices": "[]"}, {"splices": "[]", "whole": False, "role": "model"}],
    "ck_tag_latest_is_derived": [{"name": "latest"}],
    "ck_tag_name_length": [{"name": ""}, {"name": "t" * 129}],
    "ck_event_seq": [{"seq": 0}],
    "ck_event_kind_known": [{"kind": "popped"}],
    "ck_lineage_no_cycle": [{"parent_id": 4}, {"child_id": 1, "parent_id": 2}],
    "ck_lineage_weight_of_merge": [{"relation": "trained_on"}],
    "ck_lineage_relation_known": [{"relation": "cousin_of", "weight": None}],
    "ck_metadata_lengths": [{"key": ""}, {"key": "k" * 129}, {"text_value": "x" * 501}],
    "ck_metric_kind_known": [{"kind": "infinite", "value": None}],
    "ck_metric_value_of_kind": [{"value": None}, {"kind": "nan"}, {"kind": "inf"}],
    "ck_metric_key_length": [{"key": ""}, {"key": "k" * 129}],
    "ck_finding_severity_known": [{"severity": "fatal"}],
    "ck_lease_order": [{"expires_at": NOW}, {"acquired_at": LATER}],
}
"""Changes to a good row that break just one CHECK. Those of digests and finite numbers are made below."""

for _table in tables.metadata.sorted_tables:
    for _column in _table.columns:
        if isinstance(_column.type, Digest):
            WRONG[f"ck_{_table.name}_{_column.name}_length"] = [{_column.name: "ab"}, {_column.name: "ab" * 33}]
        if isinstance(_column.type, Double):
            WRONG[f"ck_{_table.name}_{_column.name}_finite"] = [
                {_column.name: float(text)} for text in ("inf", "-inf", "nan")
            ]

CHECKS = {
    str(constraint.name): table
    for table in tables.metadata.sorted_tables
    for constraint in table.constraints
    if isinstance(constraint, CheckConstraint)
}


def good(table: Table) -> list[dict[str, Any]]:
    rows = ROWS[table.name]
    created = SHARED if "created_at" in table.columns else {}
    return [{**created, **row} for row in rows]


NEXT: dict[str, dict[str, Any]] = {
    "registry_meta": {},
    "artifact": {"id": 2, "name": "c"},
    "layout": {"id": 2, "digest": digest("layout 2")},
    "layout_tensor": {"position": 1},
    "target": {"module": "n"},
    "architecture": {"id": 2, "digest": digest("architecture 2")},
    "module": {"path": "n"},
    "lora_config": {"id": 2, "digest": digest("config 2")},
    "lora_target": {"target": "v_proj"},
    "blob": {"id": 3, "digest": digest("blob 3")},
    "blob_tensors": {"blob_id": 2},
    "tensor_index": {"ordinal": 1},
    "version": version(5, base_id=1),
    "component": {"role": "model"},
    "version_blob": {"position": 1},
    "version_file": {"path": "g"},
    "tag": {"name": "best"},
    "event": {"seq": 3},
    "outbox": {"seq": 2},
    "described_blob": {"role": "history"},
    "lineage": {"child_id": 4},
    "metadata": {"key": "l"},
    "metric": {"key": "l"},
    "finding": {"position": 1},
    "lease": {"id": "m"},
}
"""What makes of a table's last good row another one beside it."""


def another(table: Table) -> dict[str, Any]:
    return {**good(table)[-1], **NEXT[table.name]}


@pytest.fixture(scope="module", params=KINDS)
def connection(request: pytest.FixtureRequest, catalogs: Catalogs) -> Iterator[Connection]:
    """With the good rows in it; what a test does is rolled back."""
    database = open_database(catalogs.database(request.param))
    with database.writing() as opened:
        for table in tables.metadata.sorted_tables:
            for row in good(table):
                opened.execute(insert(table).values(**row))
        blob = {**good(tables.blob)[0], "id": 2, "digest": digest("blob 2")}
        opened.execute(insert(tables.blob).values(**blob))
    with database.writing() as opened:
        yield opened
        opened.rollback()
    database.close()


@contextmanager
def attempt(connection: Connection) -> Iterator[None]:
    nested = connection.begin_nested()
    try:
        yield
    finally:
        nested.rollback()


def refused(connection: Connection, table: Table, row: dict[str, Any], by: str) -> None:
    with attempt(connection), pytest.raises((IntegrityError, DataError)) as error:
        connection.execute(insert(table).values(**row))
    assert by in str(error.value.orig), error.value.orig


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Table) else None


def test_every_check_has_a_wrong_row() -> None:
    assert set(WRONG) == set(CHECKS)
    assert set(ROWS) == {table.name for table in tables.metadata.sorted_tables}


@pytest.mark.parametrize(
    "table", [one for one in tables.metadata.sorted_tables if one is not tables.registry_meta], ids=name_of
)
def test_a_good_row_is_taken(connection: Connection, table: Table) -> None:
    """So that what follows is refused for its one change. The one table left out can hold one row only."""
    with attempt(connection):
        connection.execute(insert(table).values(**another(table)))


@pytest.mark.parametrize(
    ("check", "change"), [(check, change) for check, changes in WRONG.items() for change in changes], ids=str
)
def test_a_check_refuses(connection: Connection, check: str, change: dict[str, Any]) -> None:
    table = CHECKS[check]
    by = check
    if connection.dialect.name == "sqlite" and any(value != value for value in change.values()):
        by = ""  # NaN becomes NULL there, which breaks NOT NULL or value_of_kind where the column cannot be NULL
        if table.name != "metric":
            row = {**another(table), **change}
            with attempt(connection):
                connection.execute(insert(table).values(**row))
                keys = [column == row[column.name] for column in table.primary_key]
                kept = connection.execute(select(*(table.c[name] for name in change)).where(*keys)).one()
                assert set(kept) == {None}  # which means that nothing was recorded
            return
    if check.endswith("_kind_known") and table.name == "metric":
        by = "ck_metric"  # a kind that is none has no value that goes with it
    refused(connection, table, {**another(table), **change}, by)


@pytest.mark.parametrize(
    ("table", "column"),
    [
        (table, column.name)
        for table in tables.metadata.sorted_tables
        for column in table.columns
        if not column.nullable and column.autoincrement is not True
    ],
    ids=lambda value: name_of(value) or str(value),
)
def test_a_value_that_must_be_there_is_missed(connection: Connection, table: Table, column: str) -> None:
    whole_key = [one.name for one in table.primary_key] == [column]
    if connection.dialect.name == "sqlite" and whole_key and isinstance(table.columns[column].type, Integer):
        # The rowid by another name: SQLite fills it in, and only then another constraint may refuse the row.
        with attempt(connection), suppress(IntegrityError):
            connection.execute(insert(table).values(**{**another(table), column: None}))
            assert connection.execute(select(table).where(table.columns[column].is_(None))).all() == []
        return
    refused(connection, table, {**another(table), column: None}, column)


@pytest.mark.parametrize("table", tables.metadata.sorted_tables, ids=name_of)
def test_a_key_stands_once(connection: Connection, table: Table) -> None:
    for constraint in table.constraints:
        if not isinstance(constraint, UniqueConstraint | PrimaryKeyConstraint):
            continue
        there = good(table)[-1]
        row = {**another(table), **{column.name: there[column.name] for column in constraint.columns}}
        named = str(constraint.name) if connection.dialect.name == "postgresql" else "UNIQUE"
        refused(connection, table, row, named)


@pytest.mark.parametrize(
    ("table", "reference"),
    [
        (table, constraint)
        for table in tables.metadata.sorted_tables
        for constraint in sorted(table.foreign_key_constraints, key=lambda one: str(one.name))
    ],
    ids=lambda value: name_of(value) or str(value.name),
)
def test_a_reference_leads_to_a_row(connection: Connection, table: Table, reference: ForeignKeyConstraint) -> None:
    columns = [column.name for column in reference.columns]
    wrong = {columns[-1]: NOWHERE}
    if (table.name, columns) in (("version", ["base_id"]), ("lineage", ["parent_id"])):
        wrong = {columns[-1]: -NOWHERE}  # older than its child, and still nowhere
    row = {**another(table), **wrong}
    named = str(reference.name) if connection.dialect.name == "postgresql" else "FOREIGN KEY"
    refused(connection, table, row, named)


def test_rows_that_others_need_stay(connection: Connection) -> None:
    for table in (tables.artifact, tables.layout, tables.blob, tables.version, tables.lora_config):
        with attempt(connection), pytest.raises(IntegrityError):
            connection.execute(table.delete())
        assert connection.execute(select(table)).first()
