"""What gc asks and changes in the catalog, on both databases."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import IntegrityError

from registry import Registry
from registry.catalog import garbage, leases, tables
from registry.catalog.blobs import NewBlob, find_tensors, register_blobs, register_layouts
from registry.catalog.engine import Database
from registry.core.digest import index_prefix, sha256_hex
from registry.core.errors import InUse
from registry.core.layout import Layout, TensorSpec
from registry.operations.deleting import finish_deleting
from tests.catalog.artifacts import peft_folder

AT = datetime(2026, 11, 23, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
NO_GRACE = timedelta(0)
BIG = Layout((TensorSpec("a", "U8", (5000,)), TensorSpec("b", "U8", (5000,)), TensorSpec("c", "U8", (10,))))


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    with database.writing() as opened:
        yield opened
        opened.rollback()


def digest(name: object) -> str:
    return sha256_hex(repr(name).encode())


def put(connection: Connection, name: str, *tensors: str, index_all: bool = False) -> int:
    """Registers a blob of the layout `BIG`; gives its row id."""
    made = NewBlob(digest(name), BIG.nbytes, BIG, tuple(digest(one) for one in tensors), index_all)
    layouts = register_layouts(connection, [(BIG, ())])
    return register_blobs(connection, [made], layouts, AT)[made.digest]


class TestOtherPlaces:
    def test_are_in_the_oldest_blob_that_stays(self, connection: Connection) -> None:
        first, second, third = (put(connection, name, "x", f"only {name}", "small") for name in ("1", "2", "3"))
        wanted = garbage.indexed_prefixes(connection, [first])
        assert wanted == {index_prefix(digest("x")), index_prefix(digest("only 1"))}
        found, end = garbage.other_places(connection, wanted, {first}, after=0)
        assert (found, end) == ({index_prefix(digest("x")): garbage.Place(second, 0)}, None)
        found, _ = garbage.other_places(connection, wanted, {first, second}, after=0)
        assert found == {index_prefix(digest("x")): garbage.Place(third, 0)}

    def test_leave_out_what_an_adapter_does_not_index(self, connection: Connection) -> None:
        first = put(connection, "1", "x", "y", "small", index_all=True)
        put(connection, "2", "y", "x", "small")
        wanted = garbage.indexed_prefixes(connection, [first])
        assert index_prefix(digest("small")) in wanted
        found, _ = garbage.other_places(connection, wanted, {first}, after=0)
        assert {index_prefix(digest("x")), index_prefix(digest("y"))} == set(found)

    def test_come_in_turns(self, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(garbage, "SCANNED", 2)
        ids = [put(connection, f"{number}", "x", f"y{number}", "z") for number in range(4)]
        wanted = garbage.indexed_prefixes(connection, [ids[0]])
        turns = []
        after: int | None = 0
        while after is not None:
            found, after = garbage.other_places(connection, wanted, set(ids[:3]), after=after)
            turns.append(found)
        assert turns == [{}, {index_prefix(digest("x")): garbage.Place(ids[3], 0)}, {}]

    def test_are_in_the_index_when_the_blob_is_marked(self, connection: Connection) -> None:
        first, second = (put(connection, name, "x", f"only {name}", "small") for name in ("1", "2"))
        wanted = garbage.indexed_prefixes(connection, [first])
        others, _ = garbage.other_places(connection, wanted, {first}, after=0)
        [marked] = garbage.mark_deleting(connection, [first], others)
        assert marked.digest == digest("1")
        found = find_tensors(connection, [digest("x"), digest("only 1"), digest("only 2")])
        assert {tensor: stored.blob for tensor, stored in found.items()} == {
            digest("x"): digest("2"),
            digest("only 2"): digest("2"),
        }
        garbage.forget_blobs(connection, [first])
        assert garbage.unneeded_blobs(connection, AT) == [garbage.BlobRow(second, digest("2"), BIG.nbytes, "present")]


def test_a_blob_that_a_push_took_up_again_is_not_marked(registry: Registry, tmp_path: Path) -> None:
    registry.push(peft_folder(tmp_path / "adapter", 1.0), "team/walk")
    with registry._context.writing() as connection:
        ids = list(connection.scalars(select(tables.blob.c.id)))
        assert garbage.mark_deleting(connection, ids, {}) == []


def test_marking_waits_for_a_push_and_sees_what_it_registered(database: Database) -> None:
    """On PostgreSQL the two run at once; on SQLite one waits for the other altogether."""
    with database.writing() as connection:
        blob_id = put(connection, "1", "x", "y", "z")
        version_id = a_version(connection)
    marked: list[garbage.BlobRow] = []

    def mark() -> None:
        with database.writing() as connection:
            marked.extend(garbage.mark_deleting(connection, [blob_id], {}))

    with database.writing() as connection:
        put(connection, "1", "x", "y", "z")
        thread = threading.Thread(target=mark)
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive()
        needed = {"version_id": version_id, "position": 0, "blob_id": blob_id, "role": "tensors"}
        connection.execute(tables.version_blob.insert().values(**needed))
    thread.join(timeout=30)
    assert marked == []


@pytest.mark.parametrize("kind", ["postgresql"])
def test_marking_sees_what_a_push_registered_whatever_isolation_the_server_defaults_to(database: Database) -> None:
    """With one snapshot for the whole transaction, a blob that a push has just taken up again would be deleted."""
    with database.writing() as connection:
        name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
    database.engine.dispose()
    with database.writing() as connection:
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar_one() == "read committed"
    with database.reading() as connection:
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar_one() == "repeatable read"
    test_marking_waits_for_a_push_and_sees_what_it_registered(database)


def test_a_blob_that_a_version_refers_to_keeps_its_file_though_it_is_marked(registry: Registry, tmp_path: Path) -> None:
    """Were the rule of marking ever broken, the database itself is the last one to refuse."""
    registry.push(peft_folder(tmp_path / "adapter", 1.0), "team/walk")
    with registry._context.writing() as connection:
        connection.execute(tables.blob.update().values(state="deleting"))
        marked = garbage.deleting_digests(connection)
    with pytest.raises(IntegrityError):
        finish_deleting(registry._context)
    assert all(registry._context.store.blobs.contains(one) for one in marked)


def a_version(connection: Connection) -> int:
    named = {"namespace": "team", "name": "walk", "last_event_at": AT, "created_at": AT}
    made = tables.artifact.insert().values(**named).returning(tables.artifact.c.id)
    row = {
        "artifact_id": connection.execute(made).scalar_one(),
        "number": 1,
        "manifest_digest": digest("manifest"),
        "content_digest": digest("content"),
        "kind": "adapter",
        "state": "present",
        "size": 0,
        "bytes_new": 0,
        "created_by": "ada",
        "created_at": AT,
    }
    return connection.execute(tables.version.insert().values(**row).returning(tables.version.c.id)).scalar_one()


def test_an_orphan_is_marked_unless_a_push_was_quicker(connection: Connection) -> None:
    put(connection, "taken", "x", "y", "z")
    sizes = {digest("taken"): BIG.nbytes, digest("orphan"): 7}
    assert garbage.unknown_digests(connection, list(sizes)) == [digest("orphan")]
    assert garbage.mark_orphans(connection, sizes, AT) == [digest("orphan")]
    assert garbage.deleting_digests(connection) == [digest("orphan")]
    with pytest.raises(InUse, match=f"blob {digest('orphan')} is being deleted by gc"):
        register_blobs(connection, [NewBlob(digest("orphan"), 7)], {}, AT)


def test_a_layout_goes_with_the_last_that_is_of_it(connection: Connection) -> None:
    other = Layout((TensorSpec("q", "F32", (2,)),))
    register_layouts(connection, [(other, ())])
    put(connection, "1", "x", "y", "z")
    unneeded = garbage.unneeded_layouts(connection)
    assert len(unneeded) == 1
    ids = list(connection.scalars(select(tables.layout.c.id)))
    garbage.forget_layouts(connection, ids)
    assert connection.scalars(select(tables.layout.c.digest)).all() == [BIG.digest]
    assert connection.execute(select(func.count()).select_from(tables.layout_tensor)).scalar_one() == len(BIG)
    assert set(register_layouts(connection, [(other, ()), (BIG, ())])) == {other.digest, BIG.digest}


class TestALease:
    def test_is_held_by_one(self, connection: Connection) -> None:
        held = leases.take(connection, "gc", "one", AT, MINUTE)
        with pytest.raises(InUse, match=r"at work since 2026-11-23T00:00:00\.000000Z \(one\); wait for it"):
            leases.take(connection, "gc", "two", AT + MINUTE / 2, MINUTE)
        leases.release(connection, held)
        assert leases.take(connection, "gc", "two", AT + MINUTE / 2, MINUTE).holder == "two"

    def test_that_ran_out_is_taken_by_the_next(self, connection: Connection) -> None:
        first = leases.take(connection, "gc", "one", AT, MINUTE)
        second = leases.take(connection, "gc", "two", AT + MINUTE, MINUTE)
        with pytest.raises(InUse, match=r"ran out at 2026-11-23T00:01:00\.000000Z, and another gc goes on"):
            leases.renew(connection, first, AT + MINUTE, MINUTE)
        leases.release(connection, first)
        assert leases.renew(connection, second, AT + MINUTE, 2 * MINUTE).expires_at == AT + 3 * MINUTE

    def test_that_is_renewed_lasts(self, connection: Connection) -> None:
        held = leases.take(connection, "gc", "one", AT, MINUTE)
        leases.renew(connection, held, AT + MINUTE, MINUTE)
        with pytest.raises(InUse):
            leases.take(connection, "gc", "two", AT + MINUTE, MINUTE)

    def test_of_a_clock_that_was_far_ahead_holds_nobody_up(self, connection: Connection) -> None:
        leases.take(connection, "gc", "ahead", AT + 1000 * MINUTE, MINUTE)
        assert leases.take(connection, "gc", "two", AT, MINUTE).holder == "two"

    def test_of_a_clock_that_is_a_little_ahead_counts(self, connection: Connection) -> None:
        leases.take(connection, "gc", "ahead", AT + MINUTE / 2, MINUTE)
        with pytest.raises(InUse):
            leases.take(connection, "gc", "two", AT, MINUTE)

    def test_is_one_for_each_purpose(self, connection: Connection) -> None:
        leases.take(connection, "gc", "one", AT, MINUTE)
        leases.take(connection, "transfer", "two", AT, MINUTE)


# ---------------------------------------------------------------- the whole of it


def weights(path: Path, **tensors: int) -> Path:
    """A state dict of 32 kB tensors, each of one number."""
    save_file({name: np.full((64, 128), value, np.float32) for name, value in tensors.items()}, path)
    return path


@pytest.fixture
def shared(registry: Registry, tmp_path: Path) -> Registry:
    """`team/one` and a checkpoint that shares two of its three tensors; the checkpoint is removed."""
    registry.push(weights(tmp_path / "one.safetensors", a=1, b=2, c=3), "team/one")
    registry.push(weights(tmp_path / "two.safetensors", a=1, b=2, c=4), "team/two", base="team/one")
    registry.remove("team/two@1")
    return registry


def test_gc_frees_what_nothing_else_needs_and_tells_who_needed_it(shared: Registry, tmp_path: Path) -> None:
    planned = shared.gc(grace=NO_GRACE, dry_run=True)
    assert shared.gc(grace=NO_GRACE, dry_run=True) == planned
    done = shared.gc(grace=NO_GRACE)
    assert done == replace(planned, dry_run=False)
    assert done.purged == ("team/two@1",)
    assert [(one.roles, one.held_by) for one in done.deleted] == [
        (("tensors",), ("team/two@1",)),
        (("header",), ("team/two@1",)),
    ]
    assert [(one.roles, one.held_by, one.kept_by, one.holders) for one in done.kept] == [
        (("reused",), ("team/two@1",), ("team/one@1",), 1)
    ]
    store = shared._context.store
    assert done.bytes_freed == sum(one.size for one in done.deleted) == shared.events("team/two")[-1].payload["bytes"]
    assert not any(store.blobs.contains(one.digest) for one in done.deleted)
    assert shared.pull("team/one", tmp_path / "back").bytes == (tmp_path / "one.safetensors").stat().st_size
    again = shared.gc(grace=NO_GRACE)
    assert (again.purged, again.deleted, again.kept, again.bytes_freed) == ((), (), (), 0)
    with shared._context.reading() as connection:
        assert connection.execute(select(tables.lease)).all() == []
        assert garbage.unneeded_layouts(connection) == []


def test_gc_leaves_what_was_removed_within_the_grace_period(shared: Registry) -> None:
    for grace in (None, timedelta(hours=1)):
        left = shared.gc(grace=grace)
        assert (left.purged, left.waiting, left.deleted) == ((), ("team/two@1",), ())
    assert shared.restore("team/two@1")[0].changed


def test_the_index_finds_a_tensor_again_whose_holder_gc_took(registry: Registry, tmp_path: Path) -> None:
    """Two names with the same tensor, too small a part of each file to be shared, so that both files hold it."""
    big = {f"{name}{place}": 10 * place + seed for seed, name in enumerate("pq") for place in range(4)}
    one = {name: value for name, value in big.items() if name.startswith("p")}
    two = {name: value for name, value in big.items() if name.startswith("q")}

    def save(path: Path, values: dict[str, int]) -> Path:
        tensors = {name: np.full((400, 400), value, np.float32) for name, value in values.items()}
        tensors["shared"] = np.full((32, 40), 7, np.float32)
        save_file(tensors, path)
        return path

    registry.push(save(tmp_path / "one.safetensors", one), "team/one")
    registry.push(save(tmp_path / "two.safetensors", two), "team/two")
    with registry._context.reading() as connection:
        before = find_tensors(connection, tensors_of(registry, "team/two@1"))
    registry.remove("team/one@1")
    registry.gc(grace=NO_GRACE)
    with registry._context.reading() as connection:
        after = find_tensors(connection, tensors_of(registry, "team/two@1"))
    assert len(before) == len(after) == 5
    assert len({stored.blob for stored in before.values()}) == 2
    assert len({stored.blob for stored in after.values()}) == 1


def tensors_of(registry: Registry, reference: str) -> tuple[str, ...]:
    return registry.show(reference).contents.components["model"].tensors


def test_a_push_that_meets_a_deletion_ends_it_itself(shared: Registry, tmp_path: Path) -> None:
    """As `gc` would have left it that was killed between the two steps."""
    context = shared._context
    with context.writing() as connection:
        connection.execute(tables.version_file.delete().where(tables.version_file.c.version_id == 2))
        connection.execute(tables.component.delete().where(tables.component.c.version_id == 2))
        connection.execute(tables.version_blob.delete().where(tables.version_blob.c.version_id == 2))
        ids = [one.id for one in garbage.unneeded_blobs(connection, datetime.now(UTC))]
        marked = garbage.mark_deleting(connection, ids, {})
    assert marked
    assert all(context.store.blobs.contains(one.digest) for one in marked)
    finish_deleting(context)
    assert not any(context.store.blobs.contains(one.digest) for one in marked)
    with context.reading() as connection:
        assert garbage.deleting_digests(connection) == []
    shared.push(tmp_path / "two.safetensors", "team/three")
    assert shared.pull("team/three", tmp_path / "three").bytes == (tmp_path / "two.safetensors").stat().st_size


def test_gc_is_refused_beside_another(shared: Registry) -> None:
    with shared._context.writing() as connection:
        held = leases.take(connection, "gc", "elsewhere, process 7, ada", datetime.now(UTC), MINUTE)
    with pytest.raises(InUse, match=r"gc is at work since .* \(elsewhere, process 7, ada\)"):
        shared.gc(grace=NO_GRACE)
    assert shared.gc(grace=NO_GRACE, dry_run=True).purged == ("team/two@1",)
    with shared._context.writing() as connection:
        leases.release(connection, held)
    assert shared.gc(grace=NO_GRACE).purged == ("team/two@1",)


def test_collections_beside_pushes_and_removals_take_nothing_that_is_needed(
    registry: Registry, registry_url: str, tmp_path: Path
) -> None:
    """Threads on connections of their own; `tests/failures/test_gc.py` has processes."""
    sources = [weights(tmp_path / f"{n}.safetensors", a=1, b=2 + n % 2, c=10 + n) for n in range(6)]
    turns, pushing = 9, [True, True]
    failures: list[BaseException] = []

    def pusher(who: int) -> None:
        with Registry.open(registry_url) as own:
            for turn in range(turns):
                name = f"team/p{who}-{turn}"
                push_through(own, sources[(turn + who) % len(sources)], name)
                if turn % 3 != 2:
                    own.remove(name)

    def collector() -> None:
        with Registry.open(registry_url) as own:
            while any(pushing):
                with suppress(InUse):  # the other collector is at work
                    own.gc(grace=NO_GRACE)

    def run(work: Callable[[], None], who: int | None = None) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # shown by the assertion below
            failures.append(error)
        finally:
            if who is not None:
                pushing[who] = False

    threads = [threading.Thread(target=run, args=(partial(pusher, who), who)) for who in (0, 1)]
    threads += [threading.Thread(target=run, args=(collector,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert failures == []
    registry.gc(grace=NO_GRACE)
    left = registry.find()
    assert len(left) == 2 * turns // 3
    for version in left:
        who, turn = (int(part) for part in version.name.removeprefix("team/p").split("-"))
        pulled = registry.pull(version.reference, tmp_path / version.name.replace("/", "-"))
        assert pulled.path.read_bytes() == sources[(turn + who) % len(sources)].read_bytes()
    store = registry._context.store
    with registry._context.reading() as connection:
        rows = connection.execute(select(tables.blob.c.digest, tables.blob.c.state)).all()
    assert {row.digest: row.state for row in rows} == dict.fromkeys(store.blobs.digests(), "present")


def push_through(registry: Registry, source: Path, name: str) -> None:
    """Pushes, and ends the deletions that are in the way."""
    while True:
        try:
            registry.push(source, name)
        except InUse:
            finish_deleting(registry._context)
        else:
            return
