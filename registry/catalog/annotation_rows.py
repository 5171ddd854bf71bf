"""Metadata and metrics of versions: the current values as rows, their history as events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from sqlalchemy import Connection, select

from registry.catalog.names import LockedName
from registry.catalog.rows import batches, upsert
from registry.catalog.tables import metric, version_metadata
from registry.catalog.versions import VersionKey
from registry.core.annotations import MetadataValue, MetricValue
from registry.core.event import Event


def set_metadata(
    name: LockedName, version: VersionKey, values: Mapping[str, MetadataValue], *, actor: str, at: datetime
) -> Event | None:
    """Sets keys; values that are there already in just this form make no event."""
    there = metadata_of(name.connection, [version.id]).get(version.id, {})
    changed = {key: value for key, value in values.items() if there.get(key) != value}
    if not changed:
        return None
    upsert(
        name.connection,
        version_metadata,
        [
            {"version_id": version.id, "key": key, "text_value": value.text, "number_value": value.number}
            for key, value in changed.items()
        ],
        ["version_id", "key"],
    )
    payload = {key: value.to_json() for key, value in changed.items()}
    return name.append("metadata", payload, actor=actor, at=at, version=(version.id, version.number))


def set_metrics(
    name: LockedName,
    version: VersionKey,
    values: Mapping[str, MetricValue],
    *,
    step: int | None,
    actor: str,
    at: datetime,
) -> Event | None:
    """Records measured values; each call is an event, the rows keep the newest."""
    if not values:
        return None
    payload = {"values": {key: value.json for key, value in values.items()}, "step": step}
    made = name.append("metrics", payload, actor=actor, at=at, version=(version.id, version.number))
    upsert(
        name.connection,
        metric,
        [
            {
                "version_id": version.id,
                "key": key,
                "value": value.value,
                "kind": value.kind,
                "step": step,
                "at": made.at,
            }
            for key, value in values.items()
        ],
        ["version_id", "key"],
    )
    return made


def metadata_of(connection: Connection, version_ids: Iterable[int]) -> dict[int, dict[str, MetadataValue]]:
    """Metadata by version."""
    found: dict[int, dict[str, MetadataValue]] = {}
    for batch in batches(version_ids):
        rows = connection.execute(
            select(version_metadata)
            .where(version_metadata.c.version_id.in_(batch))
            .order_by(version_metadata.c.version_id, version_metadata.c.key)
        )
        for row in rows:
            found.setdefault(row.version_id, {})[row.key] = MetadataValue(row.text_value, row.number_value)
    return found


def metrics_of(connection: Connection, version_ids: Iterable[int]) -> dict[int, dict[str, MetricValue]]:
    """The newest value of each metric by version."""
    found: dict[int, dict[str, MetricValue]] = {}
    for batch in batches(version_ids):
        rows = connection.execute(
            select(metric).where(metric.c.version_id.in_(batch)).order_by(metric.c.version_id, metric.c.key)
        )
        for row in rows:
            found.setdefault(row.version_id, {})[row.key] = MetricValue(row.value, row.kind)
    return found
