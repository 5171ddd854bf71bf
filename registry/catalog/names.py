"""Names (`namespace/name`): their row, their lock, and the events that are appended under it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update

from registry.catalog.rows import insert_missing
from registry.catalog.tables import artifact, event, outbox
from registry.core.errors import ArtifactNotFound, Corrupt
from registry.core.event import Event, payload_text
from registry.core.reference import shown


@dataclass
class LockedName:
    """One name within a writing transaction that holds its lock, so numbers and seqs have no gaps.

    Call `save` before the transaction ends.

    Attributes:
        appended: events of this transaction, to be journaled after its commit.
        replayed: an event of the journal that is to be appended again, where the catalog is being rebuilt from it.
    """

    connection: Connection
    id: int
    namespace: str
    name: str
    last_number: int
    last_seq: int
    last_event_at: datetime
    appended: list[Event] = field(default_factory=list)
    replayed: Event | None = None

    @property
    def reference(self) -> str:
        return f"{self.namespace}/{self.name}"

    def next_number(self) -> int:
        self.last_number += 1
        return self.last_number

    def time_of_event(self, now: datetime) -> datetime:
        """Now, or the time of the name's last event where the clock went back."""
        return max(now, self.last_event_at)

    def append(
        self,
        kind: str,
        payload: Mapping[str, Any],
        *,
        actor: str,
        at: datetime,
        version: tuple[int, int] | None = None,
        tag: str | None = None,
    ) -> Event:
        """Appends an event, still to be journaled.

        Args:
            at: now; never taken to be before the name's last event.
            version: (row id, number) of the version that it is about.

        Raises:
            Corrupt: `replayed` is another event than the one that follows from the state.
        """
        self.last_seq += 1
        self.last_event_at = self.time_of_event(at)
        row_id, number = version if version else (None, None)
        made = Event(
            self.namespace, self.name, self.last_seq, kind, number, tag, self.last_event_at, actor, dict(payload)
        )
        if self.replayed is not None and made != self.replayed:
            raise _another(made, self.replayed)
        self.connection.execute(
            insert(event).values(
                artifact_id=self.id,
                seq=self.last_seq,
                kind=kind,
                version_id=row_id,
                tag=tag,
                at=self.last_event_at,
                actor=actor,
                payload=payload_text(payload),
            )
        )
        if self.last_seq == 1:
            # The time of the lock would be a little earlier, and nothing but this row would know it.
            created = update(artifact).where(artifact.c.id == self.id).values(created_at=self.last_event_at)
            self.connection.execute(created)
        if self.replayed is None:
            self.connection.execute(insert(outbox).values(artifact_id=self.id, seq=self.last_seq))
        self.appended.append(made)
        return made

    def save(self) -> None:
        self.connection.execute(
            update(artifact)
            .where(artifact.c.id == self.id)
            .values(last_number=self.last_number, last_seq=self.last_seq, last_event_at=self.last_event_at)
        )


def _another(made: Event, replayed: Event) -> Corrupt:
    mine, theirs = vars(made), vars(replayed)
    member = next(name for name in mine if mine[name] != theirs[name])
    what = f"{member} {shown(repr(mine[member]), 200)}"
    return Corrupt(
        f"event {replayed.seq} of {replayed.namespace}/{replayed.name} ({replayed.kind}) does not follow from those "
        f"before it: expected {what}, found {shown(repr(theirs[member]), 200)}"
    )


def lock_name(connection: Connection, namespace: str, name: str, *, at: datetime, create: bool = False) -> LockedName:
    """Locks a name until the transaction ends.

    Args:
        at: creation time of a name that is made.
        create: make the name where it is not there.

    Raises:
        ArtifactNotFound
    """
    if create:
        insert_missing(
            connection,
            artifact,
            [{"namespace": namespace, "name": name, "last_event_at": at, "created_at": at}],
        )
    row = connection.execute(
        select(artifact.c.id, artifact.c.last_number, artifact.c.last_seq, artifact.c.last_event_at)
        .where(artifact.c.namespace == namespace, artifact.c.name == name)
        .with_for_update()
    ).one_or_none()
    if row is None:
        raise unknown_name(connection, namespace, name)
    return LockedName(connection, row.id, namespace, name, row.last_number, row.last_seq, row.last_event_at)


def name_id(connection: Connection, namespace: str, name: str) -> int:
    """
    Raises:
        ArtifactNotFound: with the nearest names there are.
    """
    found: int | None = connection.execute(
        select(artifact.c.id).where(artifact.c.namespace == namespace, artifact.c.name == name)
    ).scalar()
    if found is None:
        raise unknown_name(connection, namespace, name)
    return found


def unknown_name(connection: Connection, namespace: str, name: str) -> ArtifactNotFound:
    known = [
        f"{row.namespace}/{row.name}"
        for row in connection.execute(
            select(artifact.c.namespace, artifact.c.name).where(artifact.c.last_number > 0).limit(5000)
        )
    ]
    wanted = f"{namespace}/{name}"
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    hint = f"; did you mean {', '.join(near)}?" if near else "; 'registry list' shows what is there"
    return ArtifactNotFound(f"no artifact {wanted}{hint}")
