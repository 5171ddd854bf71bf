"""Moving, protecting and deleting tags, and their history."""

from __future__ import annotations

from datetime import datetime

from registry.catalog import tags
from registry.catalog.journal_rows import events_of
from registry.catalog.names import LockedName
from registry.catalog.versions import VersionKey, resolve
from registry.core.annotations import check_text
from registry.core.errors import TagNotFound
from registry.core.event import Event
from registry.core.reference import check_new_tag, parse_reference
from registry.operations.context import Context, actor, under_lock


def move_tag(
    context: Context,
    reference: str,
    tag: str,
    *,
    why: str | None = None,
    expected: int | None = None,
    protect: bool = False,
) -> tuple[VersionKey, bool]:
    """Points a tag at the version that `reference` names, and protects it there if so asked, in one step.

    Returns:
        The version, and whether the tag moved.
    """
    check_new_tag(tag)
    _check_why(why)
    parsed = parse_reference(reference)

    def change(name: LockedName, at: datetime) -> tuple[VersionKey, bool]:
        version = resolve(name.connection, parsed)
        moved = tags.move(name, tag, version, actor=actor(), at=at, why=why, expected=expected)
        if protect:
            tags.protect(name, tag, on=True, actor=actor(), at=at, why=why)
        return version, moved is not None

    return under_lock(context, parsed.namespace, parsed.name, change)


def protect_tag(
    context: Context, artifact: str, tag: str, *, on: bool, why: str | None = None, expected: int | None = None
) -> bool:
    """Protects a tag or lifts its protection; True where that changed anything."""
    check_new_tag(tag)
    _check_why(why)
    parsed = parse_reference(artifact)
    return under_lock(
        context,
        parsed.namespace,
        parsed.name,
        lambda name, at: tags.protect(name, tag, on=on, actor=actor(), at=at, why=why, expected=expected) is not None,
    )


def delete_tag(
    context: Context, artifact: str, tag: str, *, why: str | None = None, expected: int | None = None
) -> None:
    """Deletes a tag; its history stays."""
    check_new_tag(tag)
    _check_why(why)
    parsed = parse_reference(artifact)
    under_lock(
        context,
        parsed.namespace,
        parsed.name,
        lambda name, at: tags.remove(name, tag, actor=actor(), at=at, why=why, expected=expected),
    )


def _check_why(why: str | None) -> None:
    if why is not None:
        check_text(why, "reason")


def tag_history(context: Context, artifact: str, tag: str) -> list[Event]:
    """Every event of a tag, oldest first.

    Raises:
        ArtifactNotFound, TagNotFound: the name never had this tag.
    """
    parsed = parse_reference(artifact)
    with context.reading() as connection:
        events = events_of(connection, parsed.namespace, parsed.name, tag=tag)
    if not events:
        raise TagNotFound(f"{parsed.artifact} never had a tag {tag}")
    return events
