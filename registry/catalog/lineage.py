"""Lineage: edges from a version to those that it came from, and the walk along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select

from registry.catalog.rows import batches
from registry.catalog.tables import artifact, lineage, version
from registry.core.errors import LineageCycle

MAX_DEPTH = 1000


@dataclass(frozen=True)
class Edge:
    """One edge; references are `namespace/name@number`, `weight` only for `merged_from`."""

    child_id: int
    parent_id: int
    relation: str
    weight: float | None


def add_edges(connection: Connection, child_id: int, parents: Sequence[tuple[str, int, float | None]]) -> None:
    """Records (relation, parent row id, weight) of a new version.

    Raises:
        LineageCycle: a parent is not older than its child, the one way in which a cycle could begin.
    """
    for _, parent_id, _ in parents:
        if parent_id >= child_id:
            raise LineageCycle(
                f"version row {parent_id} cannot be a parent of row {child_id}: a parent is always the older version"
            )
    rows = [
        {"child_id": child_id, "parent_id": parent_id, "relation": relation, "weight": weight}
        for relation, parent_id, weight in parents
    ]
    if rows:
        connection.execute(insert(lineage), rows)


def walk(connection: Connection, version_id: int, *, up: bool) -> list[Edge]:
    """All edges towards the ancestors (`up`) or the descendants of a version, nearest first."""
    here, there = (lineage.c.child_id, lineage.c.parent_id) if up else (lineage.c.parent_id, lineage.c.child_id)
    seen = {version_id}
    frontier = [version_id]
    edges: list[Edge] = []
    for _ in range(MAX_DEPTH):
        following: list[int] = []
        for batch in batches(frontier):
            rows = connection.execute(select(lineage).where(here.in_(batch)).order_by(here, there, lineage.c.relation))
            for row in rows:
                edges.append(Edge(row.child_id, row.parent_id, row.relation, row.weight))
                other = row.parent_id if up else row.child_id
                if other not in seen:
                    seen.add(other)
                    following.append(other)
        if not following:
            break
        frontier = following
    return edges


def references(connection: Connection, version_ids: Sequence[int]) -> dict[int, str]:
    """`namespace/name@number` by row id."""
    found: dict[int, str] = {}
    for batch in batches(version_ids):
        rows = connection.execute(
            select(version.c.id, artifact.c.namespace, artifact.c.name, version.c.number)
            .join(artifact, artifact.c.id == version.c.artifact_id)
            .where(version.c.id.in_(batch))
        )
        found.update({row.id: f"{row.namespace}/{row.name}@{row.number}" for row in rows})
    return found
