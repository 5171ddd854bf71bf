"""Garbage collection: removed versions are purged when their grace period is over, and what nothing needs then is
deleted. One at a time, by a lease; killed at any point, the next one goes on. Pushes need not wait for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import groupby
from typing import TypeVar

from sqlalchemy import Connection

from registry.catalog import garbage, leases, removal
from registry.catalog.garbage import BlobRow, Place
from registry.catalog.names import LockedName
from registry.catalog.removal import Need, Removed
from registry.catalog.rows import batches
from registry.core.errors import BlobNotFound, Contended, InvalidInput
from registry.operations.context import Context, actor, now, under_lock, until_done
from registry.operations.deleting import TURN, delete_marked
from registry.store.interface import Temporary

T = TypeVar("T")

GRACE = timedelta(days=7)
"""How long a removed version can be restored, and how old an orphan has to be."""

WRITING = timedelta(hours=1)
"""A temporary file that was written to since then may be a push at work, whatever grace period is asked for."""

LEASE = timedelta(minutes=2)
PURPOSE = "gc"
VERSIONS = 50
"""Versions of one name that are purged in one transaction."""


@dataclass(frozen=True)
class Deleted:
    """A blob that is gone.

    Attributes:
        size: bytes that were freed.
        roles: in which the purged versions needed it; empty where an earlier, interrupted run had purged them.
        held_by: those versions, `namespace/name@number`.
    """

    digest: str
    size: int
    roles: tuple[str, ...]
    held_by: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """A blob of a purged version that others still need.

    Attributes:
        kept_by: the oldest few of those, removed ones included.
        holders: how many there are.
    """

    digest: str
    size: int
    roles: tuple[str, ...]
    held_by: tuple[str, ...]
    kept_by: tuple[str, ...]
    holders: int


@dataclass(frozen=True)
class Collected:
    """What a garbage collection did, or would do.

    Attributes:
        purged: versions that cannot be restored any more, `namespace/name@number`.
        waiting: removed versions whose grace period is not over.
        deleted: the largest first.
        kept: the same.
        orphans: (digest, bytes) of blobs that no version ever had: a push ended before its time.
        temporaries: (name, bytes) of what such a push was just writing.
        bytes_freed: of all these.
    """

    dry_run: bool
    grace: timedelta
    purged: tuple[str, ...]
    waiting: tuple[str, ...]
    deleted: tuple[Deleted, ...]
    kept: tuple[Kept, ...]
    orphans: tuple[tuple[str, int], ...]
    temporaries: tuple[tuple[str, int], ...]

    @property
    def bytes_freed(self) -> int:
        beside = (*self.orphans, *self.temporaries)
        return sum(blob.size for blob in self.deleted) + sum(size for _, size in beside)


def collect(context: Context, *, grace: timedelta = GRACE, dry_run: bool = False) -> Collected:
    """Collects garbage; see `Registry.gc`."""
    at = now()
    try:
        before = at - grace
    except OverflowError as error:
        raise InvalidInput(f"grace period {grace}; expected one that began in the years that there are") from error
    if grace < timedelta(0):
        raise InvalidInput(f"grace period {grace}; expected 0 or more")
    if dry_run:
        return _plan(context, grace, at, before)
    context.require_writable()
    with _lease(context) as lease:
        return _collect(context, lease, grace, at, before)


def _plan(context: Context, grace: timedelta, at: datetime, before: datetime) -> Collected:
    """What `_collect` would do, from one snapshot of the catalog."""
    with context.reading() as connection:
        removed = removal.removed_versions(connection)
        due = [one for one in removed if one.at <= before]
        needs = removal.needs_of(connection, [one.id for one in due])
        free = removal.without_need(connection, [need.blob_id for need in needs], ended=needs)
        unneeded = {one.id: one for one in garbage.unneeded_blobs(connection, before)}
        unneeded.update((one.id, one) for one in garbage.old_blobs(connection, free, before))
        staying = {need.blob_id for need in needs} - unneeded.keys()
        holders = garbage.holders_of(connection, staying, less_removed_before=before)
    sizes = {one.digest: one.size if context.store.blobs.contains(one.digest) else 0 for one in unneeded.values()}
    orphans = {digest: size for batch in _orphans(context, before) for digest, size in batch.items()}
    return _report(True, grace, removed, due, needs, sizes, holders, orphans, _temporaries(context, at, before))


def _collect(context: Context, lease: _Lease, grace: timedelta, at: datetime, before: datetime) -> Collected:
    with context.reading() as connection:
        removed = removal.removed_versions(connection)
        needs = removal.needs_of(connection, [one.id for one in removed if one.at <= before])
    purged = _purge(context, lease, [one for one in removed if one.at <= before], before)
    gone = {one.id for one in purged}
    needs = [need for need in needs if need.version_id in gone]
    with context.reading() as connection:
        unneeded = garbage.unneeded_blobs(connection, before)
    sizes = _delete_blobs(context, lease, unneeded)
    _forget_layouts(context, lease)
    orphans: dict[str, int] = {}
    for batch in _orphans(context, before):
        lease.keep()
        orphans.update(_delete_orphans(context, batch))
    temporaries = _temporaries(context, at, before)
    for temporary in temporaries:
        lease.keep()
        context.store.remove_temporary(temporary.name)
    with context.reading() as connection:
        staying = {need.blob_id for need in needs if need.digest not in sizes}
        holders = garbage.holders_of(connection, staying)
    left = [one for one in removed if one.at > before]
    return _report(False, grace, [*purged, *left], purged, needs, sizes, holders, orphans, temporaries)


class _Lease:
    """The lease of a `gc` at work, which makes it last longer when a good part of it is over."""

    def __init__(self, context: Context, held: leases.Lease) -> None:
        self._context = context
        self.held = held

    def keep(self) -> None:
        """
        Raises:
            InUse: another has taken it.
        """
        at = now()
        if self.held.expires_at - at < LEASE * 2 / 3:
            self.held = _write(self._context, lambda connection: leases.renew(connection, self.held, at, LEASE))


@contextmanager
def _lease(context: Context) -> Iterator[_Lease]:
    holder = f"{socket.gethostname()}, process {os.getpid()}, {actor()}"
    lease = _Lease(context, _write(context, lambda connection: leases.take(connection, PURPOSE, holder, now(), LEASE)))
    try:
        yield lease
    finally:
        _write(context, lambda connection: leases.release(connection, lease.held))


def _write(context: Context, change: Callable[[Connection], T]) -> T:
    """A change of rows that no name's lock guards, in a transaction of its own."""

    def once() -> T:
        with context.writing() as connection:
            return change(connection)

    return until_done(once)


def _purge(context: Context, lease: _Lease, due: Sequence[Removed], before: datetime) -> list[Removed]:
    """Purges versions, some of one name in each transaction; those that were restored meanwhile stay."""
    purged: list[Removed] = []
    for (namespace, name), of_name in groupby(due, lambda one: (one.namespace, one.name)):
        for batch in batches(of_name, VERSIONS):
            lease.keep()
            by_id = {one.id: one for one in batch}

            def change(locked: LockedName, at: datetime, by_id: dict[int, Removed] = by_id) -> list[Removed]:
                keys = removal.still_removed(locked.connection, list(by_id), before)
                return [by_id[key.id] for key in keys if removal.purge(locked, key, actor=actor(), at=at)]

            purged += under_lock(context, namespace, name, change)
    return purged


def _delete_blobs(context: Context, lease: _Lease, unneeded: Sequence[BlobRow]) -> dict[str, int]:
    """Bytes that were freed, by digest."""
    others = _other_places(context, lease, unneeded)
    freed: dict[str, int] = {}
    for batch in batches(unneeded, TURN):
        lease.keep()
        marked = _write(context, partial(garbage.mark_deleting, blob_ids=[one.id for one in batch], others=others))
        freed.update(delete_marked(context, [one.digest for one in marked]))
    return freed


def _other_places(context: Context, lease: _Lease, leaving: Sequence[BlobRow]) -> dict[int, Place]:
    """Where else the tensors lie that the index would lose with these blobs."""
    ids = {one.id for one in leaving}
    with context.reading() as connection:
        prefixes = garbage.indexed_prefixes(connection, ids)
    found: dict[int, Place] = {}
    after: int | None = 0
    while prefixes and after is not None:
        lease.keep()
        with context.reading() as connection:
            more, after = garbage.other_places(connection, prefixes, ids, after=after)
        found.update(more)
        prefixes -= more.keys()
    return found


def _forget_layouts(context: Context, lease: _Lease) -> None:
    with context.reading() as connection:
        unneeded = garbage.unneeded_layouts(connection)
    for batch in batches(unneeded, TURN):
        lease.keep()
        _write(context, partial(garbage.forget_layouts, layout_ids=batch))


def _orphans(context: Context, before: datetime) -> Iterator[dict[str, int]]:
    """Bytes by digest of old blobs in the store that no row has, some at a time."""
    blobs = context.store.blobs
    for batch in batches(blobs.digests()):
        with context.reading() as connection:
            unknown = garbage.unknown_digests(connection, batch)
        found = {}
        for digest in unknown:
            with suppress(BlobNotFound):  # a push has just ended its deletion
                if blobs.modified_at(digest) <= before:
                    found[digest] = blobs.size(digest)
        yield found


def _delete_orphans(context: Context, sizes: dict[str, int]) -> dict[str, int]:
    if not sizes:
        return {}
    try:
        marked = _write(context, lambda connection: garbage.mark_orphans(connection, sizes, now()))
    except Contended:
        return {}  # a push is registering some of them at this moment; what is left of them is there the next time
    return delete_marked(context, marked)


def _temporaries(context: Context, at: datetime, before: datetime) -> list[Temporary]:
    return context.store.stale_temporaries(min(before, at - WRITING))


def _report(
    dry_run: bool,
    grace: timedelta,
    removed: Sequence[Removed],
    purged: Sequence[Removed],
    needs: Sequence[Need],
    sizes: dict[str, int],
    holders: dict[int, garbage.Holders],
    orphans: dict[str, int],
    temporaries: Sequence[Temporary],
) -> Collected:
    names = {one.id: one.reference for one in purged}
    of_blob: dict[str, list[Need]] = {}
    for need in needs:
        of_blob.setdefault(need.digest, []).append(need)
    deleted, kept = [], []
    for digest, size in sizes.items():
        ended = of_blob.pop(digest, [])
        deleted.append(Deleted(digest, size, _roles(ended), tuple(names[need.version_id] for need in ended)))
    for digest, ended in of_blob.items():
        held_by = tuple(names[need.version_id] for need in ended)
        by = holders.get(ended[0].blob_id, garbage.Holders((), 0))
        kept.append(Kept(digest, ended[0].size, _roles(ended), held_by, by.first, by.count))
    return Collected(
        dry_run=dry_run,
        grace=grace,
        purged=tuple(one.reference for one in purged),
        waiting=tuple(one.reference for one in removed if one.id not in names),
        deleted=tuple(sorted(deleted, key=lambda one: (-one.size, one.digest))),
        kept=tuple(sorted(kept, key=lambda one: (-one.size, one.digest))),
        orphans=tuple(sorted(orphans.items())),
        temporaries=tuple(sorted((one.name, one.size) for one in temporaries)),
    )


def _roles(needs: Sequence[Need]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(need.role for need in needs))
