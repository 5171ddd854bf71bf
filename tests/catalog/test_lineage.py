"""Lineage: edges between versions of any name, without cycles, walked both ways."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert

from registry import Registry
from registry.catalog import tables
from registry.catalog.engine import Database
from registry.catalog.lineage import Edge, add_edges, references, walk
from registry.core.digest import sha256_hex
from registry.core.errors import LineageCycle
from tests.catalog.artifacts import tensor_file

NOW = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    """With versions 1 to 1500 of one name, and no edges."""
    with database.writing() as opened:
        name = {"id": 1, "namespace": "a", "name": "b", "last_event_at": NOW, "created_at": NOW}
        opened.execute(insert(tables.artifact), [name])
        row = {"artifact_id": 1, "kind": "base", "state": "present", "size": 0, "bytes_new": 0}
        opened.execute(
            insert(tables.version),
            [
                {"id": number, "number": number, "manifest_digest": sha256_hex(b"%d" % number)}
                | {"content_digest": sha256_hex(b""), "created_by": "me", "created_at": NOW, **row}
                for number in range(1, 1501)
            ],
        )
        yield opened
        opened.rollback()


def pairs(edges: list[Edge]) -> list[tuple[int, int]]:
    return [(edge.child_id, edge.parent_id) for edge in edges]


def test_a_diamond_is_walked_once_and_nearest_first(connection: Connection) -> None:
    add_edges(connection, 2, [("continued_from", 1, None)])
    add_edges(connection, 3, [("continued_from", 1, None)])
    add_edges(connection, 4, [("merged_from", 2, 0.7), ("merged_from", 3, 0.3)])
    add_edges(connection, 5, [("continued_from", 4, None), ("trained_on", 1, None)])
    assert pairs(walk(connection, 5, up=True)) == [(5, 1), (5, 4), (4, 2), (4, 3), (2, 1), (3, 1)]
    assert pairs(walk(connection, 1, up=False)) == [(2, 1), (3, 1), (5, 1), (4, 2), (4, 3), (5, 4)]
    assert [edge.weight for edge in walk(connection, 4, up=True)] == [0.7, 0.3, None, None]
    assert walk(connection, 1, up=True) == walk(connection, 5, up=False) == []
    assert references(connection, [4, 1]) == {1: "a/b@1", 4: "a/b@4"}


def test_two_relations_to_one_parent_are_two_edges(connection: Connection) -> None:
    add_edges(connection, 2, [("trained_on", 1, None), ("continued_from", 1, None)])
    assert [edge.relation for edge in walk(connection, 2, up=True)] == ["continued_from", "trained_on"]


@pytest.mark.parametrize("parent", [2, 3])
def test_a_cycle_cannot_begin(connection: Connection, parent: int) -> None:
    with pytest.raises(LineageCycle, match="a parent is always the older version"):
        add_edges(connection, 2, [("continued_from", 1, None), ("continued_from", parent, None)])
    assert walk(connection, 2, up=True) == [], "half of the edges stayed"


def test_a_chain_of_any_length_is_walked_to_its_end(connection: Connection) -> None:
    for number in range(2, 1501):
        add_edges(connection, number, [("continued_from", number - 1, None)])
    assert pairs(walk(connection, 1500, up=True)) == [(number, number - 1) for number in range(1500, 1, -1)]
    assert pairs(walk(connection, 1, up=False)) == [(number, number - 1) for number in range(2, 1501)]


def test_lineage_runs_through_names(registry: Registry, tmp_path: Path) -> None:
    registry.push(tensor_file(tmp_path, 1), "base/model")
    registry.push(tensor_file(tmp_path, 2), "walk/a", base="base/model")
    registry.push(tensor_file(tmp_path, 3), "walk/b", base="base/model@1", continued_from="walk/a")
    parents = [("merged_from", "walk/a", 0.5), ("merged_from", "walk/b", 0.5)]
    registry.push(tensor_file(tmp_path, 4), "walk/both", parents=parents)

    def shown(edges: tuple[Edge, ...], names: dict[int, str]) -> list[tuple[str, str, str]]:
        return [(names[edge.child_id], edge.relation, names[edge.parent_id]) for edge in edges]

    merged = registry.log("walk/both")
    assert shown(merged.ancestors, merged.names) == [
        ("walk/both@1", "merged_from", "walk/a@1"),
        ("walk/both@1", "merged_from", "walk/b@1"),
        ("walk/a@1", "trained_on", "base/model@1"),
        ("walk/b@1", "trained_on", "base/model@1"),
        ("walk/b@1", "continued_from", "walk/a@1"),
    ]
    base = registry.log("base/model:latest")
    assert base.ancestors == ()
    assert {name for edge in shown(base.descendants, base.names) for name in edge} == {
        *("base/model@1", "walk/a@1", "walk/b@1", "walk/both@1"),
        *("trained_on", "continued_from", "merged_from"),
    }
    assert registry.get("walk/b").base == "base/model@1"
    assert registry.get("walk/both").base is None


def test_the_base_named_as_a_parent_too_is_one_edge(registry: Registry, tmp_path: Path) -> None:
    registry.push(tensor_file(tmp_path, 1), "base/model")
    registry.push(tensor_file(tmp_path, 2), "walk/a", base="base/model", parents=[("trained_on", "base/model@1", None)])
    assert len(registry.log("walk/a").ancestors) == 1
