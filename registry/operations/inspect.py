"""Questions about versions: lists, one version in full, and lineage. Only the catalog is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from registry.catalog.annotation_rows import metadata_of, metrics_of
from registry.catalog.journal_rows import events_of
from registry.catalog.lineage import Edge, references, walk
from registry.catalog.removal import states
from registry.catalog.search import Search, find_ids
from registry.catalog.versions import VersionKey, VersionRecord, records, resolve
from registry.core.annotations import MetadataValue, MetricValue
from registry.core.errors import InvalidInput
from registry.core.event import Event
from registry.core.findings import Finding
from registry.core.manifest import KINDS
from registry.core.query import parse_sort, parse_where
from registry.core.reference import check_tag, parse_reference, shown
from registry.operations.context import Context

if TYPE_CHECKING:
    from registry.catalog.contents import Contents


@dataclass(frozen=True)
class Found:
    """A version with what was said of it."""

    record: VersionRecord
    metadata: dict[str, MetadataValue]
    metrics: dict[str, MetricValue]


@dataclass(frozen=True)
class Details:
    """All that the catalog knows of one version."""

    found: Found
    contents: Contents
    findings: tuple[Finding, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Lineage:
    """The edges around one version.

    Attributes:
        names: `namespace/name@number` by row id, for every version in the edges.
        removed: row ids of those that are not there any more.
    """

    id: int
    ancestors: tuple[Edge, ...]
    descendants: tuple[Edge, ...]
    names: dict[int, str]
    removed: frozenset[int] = frozenset()


def search(
    context: Context,
    *,
    pattern: str | None = None,
    where: Sequence[str] = (),
    base: str | None = None,
    tag: str | None = None,
    kind: str | None = None,
    order_by: str | None = None,
    limit: int | None = None,
) -> list[Found]:
    """Versions that satisfy all of this; see `Registry.find`."""
    if kind is not None and kind not in KINDS:
        raise InvalidInput(f"kind '{shown(kind)}'; expected one of {', '.join(KINDS)}")
    if limit is not None and limit < 0:
        raise InvalidInput(f"limit {limit}; expected 0 or more")
    if tag is not None:
        check_tag(tag)
    conditions = parse_where(where)
    sort = None if order_by is None else parse_sort(order_by)
    with context.reading() as connection:
        ids = find_ids(connection, Search(pattern, base, tag, kind, conditions, sort, limit))
        return found_of(connection, ids)


def get(context: Context, reference: str) -> Found:
    """The version that a reference names."""
    with context.reading() as connection:
        return found_of(connection, [resolve(connection, parse_reference(reference)).id])[0]


def get_key(context: Context, key: VersionKey) -> Found:
    """The version of a key that an operation gave."""
    with context.reading() as connection:
        return found_of(connection, [key.id])[0]


def pinned(context: Context, reference: str) -> str:
    """The pinned form of a reference, `namespace/name@number`."""
    parsed = parse_reference(reference)
    with context.reading() as connection:
        return f"{parsed.artifact}@{resolve(connection, parsed).number}"


def details(context: Context, reference: str) -> Details:
    """One version in full."""
    # Knows all about adapters' tensor names; a list or a tag needs none of it.
    from registry.catalog.contents import findings_of, read_contents

    parsed = parse_reference(reference)
    with context.reading() as connection:
        key = resolve(connection, parsed)
        return Details(
            found_of(connection, [key.id])[0],
            read_contents(connection, key.id),
            findings_of(connection, key.id),
            tuple(events_of(connection, parsed.namespace, parsed.name, version_id=key.id)),
        )


def lineage(context: Context, reference: str) -> Lineage:
    """The versions that one came from and those that came from it."""
    with context.reading() as connection:
        key = resolve(connection, parse_reference(reference))
        ancestors = walk(connection, key.id, up=True)
        descendants = walk(connection, key.id, up=False)
        ids = {key.id, *(i for edge in (*ancestors, *descendants) for i in (edge.child_id, edge.parent_id))}
        removed = frozenset(one for one, state in states(connection, ids).items() if state != "present")
        return Lineage(key.id, tuple(ancestors), tuple(descendants), references(connection, sorted(ids)), removed)


def found_of(connection: Connection, ids: Sequence[int]) -> list[Found]:
    """The versions with these row ids, in their order."""
    metadata, metrics = metadata_of(connection, ids), metrics_of(connection, ids)
    return [
        Found(record, metadata.get(record.id, {}), metrics.get(record.id, {})) for record in records(connection, ids)
    ]
