"""Tags: movable pointers whose every move is an event."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select, update

from registry.catalog.names import LockedName
from registry.catalog.tables import tag, version
from registry.catalog.versions import VersionKey, gone
from registry.core.errors import TagMoved, TagNotFound, TagProtected
from registry.core.event import Event


def current(name: LockedName, tag_name: str) -> tuple[int, int, bool] | None:
    """(version row id, number, protected) of a tag under the name's lock; None where there is no such tag."""
    row = name.connection.execute(
        select(tag.c.version_id, version.c.number, tag.c.protected)
        .join(version, version.c.id == tag.c.version_id)
        .where(tag.c.artifact_id == name.id, tag.c.name == tag_name)
    ).one_or_none()
    return None if row is None else (row.version_id, row.number, row.protected)


def move(
    name: LockedName,
    tag_name: str,
    to: VersionKey,
    *,
    actor: str,
    at: datetime,
    why: str | None = None,
    expected: int | None = None,
) -> Event | None:
    """Points a tag at a version; makes the tag where it is not there.

    Args:
        expected: number that the tag must point to before (0: the tag must not exist).

    Returns:
        The event, or None where the tag points there already.

    Raises:
        TagProtected: it is protected and would move.
        TagMoved: it does not point to `expected`.
    """
    at = name.time_of_event(at)
    there = current(name, tag_name)
    _check_expected(name, tag_name, there, expected)
    if there is None:
        name.connection.execute(
            insert(tag).values(artifact_id=name.id, name=tag_name, version_id=to.id, protected=False, moved_at=at)
        )
    elif there[0] == to.id:
        return None
    elif there[2]:
        raise protected(name.reference, tag_name, there[1])
    else:
        name.connection.execute(
            update(tag)
            .where(tag.c.artifact_id == name.id, tag.c.name == tag_name)
            .values(version_id=to.id, moved_at=at)
        )
    payload = {"from": there[1] if there else None, "to": to.number, "why": why}
    return name.append("tag_moved", payload, actor=actor, at=at, version=(to.id, to.number), tag=tag_name)


def protected(reference: str, tag_name: str, number: int) -> TagProtected:
    """The refusal to move or delete a protected tag."""
    return TagProtected(
        f"{reference}:{tag_name} is protected and stays at @{number}; lift the protection first: "
        f"registry tag {reference} {tag_name} --unprotect"
    )


def _check_expected(name: LockedName, tag_name: str, there: tuple[int, int, bool] | None, expected: int | None) -> None:
    if expected is not None and (there[1] if there else 0) != expected:
        found = f"@{there[1]}" if there else "nothing"
        raise TagMoved(
            f"{name.reference}:{tag_name} points to {found}, expected "
            f"{f'@{expected}' if expected else 'nothing'}; somebody moved it: look again and repeat"
        )


def protect(
    name: LockedName,
    tag_name: str,
    *,
    on: bool,
    actor: str,
    at: datetime,
    why: str | None = None,
    expected: int | None = None,
) -> Event | None:
    """Protects a tag, or lifts the protection.

    Returns:
        The event, or None where nothing changes.

    Raises:
        TagNotFound
        TagMoved: it does not point to `expected`.
        VersionNotFound: what would be protected is removed.
    """
    there = current(name, tag_name)
    if there is None:
        raise TagNotFound(f"{name.reference} has no tag {tag_name}")
    _check_expected(name, tag_name, there, expected)
    if there[2] == on:
        return None
    if on:
        state = name.connection.execute(select(version.c.state).where(version.c.id == there[0])).scalar_one()
        if state != "present":
            raise gone(f"{name.reference}@{there[1]}", state, pointer=f"{name.reference}:{tag_name}")
    name.connection.execute(
        update(tag).where(tag.c.artifact_id == name.id, tag.c.name == tag_name).values(protected=on)
    )
    kind = "tag_protected" if on else "tag_unprotected"
    return name.append(kind, {"why": why}, actor=actor, at=at, version=there[:2], tag=tag_name)


def remove(
    name: LockedName,
    tag_name: str,
    *,
    actor: str,
    at: datetime,
    why: str | None = None,
    expected: int | None = None,
) -> Event:
    """Deletes a tag; its history stays.

    Raises:
        TagNotFound, TagProtected
        TagMoved: it does not point to `expected`.
    """
    there = current(name, tag_name)
    if there is None:
        raise TagNotFound(f"{name.reference} has no tag {tag_name}")
    _check_expected(name, tag_name, there, expected)
    if there[2]:
        raise protected(name.reference, tag_name, there[1])
    name.connection.execute(delete(tag).where(tag.c.artifact_id == name.id, tag.c.name == tag_name))
    payload = {"from": there[1], "why": why}
    return name.append("tag_deleted", payload, actor=actor, at=at, version=there[:2], tag=tag_name)


def refuse_protected(connection: Connection, artifact_id: int, reference: str, tag_names: Sequence[str]) -> None:
    """
    Raises:
        TagProtected: one of these tags of a name is protected.
    """
    for row in connection.execute(
        select(tag.c.name, version.c.number)
        .join(version, version.c.id == tag.c.version_id)
        .where(tag.c.artifact_id == artifact_id, tag.c.name.in_(tag_names), tag.c.protected)
    ):
        raise protected(reference, row.name, row.number)
