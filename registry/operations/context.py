"""The open registry that every operation works on: its database, its store, and who is acting."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from registry.catalog.engine import Database
from registry.catalog.journal_rows import has_pending, mark_journaled, pending_events
from registry.catalog.names import LockedName, lock_name
from registry.core.errors import Contended, Corrupt, ReadOnly, StorageError
from registry.core.event import Event
from registry.store.interface import Store

T = TypeVar("T")

OUTBOX_BATCH = 1000
TRIES = 5
"""Of a transaction that the database ended for another writer's sake."""


@dataclass
class Context:
    """Everything that an operation needs; safe to use from several threads."""

    database: Database
    store: Store

    @property
    def writable(self) -> bool:
        return self.store.writable and self.database.writable

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self.database.reading() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """
        Raises:
            ReadOnly
        """
        self.require_writable()
        with self.database.writing() as connection:
            yield connection

    def require_writable(self) -> None:
        """
        Raises:
            ReadOnly
        """
        if not self.writable:
            raise ReadOnly(f"the registry {self.database.what} cannot be written by this user; ask its owner")

    def lock(self, connection: Connection, namespace: str, name: str, *, create: bool = False) -> LockedName:
        """Locks a name until the transaction ends.

        Raises:
            ArtifactNotFound
            Corrupt: the journal goes on where the catalog ends, so the catalog is an older one.
        """
        locked = lock_name(connection, namespace, name, at=now(), create=create)
        if self.store.journal.contains(namespace, name, locked.last_seq + 1):
            raise Corrupt(
                f"the catalog {self.database.what} knows {locked.last_seq} events of {namespace}/{name}, the journal "
                "knows more: an older catalog was put back; bring back the newer one"
            )
        return locked

    def journal(self, events: Sequence[Event]) -> None:
        """Writes the journal objects of committed events, then takes them out of the outbox.

        Raises:
            Corrupt: another document stands where one of them belongs.
            StorageError: the events stay in the outbox, and so the next opening writes them.
        """
        if not events:
            return
        try:
            for event in events:
                document = event.document(self.store.registry_id)
                self.store.journal.append(event.namespace, event.name, event.seq, document)
            until_done(partial(self._take_out, events))
        except StorageError as error:
            told = type(error)(f"{error} (what was done stands; opening the registry again completes its journal)")
            told.errno = error.errno
            raise told from error

    def _take_out(self, events: Sequence[Event]) -> None:
        with self.database.writing() as connection:
            mark_journaled(connection, events)

    def flush_outbox(self) -> int:
        """Writes what a crash left between a commit and its journal objects.

        Returns:
            How many events were pending.
        """
        flushed = 0
        while True:
            with self.database.reading() as connection:
                pending = pending_events(connection, OUTBOX_BATCH) if has_pending(connection) else []
            self.journal(pending)
            flushed += len(pending)
            # Not until nothing is pending: beside busy writers that time may never come.
            if len(pending) < OUTBOX_BATCH:
                return flushed


def now() -> datetime:
    return datetime.now(UTC)


def actor() -> str:
    """Who is acting: `$REGISTRY_ACTOR`, else the login name."""
    named = os.environ.get("REGISTRY_ACTOR", "").strip()
    if named:
        # The environment may hold bytes that are no text, and the journal holds text alone.
        return named.encode("utf-8", "replace").decode("utf-8")[:128]
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def under_lock(context: Context, namespace: str, name: str, change: Callable[[LockedName, datetime], T]) -> T:
    """Runs `change` in a writing transaction that holds a name's lock, then journals what it appended.

    Raises:
        ArtifactNotFound, ReadOnly, and what `change` raises; then nothing has changed.
    """

    def once() -> tuple[T, Sequence[Event]]:
        with context.writing() as connection:
            locked = context.lock(connection, namespace, name)
            # After the wait for the lock: nobody can have asked about a later moment yet.
            result = change(locked, now())
            locked.save()
        return result, locked.appended

    result, events = until_done(once)
    context.journal(events)
    return result


def until_done(transaction: Callable[[], T]) -> T:
    """Runs a transaction, and once more each time that the database ends it for another writer's sake, as PostgreSQL
    does with one of two that wait for each other.

    Raises:
        Contended: `TRIES` times in a row; and what `transaction` raises.
    """
    for _ in range(TRIES - 1):
        with suppress(Contended):
            return transaction()
    return transaction()
