"""What a registry's catalog answers about everything in it, in the form in which `independent_reader` gives what it
recomputes from the store alone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from registry import Registry
from registry.catalog import tables
from registry.core.annotations import MetricValue
from registry.core.event import format_moment


def catalog_state(registry: Registry) -> dict[str, Any]:
    """Everything that the catalog says, as plain data for JSON."""
    names: dict[str, Any] = {}
    for version in registry.find():
        one = names.setdefault(version.name, {"versions": {}, "tags": {}})
        one["versions"][str(version.version)] = _version(registry, version.reference)
    for name, one in names.items():
        events = registry.events(name)
        one["latest"] = int(registry.resolve(name).rpartition("@")[2])
        one["events"] = len(events)
        one["tags"] = _tags(registry, name)
        one["history"] = {
            tag: [[e.kind, e.version, format_moment(e.at), e.actor] for e in registry.tag_history(name, tag)]
            for tag in sorted({e.tag for e in events if e.tag is not None})
        }
        one["versions"] = dict(sorted(one["versions"].items(), key=lambda pair: int(pair[0])))
    return {"registry": registry.id, "names": dict(sorted(names.items()))}


def _version(registry: Registry, reference: str) -> dict[str, Any]:
    details = registry.show(reference)
    record = details.found.record
    lineage = registry.log(reference)
    edges = [
        [edge.relation, lineage.names[edge.parent_id], edge.weight]
        for edge in lineage.ancestors
        if edge.child_id == lineage.id
    ]
    return {
        "digest": record.digest,
        "content": record.content_digest,
        "kind": record.kind,
        "base": record.base,
        "parents": sorted(edges, key=str),
        "created_at": format_moment(record.created_at),
        "created_by": record.created_by,
        "message": record.message,
        "peft_version": record.peft_version,
        "size": record.size,
        "bytes_new": record.bytes_new,
        "tags": list(record.tags),
        "metadata": {key: value.to_json() for key, value in sorted(details.found.metadata.items())},
        "metrics": _metrics(registry, record.id),
        "files": {file.path: [file.sha256, file.size] for file in details.contents.files},
        "components": {
            role: [part.layout.digest, list(part.tensors)] for role, part in sorted(details.contents.components.items())
        },
    }


def _metrics(registry: Registry, version_id: int) -> dict[str, Any]:
    metric = tables.metric
    with registry._context.reading() as connection:
        rows = connection.execute(select(metric).where(metric.c.version_id == version_id).order_by(metric.c.key)).all()
    return {row.key: [MetricValue(row.value, row.kind).json, row.step, format_moment(row.at)] for row in rows}


def _tags(registry: Registry, name: str) -> dict[str, Any]:
    tag, version, artifact = tables.tag, tables.version, tables.artifact
    with registry._context.reading() as connection:
        rows = connection.execute(
            select(tag.c.name, version.c.number, tag.c.protected, tag.c.moved_at)
            .join(version, version.c.id == tag.c.version_id)
            .join(artifact, artifact.c.id == tag.c.artifact_id)
            .where(artifact.c.namespace + "/" + artifact.c.name == name)
            .order_by(tag.c.name)
        ).all()
    return {row.name: [row.number, row.protected, format_moment(row.moved_at)] for row in rows}
