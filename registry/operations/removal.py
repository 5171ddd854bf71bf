"""Taking versions away and bringing them back: several at once, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from registry.catalog import removal
from registry.catalog.names import LockedName
from registry.catalog.versions import VersionKey, resolve, tags_of
from registry.core.annotations import check_text
from registry.core.errors import InvalidInput, InvalidReference
from registry.core.event import Event
from registry.core.reference import LATEST, parse_reference
from registry.operations.context import Context, actor, now, until_done


@dataclass(frozen=True)
class Removal:
    """A version that was removed or restored.

    Attributes:
        name: `namespace/name`.
        version: its number.
        digest: of its manifest, hex.
        tags: those that point to it; they stay.
        changed: False where it was so before.
    """

    name: str
    version: int
    digest: str
    tags: tuple[str, ...]
    changed: bool

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


def remove(context: Context, references: Sequence[str], *, why: str | None = None) -> tuple[Removal, ...]:
    """Removes versions; see `Registry.remove`."""

    def change(name: LockedName, key: VersionKey) -> Event | None:
        return removal.remove(name, key, actor=actor(), at=now(), why=why)

    # What came from another is the younger one, so it goes first.
    return _change(context, references, why, change, removed=False, youngest_first=True)


def restore(context: Context, references: Sequence[str], *, why: str | None = None) -> tuple[Removal, ...]:
    """Brings removed versions back; see `Registry.restore`."""
    for reference in references:
        parsed = parse_reference(reference)
        if parsed.number is None and parsed.digest is None and parsed.tag in (None, LATEST):
            raise InvalidReference(
                f"{reference}: which version of it? Name one by number, digest or tag, as {parsed.artifact}@1"
            )

    def change(name: LockedName, key: VersionKey) -> Event | None:
        return removal.restore(name, key, actor=actor(), at=now(), why=why)

    return _change(context, references, why, change, removed=True, youngest_first=False)


def _change(
    context: Context,
    references: Sequence[str],
    why: str | None,
    change: Callable[[LockedName, VersionKey], Event | None],
    *,
    removed: bool,
    youngest_first: bool,
) -> tuple[Removal, ...]:
    if isinstance(references, str) or not references:
        raise InvalidInput("give the references of the versions, at least one")
    if why is not None:
        check_text(why, "reason")
    wanted = [parse_reference(reference) for reference in references]

    def once() -> tuple[list[Event], tuple[Removal, ...]]:
        with context.writing() as connection:
            # In one order for all, so that two that take several never wait for each other.
            names = {
                name: context.lock(connection, *name) for name in sorted({(one.namespace, one.name) for one in wanted})
            }
            found = {
                key.id: (names[one.namespace, one.name], key)
                for one in wanted
                for key in [resolve(connection, one, removed=removed)]
            }
            removal.lock_versions(connection, found)
            events = {identifier: change(*found[identifier]) for identifier in sorted(found, reverse=youngest_first)}
            tags = tags_of(connection, found)
            for name in names.values():
                name.save()
        appended = [event for name in names.values() for event in name.appended]
        return appended, tuple(
            Removal(name.reference, key.number, key.digest, tags.get(key.id, ()), events[key.id] is not None)
            for name, key in found.values()
        )

    appended, removals = until_done(once)
    context.journal(appended)
    return removals
