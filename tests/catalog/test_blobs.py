"""Blobs, layouts and the digest index."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import Connection, select, update

from registry.catalog import tables
from registry.catalog.blobs import (
    INDEX_MIN_BYTES,
    NewBlob,
    StoredTensor,
    find_tensors,
    read_layout,
    register_blobs,
    register_layouts,
)
from registry.catalog.engine import Database
from registry.core.adapter_names import targets_of
from registry.core.digest import sha256_hex
from registry.core.errors import InUse
from registry.core.layout import Layout, TensorSpec

NOW = datetime(2026, 11, 23, tzinfo=UTC)
ADAPTER = Layout(
    (
        TensorSpec("base_model.model.q_proj.lora_A.weight", "F32", (2, 4)),
        TensorSpec("base_model.model.q_proj.lora_B.weight", "F32", (8, 2)),
    )
)


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    with database.writing() as opened:
        yield opened
        opened.rollback()


def digest(name: object) -> str:
    return sha256_hex(repr(name).encode())


def layout(*sizes: int) -> Layout:
    return Layout(tuple(TensorSpec(f"t{place}", "U8", (size,)) for place, size in enumerate(sizes)))


def blob(
    connection: Connection, name: str, its_layout: Layout, tensors: list[str], *, all_of_it: bool = True
) -> NewBlob:
    made = NewBlob(digest(name), its_layout.nbytes, its_layout, tuple(tensors), all_of_it)
    layouts = register_layouts(connection, [(its_layout, ())])
    register_blobs(connection, [made], layouts, NOW)
    return made


def set_state(connection: Connection, name: str, state: str) -> None:
    connection.execute(update(tables.blob).where(tables.blob.c.digest == digest(name)).values(state=state))


def test_a_layout_comes_back_whatever_its_size(connection: Connection) -> None:
    specs = [TensorSpec(f"layers.{place}.w", "BF16", (place, 3)) for place in range(1001)]
    many = Layout((*specs, TensorSpec("scalar", "I64", ()), TensorSpec("größe", "F32", (0,))))
    ids = register_layouts(connection, [(many, ()), (layout(1), ())])
    assert read_layout(connection, ids[many.digest]) == many
    assert register_layouts(connection, [(many, ())]) == {many.digest: ids[many.digest]}
    row = connection.execute(select(tables.layout).where(tables.layout.c.digest == many.digest)).one()
    assert (row.tensors, row.parameters, row.nbytes) == (1003, many.parameters, many.nbytes)


def test_a_layout_that_came_as_a_checkpoint_gets_its_targets_with_an_adapter(connection: Connection) -> None:
    """Compatibility joins targets by layout: without them such an adapter would fit everything."""
    targets, _ = targets_of(ADAPTER, None)
    assert targets
    ids = register_layouts(connection, [(ADAPTER, ())])
    for _ in range(2):
        register_layouts(connection, [(ADAPTER, targets)])
        found = connection.execute(select(tables.target)).all()
        assert [(row.layout_id, row.module, row.rank) for row in found] == [(ids[ADAPTER.digest], "q_proj", 2)]


def test_a_blob_that_came_as_a_plain_file_gets_its_tensors(connection: Connection) -> None:
    register_blobs(connection, [NewBlob(digest("b"), 8)], {}, NOW)
    assert find_tensors(connection, [digest(0)]) == {}
    blob(connection, "b", layout(8), [digest(0)])
    assert find_tensors(connection, [digest(0)]) == {digest(0): StoredTensor(digest("b"), 0, 8)}
    assert connection.execute(select(tables.blob.c.layout_id)).scalar_one() is not None


def test_a_blob_that_gc_is_deleting_or_has_deleted_is_not_taken(connection: Connection) -> None:
    blob(connection, "b", layout(8), [digest(0)])
    set_state(connection, "b", "deleting")
    with pytest.raises(InUse, match=f"{digest('b')} is being deleted by gc; push again"):
        register_blobs(connection, [NewBlob(digest("b"), 8)], {}, NOW)


def test_a_tensor_is_found_where_it_lies(connection: Connection) -> None:
    tensors = [digest(place) for place in range(1000)]
    blob(connection, "b", layout(*[1] * 1000), tensors)
    found = find_tensors(connection, [*tensors[::3], digest("unknown")])
    assert found == {digest(place): StoredTensor(digest("b"), place, 1000) for place in range(0, 1000, 3)}


def test_a_tensor_of_a_blob_that_goes_is_not_offered(connection: Connection) -> None:
    blob(connection, "b", layout(8), [digest(0)])
    for state in ("deleting", "external"):
        set_state(connection, "b", state)
        assert find_tensors(connection, [digest(0)]) == {}


def test_half_a_digest_is_not_a_tensor(connection: Connection) -> None:
    """The index knows 64 bits; the rest is compared with the blob's own digests."""
    blob(connection, "b", layout(8), [digest(0)])
    pretender = digest(0)[:16] + digest(1)[16:]
    assert find_tensors(connection, [pretender]) == {}


def test_a_tensor_that_many_blobs_share_has_one_holder(connection: Connection) -> None:
    for name in "abc":
        blob(connection, name, layout(8, 9), [digest(0), digest(name)])
    held = connection.execute(select(tables.tensor_index)).all()
    assert len(held) == 4
    assert find_tensors(connection, [digest(0)]) == {digest(0): StoredTensor(digest("a"), 0, 17)}


def test_small_tensors_of_adapters_are_not_indexed(connection: Connection) -> None:
    sizes = (INDEX_MIN_BYTES - 1, INDEX_MIN_BYTES, 0)
    blob(connection, "a", layout(*sizes), [digest(place) for place in range(3)], all_of_it=False)
    assert set(find_tensors(connection, [digest(place) for place in range(3)])) == {digest(1)}
    blob(connection, "b", layout(*sizes), [digest(place + 10) for place in range(3)])
    assert set(find_tensors(connection, [digest(place + 10) for place in range(3)])) == {digest(10), digest(11)}
