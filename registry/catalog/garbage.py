"""What nothing needs any more: blobs with the rows that hang on them, and layouts. A blob is marked `deleting` when its
row was locked and no reference found; who has locked a row that is so marked removes the file, and the row with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Select, and_, delete, func, or_, select, union, update

from registry.catalog.blobs import INDEX_MIN_BYTES, read_layout
from registry.catalog.lineage import references
from registry.catalog.removal import ids_removed_before, without_need
from registry.catalog.rows import batches, insert_missing
from registry.catalog.tables import (
    blob,
    blob_tensors,
    component,
    described_blob,
    event,
    layout,
    layout_tensor,
    target,
    tensor_index,
    version,
    version_blob,
)
from registry.core.digest import DIGEST_BYTES

PREFIX_BYTES = 8
"""Of a digest, as `tensor_index` has them."""

NAMED = 3
"""Holders of a blob that are named; of more there is the number."""

SCANNED = 100
"""Blobs whose tensors are looked through in one turn."""


@dataclass(frozen=True, slots=True)
class BlobRow:
    """A blob as the catalog knows it; `state` as in the table."""

    id: int
    digest: str
    size: int
    state: str


@dataclass(frozen=True, slots=True)
class Holders:
    """Who needs a blob.

    Attributes:
        first: `namespace/name@number` of the oldest few.
        count: of all.
    """

    first: tuple[str, ...]
    count: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where else a tensor lies, by row id."""

    blob_id: int
    ordinal: int


def _rows() -> Select[int, str, int, str]:
    return select(blob.c.id, blob.c.digest, blob.c.size, blob.c.state)


def unneeded_blobs(connection: Connection, before: datetime) -> list[BlobRow]:
    """Blobs that no version and no event needs, in the order of their digests.

    Args:
        before: one that was registered later is left alone, unless its deletion had begun.
    """
    needed = select(version_blob.c.blob_id).where(version_blob.c.blob_id == blob.c.id).correlate(blob).exists()
    described = select(described_blob.c.blob_id).where(described_blob.c.blob_id == blob.c.id).correlate(blob).exists()
    old = or_(blob.c.created_at <= before, blob.c.state == "deleting")
    found = connection.execute(_rows().where(~needed, ~described, old).order_by(blob.c.digest))
    return [BlobRow(*row) for row in found]


def old_blobs(connection: Connection, blob_ids: Iterable[int], before: datetime) -> list[BlobRow]:
    """Those of these blobs that were registered before a moment."""
    found: list[BlobRow] = []
    for batch in batches(sorted(set(blob_ids))):
        rows = connection.execute(_rows().where(blob.c.id.in_(batch), blob.c.created_at <= before))
        found += [BlobRow(*row) for row in rows]
    return found


def mark_deleting(connection: Connection, blob_ids: Sequence[int], others: Mapping[int, Place]) -> list[BlobRow]:
    """Marks those of a batch of blobs that still nothing needs, and gives their tensors other places in the index.

    Args:
        others: from `other_places`.
    """
    # Locked first and looked at in a statement of its own: on PostgreSQL one that waited for a push does not see what
    # that push has inserted.
    locked = connection.scalars(
        select(blob.c.id).where(blob.c.id.in_(blob_ids)).order_by(blob.c.digest).with_for_update()
    ).all()
    free = sorted(without_need(connection, locked))
    found = connection.execute(_rows().where(blob.c.id.in_(free)).order_by(blob.c.digest))
    marked = [BlobRow(*row) for row in found]
    connection.execute(update(blob).where(blob.c.id.in_(free)).values(state="deleting"))
    lost = connection.scalars(
        select(tensor_index.c.prefix).where(tensor_index.c.blob_id.in_(free)).distinct().order_by(tensor_index.c.prefix)
    ).all()
    connection.execute(delete(tensor_index).where(tensor_index.c.blob_id.in_(free)))
    _index_again(connection, {prefix: others[prefix] for prefix in lost if prefix in others})
    return marked


def _index_again(connection: Connection, wanted: Mapping[int, Place]) -> None:
    for batch in batches(sorted(wanted)):
        present = set(
            connection.scalars(
                select(blob.c.id).where(
                    blob.c.id.in_(sorted({wanted[prefix].blob_id for prefix in batch})), blob.c.state == "present"
                )
            )
        )
        held = set(
            connection.scalars(
                select(tensor_index.c.prefix)
                .join(blob, blob.c.id == tensor_index.c.blob_id)
                .where(tensor_index.c.prefix.in_(batch), blob.c.state == "present")
            )
        )
        insert_missing(
            connection,
            tensor_index,
            [
                {"prefix": prefix, "blob_id": wanted[prefix].blob_id, "ordinal": wanted[prefix].ordinal}
                for prefix in batch
                if prefix not in held and wanted[prefix].blob_id in present
            ],
        )


def indexed_prefixes(connection: Connection, blob_ids: Iterable[int]) -> set[int]:
    """What the digest index knows of these blobs."""
    found: set[int] = set()
    for batch in batches(sorted(blob_ids)):
        found.update(connection.scalars(select(tensor_index.c.prefix).where(tensor_index.c.blob_id.in_(batch))))
    return found


def other_places(
    connection: Connection, prefixes: Collection[int], leaving: Collection[int], *, after: int
) -> tuple[dict[int, Place], int | None]:
    """One turn of looking for tensors in the present blobs that stay; the oldest blob that has one gets it.

    Of a tensor the index knows one holder alone, and no index leads from a digest to all of its holders, so the packed
    digests of all blobs are looked through, `SCANNED` blobs a turn: 0.07 s in all for 20,000 blobs of 16 tensors
    (benchmarks/collect_garbage.py).

    Args:
        prefixes: of the digests.
        leaving: row ids of blobs that do not stay.
        after: row id of the blob behind which this turn begins; 0 for the first.

    Returns:
        What was found, and where the next turn begins; None after the last one.
    """
    wanted = {prefix.to_bytes(PREFIX_BYTES, "big", signed=True) for prefix in prefixes}
    rows = connection.execute(
        select(blob.c.id, blob.c.layout_id, blob_tensors.c.digests)
        .join(blob_tensors, blob_tensors.c.blob_id == blob.c.id)
        .where(blob.c.id > after, blob.c.state == "present")
        .order_by(blob.c.id)
        .limit(SCANNED)
    ).all()
    found: dict[int, Place] = {}
    for row in rows:
        if row.id in leaving:
            continue
        packed = bytes(row.digests)
        hits = [at for at in range(0, len(packed), DIGEST_BYTES) if packed[at : at + PREFIX_BYTES] in wanted]
        if not hits:
            continue
        sizes = [spec.nbytes for spec in read_layout(connection, row.layout_id)]
        least = 1 if _indexed_whole(connection, row.id) else INDEX_MIN_BYTES
        for at in hits:
            ordinal = at // DIGEST_BYTES
            if sizes[ordinal] >= least:
                prefix = int.from_bytes(packed[at : at + PREFIX_BYTES], "big", signed=True)
                found.setdefault(prefix, Place(row.id, ordinal))
    return found, rows[-1].id if len(rows) == SCANNED else None


def _indexed_whole(connection: Connection, blob_id: int) -> bool:
    """Whether the oldest version that brought a blob's tensors is one of those that index small ones too."""
    kind = connection.execute(
        select(version.c.kind)
        .join(version_blob, version_blob.c.version_id == version.c.id)
        .where(version_blob.c.blob_id == blob_id, version_blob.c.role.in_(("tensors", "external")))
        .order_by(version.c.id)
        .limit(1)
    ).scalar()
    return kind is not None and kind != "adapter"


def mark_orphans(connection: Connection, sizes: Mapping[str, int], at: datetime) -> list[str]:
    """Registers blobs that have no row as `deleting`, so that a push that is about to register one sees it.

    Args:
        sizes: bytes by digest.

    Returns:
        Digests of those that are marked; what a push was quicker with is left out.
    """
    ordered = sorted(sizes)
    rows = [
        {"digest": digest, "size": sizes[digest], "state": "deleting", "layout_id": None, "created_at": at}
        for digest in ordered
    ]
    insert_missing(connection, blob, rows)
    marked = select(blob.c.digest).where(blob.c.digest.in_(ordered), blob.c.state == "deleting")
    return list(connection.scalars(marked.order_by(blob.c.digest)))


def unknown_digests(connection: Connection, digests: Sequence[str]) -> list[str]:
    """Those of a batch of digests that no row has."""
    known = set(connection.scalars(select(blob.c.digest).where(blob.c.digest.in_(digests))))
    return [digest for digest in digests if digest not in known]


def deleting_digests(connection: Connection) -> list[str]:
    """Blobs whose deletion has begun."""
    return list(connection.scalars(select(blob.c.digest).where(blob.c.state == "deleting").order_by(blob.c.digest)))


def lock_deleting(connection: Connection, digests: Sequence[str]) -> list[BlobRow]:
    """Locks those of a batch of blobs whose deletion has begun and has not ended."""
    found = connection.execute(
        _rows().where(blob.c.digest.in_(digests), blob.c.state == "deleting").order_by(blob.c.digest).with_for_update()
    )
    return [BlobRow(*row) for row in found]


def forget_blobs(connection: Connection, blob_ids: Sequence[int]) -> None:
    """Deletes the rows of blobs whose files are gone."""
    connection.execute(delete(tensor_index).where(tensor_index.c.blob_id.in_(blob_ids)))
    connection.execute(delete(blob_tensors).where(blob_tensors.c.blob_id.in_(blob_ids)))
    connection.execute(delete(blob).where(blob.c.id.in_(blob_ids)))


def unneeded_layouts(connection: Connection) -> list[int]:
    """Row ids of layouts of which no version, component or blob is, in the order of their digests."""
    return list(connection.scalars(_unneeded_layouts().order_by(layout.c.digest)))


def forget_layouts(connection: Connection, layout_ids: Sequence[int]) -> None:
    """Deletes those of a batch of layouts that still nothing refers to, with their tensors and targets."""
    connection.execute(
        select(layout.c.id).where(layout.c.id.in_(layout_ids)).order_by(layout.c.digest).with_for_update()
    ).all()
    free = connection.scalars(_unneeded_layouts().where(layout.c.id.in_(layout_ids))).all()
    for table in (layout_tensor, target):
        connection.execute(delete(table).where(table.c.layout_id.in_(free)))
    connection.execute(delete(layout).where(layout.c.id.in_(free)))


def _unneeded_layouts() -> Select[int]:
    # Not an EXISTS for each layout: blobs have no index by layout.
    used = union(
        select(version.c.layout_id).where(version.c.layout_id.is_not(None)),
        select(component.c.layout_id),
        select(blob.c.layout_id).where(blob.c.layout_id.is_not(None)),
    )
    return select(layout.c.id).where(layout.c.id.not_in(used))


def holders_of(
    connection: Connection, blob_ids: Iterable[int], *, less_removed_before: datetime | None = None
) -> dict[int, Holders]:
    """Who needs these blobs, versions that are removed included; one that nobody needs is left out.

    Args:
        less_removed_before: versions that are removed since this moment or longer are not counted.
    """
    found: dict[int, Holders] = {}
    for batch in batches(sorted(set(blob_ids)), 100):
        describing = and_(event.c.artifact_id == described_blob.c.artifact_id, event.c.seq == described_blob.c.seq)
        needs = union(
            select(version_blob.c.blob_id, version_blob.c.version_id).where(version_blob.c.blob_id.in_(batch)),
            select(described_blob.c.blob_id, event.c.version_id)
            .join(event, describing)
            .where(described_blob.c.blob_id.in_(batch)),
        ).subquery()
        rank = func.row_number().over(partition_by=needs.c.blob_id, order_by=needs.c.version_id)
        count = func.count().over(partition_by=needs.c.blob_id)
        ranked = select(needs, rank.label("rank"), count.label("holders"))
        if less_removed_before is not None:
            ranked = ranked.where(needs.c.version_id.not_in(ids_removed_before(less_removed_before)))
        oldest = ranked.subquery()
        rows = connection.execute(
            select(oldest).where(oldest.c.rank <= NAMED).order_by(oldest.c.blob_id, oldest.c.rank)
        ).all()
        names = references(connection, sorted({row.version_id for row in rows}))
        for row in rows:
            before = found[row.blob_id].first if row.blob_id in found else ()
            found[row.blob_id] = Holders((*before, names[row.version_id]), row.holders)
    return found
