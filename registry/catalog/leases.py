"""Leases: who is at work that lasts longer than a transaction and that only one may do at a time. A lease that its
holder did not renew runs out, so that a crash blocks nobody for long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, and_, delete, select, update

from registry.catalog.rows import insert_missing
from registry.catalog.tables import lease
from registry.core.errors import InUse
from registry.core.event import format_moment


@dataclass(frozen=True)
class Lease:
    """A lease that is held.

    Attributes:
        purpose: there is one lease for each.
        holder: host, process and user; together with `acquired_at` it tells this lease from others.
    """

    purpose: str
    holder: str
    acquired_at: datetime
    expires_at: datetime


def take(connection: Connection, purpose: str, holder: str, at: datetime, length: timedelta) -> Lease:
    """Takes the one lease of a purpose, also from a holder whose time has run out.

    One that lasts more than twice as long as any does was given by a clock that is ahead, and holds nobody up either.

    Raises:
        InUse: somebody holds it.
    """
    mine = Lease(purpose, holder, at, at + length)
    row = {"id": purpose, "purpose": purpose, "holder": holder, "acquired_at": at, "expires_at": mine.expires_at}
    there = None
    while there is None:  # one that was in the way can be given back before it is looked at
        insert_missing(connection, lease, [row])
        there = connection.execute(select(lease).where(lease.c.id == purpose).with_for_update()).one_or_none()
    if (there.holder, there.acquired_at) == (holder, at):
        return mine
    if at < there.expires_at <= at + 2 * length:
        raise InUse(
            f"{purpose} is at work since {format_moment(there.acquired_at)} ({there.holder}); wait for it. "
            f"If it was killed, its lease runs out at {format_moment(there.expires_at)}"
        )
    connection.execute(update(lease).where(lease.c.id == purpose).values(row))
    return mine


def renew(connection: Connection, held: Lease, at: datetime, length: timedelta) -> Lease:
    """Makes a lease last longer.

    Raises:
        InUse: it had run out, and somebody else has taken it.
    """
    renewed = replace(held, expires_at=at + length)
    done = connection.execute(update(lease).where(_is(held)).values(expires_at=renewed.expires_at))
    if not done.rowcount:
        raise InUse(
            f"the lease of this {held.purpose} ran out at {format_moment(held.expires_at)}, and another {held.purpose} "
            "goes on in its place; what was done until now stands"
        )
    return renewed


def release(connection: Connection, held: Lease) -> None:
    """Gives a lease back; one that somebody else has taken stays theirs."""
    connection.execute(delete(lease).where(_is(held)))


def _is(held: Lease) -> ColumnElement[bool]:
    return and_(lease.c.id == held.purpose, lease.c.holder == held.holder, lease.c.acquired_at == held.acquired_at)
