"""Blobs, layouts and the digest index: what the store holds, and which tensors can be reused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, select, update

from registry.catalog.rows import batches, insert_missing
from registry.catalog.tables import blob, blob_tensors, component, layout, layout_tensor, target, tensor_index
from registry.catalog.tables import version_blob as version_blob_table
from registry.core.adapter_names import Target
from registry.core.digest import index_prefix, pack_digests, unpack_digests
from registry.core.errors import InUse
from registry.core.layout import Layout, TensorSpec
from registry.core.placement import unpack_entries

INDEX_MIN_BYTES = 4096
"""Adapter tensors below this are not worth an index row; bases and checkpoints index every tensor."""


@dataclass(frozen=True)
class NewBlob:
    """A blob that a version needs, with its tensors if it is a safetensors file.

    Attributes:
        index_all: index small tensors too.
        external: it is known, and its bytes are not in the store.
    """

    digest: str
    size: int
    layout: Layout | None = None
    tensors: tuple[str, ...] = ()
    index_all: bool = False
    external: bool = False


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: the blob's digest, the tensor's ordinal there, and the blob's size in bytes."""

    blob: str
    ordinal: int
    blob_size: int


def register_layouts(connection: Connection, layouts: Iterable[tuple[Layout, Sequence[Target]]]) -> dict[str, int]:
    """Row ids of layouts by digest; a new layout gets its tensors, and one without targets those that are given."""
    wanted = {one.digest: (one, targets) for one, targets in layouts}
    ordered = sorted(wanted)
    known = _held_layouts(connection, ordered)
    missing = [digest for digest in ordered if digest not in known]
    if missing:
        insert_missing(
            connection,
            layout,
            [
                {
                    "digest": digest,
                    "tensors": len(wanted[digest][0]),
                    "parameters": wanted[digest][0].parameters,
                    "nbytes": wanted[digest][0].nbytes,
                }
                for digest in missing
            ],
        )
        known = _held_layouts(connection, ordered)
    for digest in missing:
        for batch in batches(enumerate(wanted[digest][0])):
            insert_missing(
                connection,
                layout_tensor,
                [
                    {
                        "layout_id": known[digest],
                        "position": position,
                        "name": spec.name,
                        "dtype": spec.dtype,
                        "shape": ",".join(map(str, spec.shape)),
                    }
                    for position, spec in batch
                ],
            )
    # Not of new layouts alone: the same tensors may have come as a checkpoint before.
    _insert_targets(connection, {known[digest]: wanted[digest][1] for digest in ordered if wanted[digest][1]})
    return known


def _held_layouts(connection: Connection, digests: Iterable[str]) -> dict[str, int]:
    """Row ids by digest, of layouts that `gc` does not take away before the transaction ends."""
    found: dict[str, int] = {}
    for batch in batches(digests):
        rows = connection.execute(
            select(layout.c.digest, layout.c.id)
            .where(layout.c.digest.in_(batch))
            .order_by(layout.c.digest)
            .with_for_update(read=True, key_share=True)
        )
        found.update((digest, identifier) for digest, identifier in rows)
    return found


def _insert_targets(connection: Connection, wanted: Mapping[int, Sequence[Target]]) -> None:
    there: set[int] = set()
    for ids in batches(wanted):
        there.update(
            connection.execute(select(target.c.layout_id).where(target.c.layout_id.in_(ids)).distinct()).scalars()
        )
    for layout_id, targets in wanted.items():
        for few in batches(targets if layout_id not in there else ()):
            insert_missing(
                connection,
                target,
                [
                    {
                        "layout_id": layout_id,
                        "module": one.module,
                        "kind": one.kind,
                        "rank": one.rank,
                        "in_features": one.in_features,
                        "out_features": one.out_features,
                    }
                    for one in few
                ],
            )


def read_layout(connection: Connection, layout_id: int) -> Layout:
    rows = connection.execute(
        select(layout_tensor.c.name, layout_tensor.c.dtype, layout_tensor.c.shape)
        .where(layout_tensor.c.layout_id == layout_id)
        .order_by(layout_tensor.c.position)
    )
    return Layout(
        tuple(
            TensorSpec(row.name, row.dtype, tuple(map(int, row.shape.split(","))) if row.shape else ()) for row in rows
        )
    )


def hold_blobs(connection: Connection, blobs: Iterable[NewBlob]) -> None:
    """Keeps `gc` from those of these blobs that have a row, until the transaction ends; all in the order of their
    digests, in which it takes them too."""
    for batch in batches(sorted({one.digest for one in blobs})):
        # An external one may yet be filled, and two who hold it would then wait for each other; and a deletion must
        # never wait for one of these, since what it has deleted is what a push may wait for.
        rows = select(blob.c.id).where(blob.c.digest.in_(batch), blob.c.state == "present")
        connection.execute(rows.order_by(blob.c.digest).with_for_update(read=True))


def register_blobs(
    connection: Connection, blobs: Iterable[NewBlob], layout_ids: Mapping[str, int], at: datetime
) -> dict[str, int]:
    """Row ids of blobs by digest; new ones are registered as present, with their tensors indexed.

    Raises:
        InUse: `gc` is deleting one of them; the caller puts the bytes again and retries.
    """
    wanted = {one.digest: one for one in blobs}
    ordered = sorted(wanted)
    before: dict[str, int | None] = {}
    for batch in batches(ordered):
        known = connection.execute(select(blob.c.digest, blob.c.layout_id).where(blob.c.digest.in_(batch)))
        before.update((digest, layout_id) for digest, layout_id in known)
    insert_missing(
        connection,
        blob,
        [
            {
                "digest": digest,
                "size": wanted[digest].size,
                "state": "external" if wanted[digest].external else "present",
                "layout_id": _layout_id(wanted[digest], layout_ids),
                "created_at": at,
            }
            for digest in ordered
            if digest not in before
        ],
    )
    mark_present(connection, [digest for digest in ordered if digest in before and not wanted[digest].external])
    described = [one for one in ordered if wanted[one].layout is not None and before.get(one) is None]
    for digest in described:
        if digest in before:  # it came as a plain file
            connection.execute(
                update(blob)
                .where(blob.c.digest == digest, blob.c.layout_id.is_(None))
                .values(layout_id=_layout_id(wanted[digest], layout_ids))
            )
    ids: dict[str, int] = {}
    for batch in batches(ordered):
        rows = connection.execute(
            select(blob.c.digest, blob.c.id, blob.c.state)
            .where(blob.c.digest.in_(batch))
            .order_by(blob.c.digest)
            .with_for_update(read=True)
        )
        ids.update((digest, identifier) for digest, identifier, state in rows if state != "deleting")
    if going := [digest for digest in ordered if digest not in ids]:
        raise InUse(f"blob {going[0]} is being deleted by gc; push again")
    for digest in described:
        _index_tensors(connection, ids[digest], wanted[digest])
    return ids


def mark_present(connection: Connection, digests: Iterable[str]) -> None:
    """Says of blobs that were external that their bytes are in the store now."""
    for batch in batches(sorted(digests)):
        connection.execute(
            update(blob).where(blob.c.digest.in_(batch), blob.c.state == "external").values(state="present")
        )


def external_of_version(connection: Connection, version_id: int) -> list[str]:
    """Digests of those blobs of a version that are known without their bytes."""
    return list(
        connection.scalars(
            select(blob.c.digest)
            .join(version_blob_table, version_blob_table.c.blob_id == blob.c.id)
            .where(version_blob_table.c.version_id == version_id, blob.c.state == "external")
            .order_by(blob.c.digest)
        )
    )


def _layout_id(new: NewBlob, layout_ids: Mapping[str, int]) -> int | None:
    return None if new.layout is None else layout_ids[new.layout.digest]


def _index_tensors(connection: Connection, blob_id: int, new: NewBlob) -> None:
    insert_missing(connection, blob_tensors, [{"blob_id": blob_id, "digests": pack_digests(new.tensors)}])
    rows: dict[int, int] = {}
    for ordinal, (spec, digest) in enumerate(zip(new.layout or (), new.tensors, strict=True)):
        if spec.nbytes >= (1 if new.index_all else INDEX_MIN_BYTES):
            rows.setdefault(index_prefix(digest), ordinal)
    for batch in batches(sorted(rows)):
        # One holder a tensor: a digest that thousands of blobs share (a matrix of zeros) stays one row.
        held = (
            select(tensor_index.c.prefix)
            .join(blob, blob.c.id == tensor_index.c.blob_id)
            .where(tensor_index.c.prefix.in_(batch), blob.c.state == "present")
        )
        known = set(connection.scalars(held))
        insert_missing(
            connection,
            tensor_index,
            [
                {"prefix": prefix, "blob_id": blob_id, "ordinal": rows[prefix]}
                for prefix in batch
                if prefix not in known
            ],
        )


def find_tensors(connection: Connection, digests: Iterable[str]) -> dict[str, StoredTensor]:
    """Stored tensors that are bit-equal to the given digests, as far as the index knows them."""
    wanted = {index_prefix(digest): digest for digest in digests}
    hits: list[tuple[str, int, int]] = []
    for batch in batches(sorted(wanted)):
        rows = connection.execute(
            select(tensor_index.c.prefix, tensor_index.c.blob_id, tensor_index.c.ordinal)
            .join(blob, blob.c.id == tensor_index.c.blob_id)
            .where(tensor_index.c.prefix.in_(batch), blob.c.state == "present")
        )
        hits += [(wanted[prefix], blob_id, ordinal) for prefix, blob_id, ordinal in rows]
    stored = _tensors_of_blobs(connection, {blob_id for _, blob_id, _ in hits})
    found = {}
    for digest, blob_id, ordinal in hits:
        blob_digest, size, digests_there = stored[blob_id]
        if digests_there[ordinal] == digest:
            found[digest] = StoredTensor(blob_digest, ordinal, size)
    return found


def find_together(connection: Connection, digests: Sequence[str]) -> list[dict[str, StoredTensor]]:
    """The same blob by blob, and of each that the index names for one of them all that it holds: the index knows one
    holder a tensor, which may be a stranger, while the others lie together elsewhere."""
    named = {one.blob for one in find_tensors(connection, digests).values()}
    wanted = set(digests)
    together = []
    for batch in batches(sorted(named)):
        rows = connection.execute(
            select(blob.c.digest, blob.c.size, blob_tensors.c.digests)
            .join(blob_tensors, blob_tensors.c.blob_id == blob.c.id)
            .where(blob.c.digest.in_(batch))
            .order_by(blob.c.digest)
        )
        for row in rows:
            held: dict[str, StoredTensor] = {}
            for ordinal, digest in enumerate(unpack_digests(bytes(row.digests))):
                if digest in wanted:
                    held.setdefault(digest, StoredTensor(row.digest, ordinal, row.size))
            together.append(held)
    return together


def tensors_of_version(connection: Connection, version_id: int) -> dict[str, StoredTensor]:
    """Every tensor of a version by digest, with where it lies; what `gc` is deleting is left out."""
    positions = {
        row.position: row.blob_id
        for row in connection.execute(
            select(version_blob_table.c.position, version_blob_table.c.blob_id).where(
                version_blob_table.c.version_id == version_id
            )
        )
    }
    stored = _tensors_of_blobs(connection, set(positions.values()))
    found: dict[str, StoredTensor] = {}
    for row in connection.execute(
        select(component.c.digests, component.c.placement).where(component.c.version_id == version_id)
    ):
        entries = unpack_entries(bytes(row.placement))
        for digest, (position, ordinal) in zip(unpack_digests(bytes(row.digests)), entries, strict=True):
            if positions[position] in stored:
                blob_digest, size, _ = stored[positions[position]]
                found.setdefault(digest, StoredTensor(blob_digest, ordinal, size))
    return found


def _tensors_of_blobs(connection: Connection, blob_ids: Iterable[int]) -> dict[int, tuple[str, int, tuple[str, ...]]]:
    """(digest, size, tensor digests) of those blobs that are present."""
    found = {}
    for batch in batches(sorted(blob_ids)):
        rows = connection.execute(
            select(blob.c.id, blob.c.digest, blob.c.size, blob_tensors.c.digests)
            .join(blob_tensors, blob_tensors.c.blob_id == blob.c.id)
            .where(blob.c.id.in_(batch), blob.c.state == "present")
        )
        for row in rows:
            found[row.id] = (row.digest, row.size, unpack_digests(bytes(row.digests)))
    return found
