"""Questions of a merge: which modules the sources change together, and which versions were made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, case, func, select

from registry.catalog.rows import batches
from registry.catalog.tables import lineage, target, version


@dataclass(frozen=True)
class JoinedTarget:
    """One module that sources change.

    Attributes:
        sources: how many of the layouts have it.
        in_features, out_features: (least, most) of them; None: not known.
        kinds: how many kinds (linear, conv2d, ...) it is of; flags such as `+dora` are no part of it.
    """

    module: str
    sources: int
    in_features: tuple[int | None, int | None]
    out_features: tuple[int | None, int | None]
    kinds: int


def joined_targets(connection: Connection, layout_ids: Sequence[int]) -> list[JoinedTarget]:
    """The targets of several layouts, joined by module path: one row a module with factors, in order of path."""
    plus = func.instr(target.c.kind, "+") if connection.dialect.name == "sqlite" else func.strpos(target.c.kind, "+")
    kind = case((plus > 0, func.substr(target.c.kind, 1, plus - 1)), else_=target.c.kind)
    sides = target.c.in_features, target.c.out_features
    rows = connection.execute(
        select(
            target.c.module,
            func.count(target.c.layout_id.distinct()).label("sources"),
            *(
                one(side).label(f"{name}_{side.name}")
                for side in sides
                for name, one in (("least", func.min), ("most", func.max))
            ),
            func.count(kind.distinct()).label("kinds"),
        )
        .where(target.c.layout_id.in_(sorted(set(layout_ids))), target.c.rank > 0)
        .group_by(target.c.module)
        .order_by(target.c.module)
    )
    return [
        JoinedTarget(
            row.module,
            row.sources,
            (row.least_in_features, row.most_in_features),
            (row.least_out_features, row.most_out_features),
            row.kinds,
        )
        for row in rows
    ]


def made_of(connection: Connection, parent_ids: Sequence[int], relation: str) -> list[tuple[int, str]]:
    """Present versions that have an edge of this relation to all of these versions: (row id, manifest digest), oldest
    first."""
    found: set[int] | None = None
    for one in parent_ids:
        children = set(
            connection.execute(
                select(lineage.c.child_id).where(lineage.c.parent_id == one, lineage.c.relation == relation)
            ).scalars()
        )
        found = children if found is None else found & children
    made = []
    for batch in batches(sorted(found or ())):
        rows = connection.execute(
            select(version.c.id, version.c.manifest_digest)
            .where(version.c.id.in_(batch), version.c.state == "present")
            .order_by(version.c.id)
        )
        made += [(row.id, row.manifest_digest) for row in rows]
    return made
