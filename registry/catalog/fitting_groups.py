"""What versions of one layout share, for questions that the sizes of modules do not decide: their configurations, the
base that each was trained on, and the paths of their targets."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sqlalchemy import Connection, func, select

from registry.catalog.rows import batches
from registry.catalog.tables import target, version


def samples_of_layouts(connection: Connection, layout_ids: Collection[int]) -> list[tuple[int, int | None, int]]:
    """(layout, configuration, a version that has both) of present adapters, each pair once."""
    found: list[tuple[int, int | None, int]] = []
    for batch in batches(sorted(layout_ids)):
        rows = connection.execute(
            select(version.c.layout_id, version.c.lora_config_id, func.min(version.c.id))
            .where(version.c.layout_id.in_(batch), version.c.state == "present", version.c.kind == "adapter")
            .group_by(version.c.layout_id, version.c.lora_config_id)
        )
        found += [(layout_id, config_id, version_id) for layout_id, config_id, version_id in rows]
    return found


def form_keys(connection: Connection, version_ids: Iterable[int]) -> dict[int, tuple[int | None, int | None]]:
    """(configuration, base) of versions, by row id."""
    found = {}
    for batch in batches(version_ids):
        rows = connection.execute(
            select(version.c.id, version.c.lora_config_id, version.c.base_id).where(version.c.id.in_(batch))
        )
        found.update({row.id: (row.lora_config_id, row.base_id) for row in rows})
    return found


def target_paths(connection: Connection, layout_id: int) -> frozenset[str]:
    """Paths of a layout's targets."""
    return frozenset(connection.execute(select(target.c.module).where(target.c.layout_id == layout_id)).scalars())
