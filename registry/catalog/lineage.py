"""Lineage: edges from a version to those that it came from, and the walk along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import BigInteger, Connection, insert, literal, select

from registry.catalog.rows import batches
from registry.catalog.tables import artifact, lineage, version
from registry.core.errors import LineageCycle


@dataclass(frozen=True)
class Edge:
    """One edge, by row ids; `weight` only for `merged_from`."""

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
    reached = select(literal(version_id, BigInteger).label("id")).cte("reached", recursive=True)
    reached = reached.union(select(there).join(reached, here == reached.c.id))
    edges: dict[int, list[Edge]] = {}
    for row in connection.execute(
        select(lineage).where(here.in_(select(reached.c.id))).order_by(there, lineage.c.relation)
    ):
        edge = Edge(row.child_id, row.parent_id, row.relation, row.weight)
        edges.setdefault(edge.child_id if up else edge.parent_id, []).append(edge)
    ordered: list[Edge] = []
    level, seen = [version_id], {version_id}
    while level:
        outward = [edge for one in level for edge in edges.get(one, ())]
        ordered += outward
        ends = dict.fromkeys(edge.parent_id if up else edge.child_id for edge in outward)
        level = sorted(one for one in ends if one not in seen)
        seen.update(level)
    return ordered


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
