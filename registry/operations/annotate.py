"""Metadata and metrics that are said of a version after its push."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from registry.catalog import annotation_rows
from registry.catalog.names import LockedName
from registry.catalog.versions import VersionKey, resolve
from registry.core.annotations import check_step, read_metadata, read_metrics
from registry.core.reference import parse_reference
from registry.operations.context import Context, actor, under_lock


def annotate(
    context: Context,
    reference: str,
    *,
    metadata: Mapping[str, object],
    metrics: Mapping[str, object],
    step: int | None = None,
) -> VersionKey:
    """Adds metadata and metrics to a version; see `Registry.annotate`."""
    parsed = parse_reference(reference)
    texts, numbers, at_step = read_metadata(metadata), read_metrics(metrics), check_step(step)

    def change(name: LockedName, at: datetime) -> VersionKey:
        version = resolve(name.connection, parsed)
        annotation_rows.set_metadata(name, version, texts, actor=actor(), at=at)
        annotation_rows.set_metrics(name, version, numbers, step=at_step, actor=actor(), at=at)
        return version

    return under_lock(context, parsed.namespace, parsed.name, change)
