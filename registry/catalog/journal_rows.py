"""The outbox: events whose journal object is still to be written, and the history of a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, delete, select, tuple_

from registry.catalog.names import name_id
from registry.catalog.rows import batches
from registry.catalog.tables import artifact, event, outbox, version
from registry.core.event import Event, read_payload


def _events() -> Select[Any]:
    return (
        select(
            artifact.c.namespace,
            artifact.c.name,
            event.c.artifact_id,
            event.c.seq,
            event.c.kind,
            version.c.number,
            event.c.tag,
            event.c.at,
            event.c.actor,
            event.c.payload,
        )
        .select_from(event)
        .join(artifact, artifact.c.id == event.c.artifact_id)
        .outerjoin(version, version.c.id == event.c.version_id)
    )


def _event(row: Row[Any]) -> Event:
    return Event(
        row.namespace,
        row.name,
        row.seq,
        row.kind,
        row.number,
        row.tag,
        row.at,
        row.actor,
        read_payload(row.payload),
    )


def has_pending(connection: Connection) -> bool:
    return connection.execute(select(outbox.c.seq).limit(1)).first() is not None


def pending_events(connection: Connection, limit: int) -> list[Event]:
    """Events that are not journaled yet, oldest first within each name."""
    rows = connection.execute(
        _events()
        .join(outbox, and_(outbox.c.artifact_id == event.c.artifact_id, outbox.c.seq == event.c.seq))
        .order_by(outbox.c.artifact_id, outbox.c.seq)
        .limit(limit)
    )
    return [_event(row) for row in rows]


def mark_journaled(connection: Connection, events: Sequence[Event]) -> None:
    """Takes events out of the outbox."""
    by_name: dict[tuple[str, str], list[int]] = {}
    for one in events:
        by_name.setdefault((one.namespace, one.name), []).append(one.seq)
    for batch in batches(by_name, 100):
        ids = {
            (row.namespace, row.name): row.id
            for row in connection.execute(
                select(artifact.c.id, artifact.c.namespace, artifact.c.name).where(
                    tuple_(artifact.c.namespace, artifact.c.name).in_(batch)
                )
            )
        }
        for key in batch:
            of_name = outbox.c.artifact_id == ids[key]
            # What another process takes out is left to it: two that lock the same rows in two orders would never end.
            free = select(outbox.c.seq).where(of_name, outbox.c.seq.in_(by_name[key]))
            seqs = connection.scalars(free.order_by(outbox.c.seq).with_for_update(skip_locked=True)).all()
            if seqs:
                connection.execute(delete(outbox).where(of_name, outbox.c.seq.in_(seqs)))


def events_of(
    connection: Connection,
    namespace: str,
    name: str,
    *,
    tag: str | None = None,
    version_id: int | None = None,
) -> list[Event]:
    """The history of a name, of one of its tags or of one of its versions, oldest first.

    Raises:
        ArtifactNotFound
    """
    statement = _events().where(event.c.artifact_id == name_id(connection, namespace, name))
    if tag is not None:
        statement = statement.where(event.c.tag == tag)
    if version_id is not None:
        statement = statement.where(event.c.version_id == version_id)
    return [_event(row) for row in connection.execute(statement.order_by(event.c.seq))]
