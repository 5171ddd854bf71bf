"""What is kept beside a version: blobs that `described` events name, each for a role (`probe`, `live_names`, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import Connection, and_, insert, select

from registry.catalog.blobs import NewBlob, register_blobs
from registry.catalog.names import LockedName
from registry.catalog.tables import blob, described_blob, event
from registry.catalog.versions import VersionKey


def add_descriptions(
    name: LockedName, version: VersionKey, blobs: Mapping[str, NewBlob], *, actor: str, at: datetime
) -> None:
    """Appends a `described` event that names these blobs, which are in the store, by role; none: no event.

    Raises:
        InUse: gc is deleting one of them.
    """
    if not blobs:
        return
    ids = register_blobs(name.connection, blobs.values(), {}, name.time_of_event(at))
    payload = {"blobs": {role: stored.digest for role, stored in blobs.items()}}
    appended = name.append("described", payload, actor=actor, at=at, version=(version.id, version.number))
    name.connection.execute(
        insert(described_blob),
        [
            {"artifact_id": name.id, "seq": appended.seq, "role": role, "blob_id": ids[stored.digest]}
            for role, stored in sorted(blobs.items())
        ],
    )


def descriptions_of(connection: Connection, version_id: int) -> dict[str, str]:
    """Digests of the blobs that describe a version, the newest of each role."""
    rows = connection.execute(
        select(described_blob.c.role, blob.c.digest)
        .join(
            event,
            and_(event.c.artifact_id == described_blob.c.artifact_id, event.c.seq == described_blob.c.seq),
        )
        .join(blob, blob.c.id == described_blob.c.blob_id)
        .where(event.c.version_id == version_id)
        .order_by(event.c.seq)
    )
    return {row.role: row.digest for row in rows}
