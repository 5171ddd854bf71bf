"""What gc does in a store: orphans, temporary files, shared blobs, and what it leaves."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from registry import Registry
from registry.core.errors import InvalidInput, ReadOnly
from registry.operations.gc import GRACE
from tests.failures.support import photograph

NO_GRACE = timedelta(0)
DAY = 24 * 3600.0


def state(seed: int, *, shared: int = 0) -> dict[str, torch.Tensor]:
    """Two tensors of 4 MiB, of which one depends on `shared` alone."""
    return {"own": torch.full((1024, 1024), float(seed)), "shared": torch.full((1024, 1024), -1.0 - shared)}


def put(registry: Registry, data: bytes, *, age: float = 0) -> str:
    """A blob that no push ever registered, as a killed one leaves it."""
    with registry._context.store.blobs.batch() as batch:
        blob = batch.put([data])
        batch.commit()
    path = registry._context.store.blobs.local_path(blob.digest)
    path.chmod(0o644)
    os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    return blob.digest


def left(root: Path, name: str, *, age: float) -> Path:
    """A temporary file that a killed push left."""
    path = root / "tmp" / name
    path.write_bytes(b"half of it")
    os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    return path


def test_orphans_go_when_they_are_older_than_the_grace_period(registry: Registry, root: Path) -> None:
    old, new = put(registry, b"old", age=8 * DAY), put(registry, b"new", age=6 * DAY)
    collected = registry.gc()
    assert collected.orphans == ((old, 3),)
    assert collected.bytes_freed == 3
    assert set(registry._context.store.blobs.digests()) == {new}
    assert registry.gc(grace=timedelta(days=5)).orphans == ((new, 3),)
    assert not any(registry._context.store.blobs.digests())


def test_temporary_files_stay_for_an_hour_in_any_case(registry: Registry, root: Path) -> None:
    old, recent = left(root, "old.tmp", age=2 * 3600), left(root, "recent.tmp", age=1800)
    assert registry.gc().temporaries == ()
    assert registry.gc(grace=NO_GRACE).temporaries == (("old.tmp", 10),)
    assert (old.exists(), recent.exists()) == (False, True)


def test_a_dry_run_changes_nothing_and_tells_what_a_run_would_do(registry: Registry, root: Path) -> None:
    registry.push(state(1), "walk/one")
    registry.push(state(2), "walk/two", base="walk/one")
    registry.push(state(3), "walk/three", base="walk/one")
    registry.remove("walk/two", "walk/three", "walk/one")
    put(registry, b"orphan", age=8 * DAY)
    left(root, "old.tmp", age=8 * DAY)
    before = photograph(root)
    planned = registry.gc(grace=NO_GRACE, dry_run=True)
    assert photograph(root) == before
    done = registry.gc(grace=NO_GRACE)
    assert planned.dry_run
    assert [getattr(done, part) for part in ("purged", "deleted", "kept", "orphans", "temporaries")] == [
        getattr(planned, part) for part in ("purged", "deleted", "kept", "orphans", "temporaries")
    ]
    assert done.purged == ("walk/one@1", "walk/three@1", "walk/two@1")
    assert max(done.deleted, key=lambda one: len(one.held_by)).held_by == ("walk/one@1", "walk/two@1", "walk/three@1")
    # Three manifests and a layout, and their rounded digests, which events name: all that is left of them.
    assert len(list(registry._context.store.blobs.digests())) == 4 + 3


def test_a_blob_that_a_removed_version_can_be_restored_with_stays(registry: Registry) -> None:
    """`two` hangs on a blob of `one`; the one is purged, the other waits."""
    registry.push(state(1), "walk/one")
    registry.push(state(2), "walk/two", base="walk/one")
    registry.remove("walk/two", "walk/one")
    registry.restore("walk/one@1")
    registry.remove("walk/one")
    events = registry.events("walk/one")
    with registry._context.writing() as connection:  # as if the last removal had been a month ago
        connection.exec_driver_sql("UPDATE event SET at = at - 2592000000000 WHERE artifact_id = 1")
    collected = registry.gc()
    assert (collected.purged, collected.waiting) == (("walk/one@1",), ("walk/two@1",))
    [kept] = collected.kept
    assert (kept.held_by, kept.kept_by, kept.holders) == (("walk/one@1",), ("walk/two@1",), 1)
    assert [event.kind for event in registry.events("walk/one")] == [*(event.kind for event in events), "purged"]


def test_what_many_hold_names_the_oldest_few(registry: Registry) -> None:
    registry.push(state(0), "walk/base")
    for number in range(1, 6):
        registry.push(state(number), f"walk/v{number}", base="walk/base")
    registry.push(state(9), "walk/bad", base="walk/base")
    registry.remove("walk/bad")
    kept, header = registry.gc(grace=NO_GRACE).kept
    assert (kept.kept_by, kept.holders) == (("walk/base@1", "walk/v1@1", "walk/v2@1"), 6)
    assert (header.roles, header.kept_by, header.holders) == (("header",), ("walk/v1@1", "walk/v2@1", "walk/v3@1"), 5)
    for number in range(1, 6):
        assert torch.equal(registry.load(f"walk/v{number}")["own"], state(number)["own"])


def test_a_blob_that_is_lost_frees_nothing_and_is_no_error(registry: Registry) -> None:
    registry.push(state(1), "walk/one")
    [tensors] = [one for one in registry.show("walk/one").contents.blobs if one[1] == "tensors"]
    registry.remove("walk/one")
    registry._context.store.blobs.delete(tensors[0])
    collected = registry.gc(grace=NO_GRACE)
    assert {one.digest: one.size for one in collected.deleted}[tensors[0]] == 0


def test_a_blob_that_an_event_describes_stays(registry: Registry) -> None:
    from registry.catalog.blobs import NewBlob
    from registry.catalog.descriptions import add_descriptions
    from registry.catalog.versions import resolve
    from registry.core.reference import parse_reference
    from registry.operations.context import under_lock

    registry.push(state(1), "walk/one")
    probe = put(registry, b"probe", age=8 * DAY)

    under_lock(
        registry._context,
        "walk",
        "one",
        lambda name, at: add_descriptions(
            name,
            resolve(name.connection, parse_reference("walk/one")),
            {"probe": NewBlob(probe, 5)},
            actor="ada",
            at=at,
        ),
    )
    registry.remove("walk/one")
    collected = registry.gc(grace=NO_GRACE)
    assert probe not in {one.digest for one in collected.deleted}
    assert registry._context.store.blobs.contains(probe)


def test_an_external_base_is_forgotten_without_a_file(registry: Registry, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state(1), tmp_path / "base.safetensors")
    registry.push(tmp_path / "base.safetensors", "walk/base", external=True)
    registry.remove("walk/base")
    planned = registry.gc(grace=NO_GRACE, dry_run=True)
    collected = registry.gc(grace=NO_GRACE)
    assert collected.deleted == planned.deleted
    assert [(one.roles, one.size) for one in collected.deleted if "external" in one.roles] == [(("external",), 0)]


def test_a_purged_version_is_told_from_a_damaged_one(registry: Registry) -> None:
    """Its digest is known; what holds its tensors is not, so a push of its like stores them anew."""
    digest = registry.push(state(1), "walk/one").digest
    registry.remove("walk/one")
    registry.gc(grace=NO_GRACE)
    pushed = registry.push(state(1), "walk/other")
    assert pushed.digest == digest
    assert pushed.bytes_new > 8 << 20
    assert torch.equal(registry.load("walk/other")["own"], state(1)["own"])


@pytest.mark.parametrize("grace", [timedelta(seconds=-1), timedelta.max])
def test_a_grace_period_that_cannot_be_is_refused(registry: Registry, grace: timedelta) -> None:
    with pytest.raises(InvalidInput, match="grace period"):
        registry.gc(grace=grace)


def test_the_default_grace_period_is_a_week(registry: Registry) -> None:
    assert registry.gc().grace == GRACE == timedelta(days=7)


def test_a_registry_that_cannot_be_written_is_collected_in_thought_alone(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push(state(1), "walk/one")
    registry.remove("walk/one")
    monkeypatch.setattr(registry._context.database, "writable", False)
    for refused in (registry.gc, lambda: registry.remove("walk/one"), lambda: registry.restore("walk/one@1")):
        with pytest.raises(ReadOnly):
            refused()
    assert registry.gc(grace=NO_GRACE, dry_run=True).purged == ("walk/one@1",)
