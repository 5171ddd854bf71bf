"""What a registry's catalog answers about everything in it, in the form in which `independent_reader` gives what it
recomputes from the store alone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from registry import Registry
from registry.catalog import tables
from registry.catalog.descriptions import descriptions_of
from registry.core.annotations import MetricValue
from registry.core.event import format_moment


def catalog_state(registry: Registry) -> dict[str, Any]:
    """Everything that the catalog says, as plain data for JSON."""
    present: dict[str, dict[str, Any]] = {}
    for found in registry.find():
        present.setdefault(found.name, {})[str(found.version)] = _version(registry, found.reference)
    names = {}
    for name in _names(registry):
        events = registry.events(name)
        versions = dict(sorted(present.get(name, {}).items(), key=lambda pair: int(pair[0])))
        names[name] = {
            "versions": versions,
            "gone": _gone(registry, name),
            "tags": _tags(registry, name),
            "latest": int(registry.resolve(name).rpartition("@")[2]) if versions else None,
            "events": len(events),
            "history": {
                tag: [[e.kind, e.version, format_moment(e.at), e.actor] for e in registry.tag_history(name, tag)]
                for tag in sorted({e.tag for e in events if e.tag is not None})
            },
        }
    return {"registry": registry.id, "names": names}


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
        "described": _described(registry, record.id),
        "external": sorted(details.contents.external),
        "files": {file.path: [file.sha256, file.size, file.role] for file in details.contents.files},
        "components": {
            role: [part.layout.digest, list(part.tensors), part.data]
            for role, part in sorted(details.contents.components.items())
        },
    }


def _metrics(registry: Registry, version_id: int) -> dict[str, Any]:
    metric = tables.metric
    with registry._context.reading() as connection:
        rows = connection.execute(select(metric).where(metric.c.version_id == version_id).order_by(metric.c.key)).all()
    return {row.key: [MetricValue(row.value, row.kind).json, row.step, format_moment(row.at)] for row in rows}


def _names(registry: Registry) -> list[str]:
    artifact = tables.artifact
    with registry._context.reading() as connection:
        rows = connection.execute(select(artifact.c.namespace, artifact.c.name)).all()
    return sorted(f"{row.namespace}/{row.name}" for row in rows)


def _gone(registry: Registry, name: str) -> dict[str, str]:
    version, artifact = tables.version, tables.artifact
    with registry._context.reading() as connection:
        rows = connection.execute(
            select(version.c.number, version.c.state)
            .join(artifact, artifact.c.id == version.c.artifact_id)
            .where(artifact.c.namespace + "/" + artifact.c.name == name, version.c.state != "present")
            .order_by(version.c.number)
        ).all()
    return {str(row.number): row.state for row in rows}


def _described(registry: Registry, version_id: int) -> dict[str, str]:
    with registry._context.reading() as connection:
        return dict(sorted(descriptions_of(connection, version_id).items()))


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
