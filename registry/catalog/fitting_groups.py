"""What versions of one layout share, for questions that the sizes of modules do not decide: their configurations, the
base that each was trained on, and the paths of their targets."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, select

from registry.catalog.rows import batches
from registry.catalog.tables import lora_config, target, version

Key = tuple[int | None, int | None, int | None]
"""(layout, configuration, base) of an adapter, as row ids."""


def form_keys(connection: Connection, version_ids: Iterable[int]) -> dict[int, Key]:
    """(layout, configuration, base) of versions, by row id."""
    found = {}
    for batch in batches(version_ids):
        rows = connection.execute(
            select(version.c.id, version.c.layout_id, version.c.lora_config_id, version.c.base_id).where(
                version.c.id.in_(batch)
            )
        )
        found.update({row.id: (row.layout_id, row.lora_config_id, row.base_id) for row in rows})
    return found


def config_documents(connection: Connection, config_ids: Iterable[int]) -> dict[int, str]:
    """Configurations as JSON, by row id; those that came with an adapter."""
    found = {}
    for batch in batches(config_ids):
        rows = connection.execute(
            select(lora_config.c.id, lora_config.c.document).where(
                lora_config.c.id.in_(batch), lora_config.c.document.is_not(None)
            )
        )
        found.update({row.id: row.document for row in rows})
    return found


def target_paths(connection: Connection, layout_id: int) -> frozenset[str]:
    """Paths of a layout's targets."""
    return frozenset(connection.execute(select(target.c.module).where(target.c.layout_id == layout_id)).scalars())
