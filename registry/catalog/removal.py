"""Versions that are taken away: removed and hidden, restored, or purged by `gc`. The number, the metadata, the lineage
and the tags of each stay; a state changes only under the lock of its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, delete, func, select, update

from registry.catalog import tags
from registry.catalog.lineage import references
from registry.catalog.names import LockedName
from registry.catalog.rows import batches
from registry.catalog.tables import (
    artifact,
    blob,
    component,
    described_blob,
    event,
    layout,
    lineage,
    tag,
    version,
    version_blob,
    version_file,
)
from registry.catalog.versions import VersionKey, gone
from registry.core.errors import InUse
from registry.core.event import Event

NAMED = 5
"""Versions that a refusal names; of more it tells the number."""


@dataclass(frozen=True, slots=True)
class Removed:
    """A version that waits for `gc`.

    Attributes:
        at: when it was removed.
    """

    id: int
    namespace: str
    name: str
    number: int
    at: datetime

    @property
    def reference(self) -> str:
        return f"{self.namespace}/{self.name}@{self.number}"


@dataclass(frozen=True, slots=True)
class Need:
    """One version's need of one blob, which ends when the version is purged.

    Attributes:
        size: bytes that the store holds of it; 0 of an external one.
        role: in which the version needs it.
    """

    version_id: int
    blob_id: int
    digest: str
    size: int
    role: str


def states(connection: Connection, version_ids: Iterable[int]) -> dict[int, str]:
    """`present`, `removed` or `purged` by row id."""
    found: dict[int, str] = {}
    for batch in batches(sorted(set(version_ids))):
        rows = connection.execute(select(version.c.id, version.c.state).where(version.c.id.in_(batch)))
        found.update((row.id, row.state) for row in rows)
    return found


def hold_present(connection: Connection, version_ids: Iterable[int]) -> None:
    """Keeps versions from being removed until the transaction ends, as a new child of them needs it.

    Raises:
        VersionNotFound: one is removed already; it says how to bring that back.
    """
    for batch in batches(sorted(set(version_ids))):
        # Locked before it is looked at: what waited for a removal sees it.
        rows = connection.execute(
            select(version.c.id, version.c.state)
            .where(version.c.id.in_(batch))
            .order_by(version.c.id)
            .with_for_update(read=True)
        ).all()
        for row in rows:
            if row.state != "present":
                raise gone(references(connection, [row.id])[row.id], row.state)


def lock_versions(connection: Connection, version_ids: Iterable[int]) -> None:
    """Locks versions, in one order for all, against `hold_present` of others until the transaction ends."""
    for batch in batches(sorted(set(version_ids))):
        connection.execute(
            select(version.c.id)
            .where(version.c.id.in_(batch))
            .order_by(version.c.id)
            .with_for_update(key_share=True)  # what merely refers to the row need not wait
        ).all()


def remove(name: LockedName, key: VersionKey, *, actor: str, at: datetime, why: str | None = None) -> Event | None:
    """Removes a version: hidden, its number never given again, brought back by `restore`.

    Returns:
        The event, or None where it is not present.

    Raises:
        InUse: a version that is present came from it.
        TagProtected: a protected tag points to it.
    """
    connection = name.connection
    lock_versions(connection, [key.id])
    if states(connection, [key.id])[key.id] != "present":
        return None
    _refuse_needed(connection, key, f"{name.reference}@{key.number}")
    kept = connection.scalars(
        select(tag.c.name).where(tag.c.artifact_id == name.id, tag.c.version_id == key.id, tag.c.protected).limit(1)
    ).first()
    if kept is not None:
        raise tags.protected(name.reference, kept, key.number)
    _set_state(connection, key, "removed")
    return name.append("removed", {"why": why}, actor=actor, at=at, version=(key.id, key.number))


def _refuse_needed(connection: Connection, key: VersionKey, reference: str) -> None:
    child = version.alias("child")
    children = (
        select(lineage.c.child_id)
        .join(child, child.c.id == lineage.c.child_id)
        .where(lineage.c.parent_id == key.id, child.c.state == "present")
        .distinct()
    )
    count: int = connection.execute(select(func.count()).select_from(children.subquery())).scalar_one()
    if not count:
        return
    first = connection.scalars(children.order_by(lineage.c.child_id).limit(NAMED)).all()
    names = references(connection, first)
    named = ", ".join(names[one] for one in first)
    more = f" and {count - NAMED} more" if count > NAMED else ""
    raise InUse(f"{reference} is the base or a parent of {named}{more}; remove what came from it first")


def restore(
    name: LockedName,
    key: VersionKey,
    *,
    actor: str,
    at: datetime,
    why: str | None = None,
    placement: Mapping[str, Any] | None = None,
) -> Event | None:
    """Brings a version back under its number.

    Args:
        placement: where a push has just put the bytes of a purged version, as the event keeps it. The caller inserts
            the rows of its components, files and blobs, of which none is left then.

    Returns:
        The event, or None where it is present.

    Raises:
        VersionNotFound: it is purged and there is no placement; or one that it came from is not present.
    """
    connection = name.connection
    state = states(connection, [key.id])[key.id]
    if state == "present":
        return None
    if state == "purged" and placement is None:
        raise gone(f"{name.reference}@{key.number}", state)
    hold_present(connection, connection.scalars(select(lineage.c.parent_id).where(lineage.c.child_id == key.id)))
    if state == "purged":
        connection.execute(delete(version_blob).where(version_blob.c.version_id == key.id))
    else:
        placement = None  # its bytes never went
    _set_state(connection, key, "present")
    payload = {"why": why, "placement": None if placement is None else dict(placement)}
    return name.append("restored", payload, actor=actor, at=at, version=(key.id, key.number))


def purge(name: LockedName, key: VersionKey, *, actor: str, at: datetime) -> Event | None:
    """Lets go of a removed version's bytes: its components, files and blobs, less its manifest and layouts.

    Returns:
        The event, whose `bytes` nothing else needs now; or None where the version is not removed (any more).
    """
    connection = name.connection
    if states(connection, [key.id])[key.id] != "removed":
        return None
    needs = needs_of(connection, [key.id])
    connection.execute(delete(component).where(component.c.version_id == key.id))
    connection.execute(delete(version_file).where(version_file.c.version_id == key.id))
    for batch in batches(needs):
        blob_ids = [need.blob_id for need in batch]
        connection.execute(
            delete(version_blob).where(version_blob.c.version_id == key.id, version_blob.c.blob_id.in_(blob_ids))
        )
    _set_state(connection, key, "purged")
    free = without_need(connection, [need.blob_id for need in needs])
    payload = {"bytes": sum(need.size for need in needs if need.blob_id in free)}
    return name.append("purged", payload, actor=actor, at=at, version=(key.id, key.number))


def _set_state(connection: Connection, key: VersionKey, state: str) -> None:
    connection.execute(update(version).where(version.c.id == key.id).values(state=state))


def removed_versions(connection: Connection) -> list[Removed]:
    """All versions that are removed and not purged, by name and number."""
    rows = connection.execute(
        select(version.c.id, artifact.c.namespace, artifact.c.name, version.c.number, func.max(event.c.at))
        .join(artifact, artifact.c.id == version.c.artifact_id)
        .join(event, event.c.version_id == version.c.id)
        .where(version.c.state == "removed", event.c.kind == "removed")
        .group_by(version.c.id, artifact.c.namespace, artifact.c.name, version.c.number)
        .order_by(artifact.c.namespace, artifact.c.name, version.c.number)
    )
    return [Removed(*row) for row in rows]


def ids_removed_before(moment: datetime) -> Select[int]:
    """Row ids of versions that are removed since this moment or longer."""
    return (
        select(version.c.id)
        .join(event, event.c.version_id == version.c.id)
        .where(version.c.state == "removed", event.c.kind == "removed")
        .group_by(version.c.id)
        .having(func.max(event.c.at) <= moment)
    )


def still_removed(connection: Connection, version_ids: Sequence[int], before: datetime) -> list[VersionKey]:
    """Those of a batch of versions that are removed since before a moment, by number."""
    ids = connection.scalars(ids_removed_before(before).where(version.c.id.in_(version_ids))).all()
    rows = connection.execute(
        select(version.c.id, version.c.artifact_id, version.c.number, version.c.manifest_digest)
        .where(version.c.id.in_(ids))
        .order_by(version.c.number)
    )
    return [VersionKey(*row) for row in rows]


def needs_of(connection: Connection, version_ids: Sequence[int]) -> list[Need]:
    """What these versions need beside their manifests and layouts, which history and `reindex` go on needing."""
    found = []
    for batch in batches(version_ids, 100):
        kept: dict[int, set[str]] = {
            row.id: {row.manifest_digest}
            for row in connection.execute(
                select(version.c.id, version.c.manifest_digest).where(version.c.id.in_(batch))
            )
        }
        for version_id, digest in connection.execute(
            select(component.c.version_id, layout.c.digest)
            .join(layout, layout.c.id == component.c.layout_id)
            .where(component.c.version_id.in_(batch))
        ):
            kept[version_id].add(digest)
        rows = connection.execute(
            select(version_blob.c.version_id, blob.c.id, blob.c.digest, blob.c.size, blob.c.state, version_blob.c.role)
            .join(blob, blob.c.id == version_blob.c.blob_id)
            .where(version_blob.c.version_id.in_(batch))
            .order_by(version_blob.c.version_id, version_blob.c.position)
        )
        for row in rows:
            if row.digest not in kept[row.version_id]:
                size = row.size if row.state == "present" else 0
                found.append(Need(row.version_id, row.id, row.digest, size, row.role))
    return found


def without_need(connection: Connection, blob_ids: Iterable[int], *, ended: Sequence[Need] = ()) -> set[int]:
    """Those of these blobs that no version and no event needs.

    Args:
        ended: needs that are not counted.
    """
    not_counted: dict[int, int] = {}
    for need in ended:
        not_counted[need.blob_id] = not_counted.get(need.blob_id, 0) + 1
    free: set[int] = set()
    for batch in batches(sorted(set(blob_ids))):
        counts: dict[int, int] = {
            row.blob_id: row.n
            for row in connection.execute(
                select(version_blob.c.blob_id, func.count().label("n"))
                .where(version_blob.c.blob_id.in_(batch))
                .group_by(version_blob.c.blob_id)
            )
        }
        described = set(
            connection.scalars(select(described_blob.c.blob_id).where(described_blob.c.blob_id.in_(batch)).distinct())
        )
        free.update(one for one in batch if counts.get(one, 0) == not_counted.get(one, 0) and one not in described)
    return free
