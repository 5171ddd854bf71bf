"""gc that is killed or interrupted at any stage, and gc beside processes that push and remove: every version that is
there is whole, and the next gc ends where it would have ended."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from registry import Registry
from registry.core.errors import InUse
from registry.operations.deleting import finish_deleting
from registry.store import open_store
from tests.failures.stages import interrupted_at_every_stage, killed_at_every_stage
from tests.failures.support import (
    Tensors,
    at_once,
    floats,
    quick_folder,
    succeeds_alone,
    tensor_file,
    warm_up,
    whole,
)

NO_GRACE = timedelta(0)
TURNS = 12


def checkpoint(seed: int) -> Tensors:
    """Three tensors of 4 KiB: one of the base, one that every second seed shares, one of its own."""
    return {
        "base": floats(32, 32, seed=0),
        "shared": floats(32, 32, seed=1000 + seed % 2),
        "own": floats(32, 32, seed=2000 + seed),
    }


def to_collect(template: str, folder: Path) -> Path:
    """A registry with removed versions that share tensors with present ones, an orphan and a temporary file."""
    root = Path(shutil.copytree(template, folder / "to-collect"))
    with Registry.open(root) as registry:
        for number in range(4):
            registry.push(tensor_file(folder / f"{number}.safetensors", checkpoint(number)), f"walk/c{number}")
        with registry._context.store.blobs.batch() as batch:
            batch.put([b"orphan"])
            batch.commit()
        (root / "tmp" / "left.tmp").write_bytes(b"half")
        os.utime(root / "tmp" / "left.tmp", (0, 0))
        registry.remove("walk/c0", "walk/c2")
    return root


def digests(root: Path) -> set[str]:
    return set(open_store(root).blobs.digests())


def rows(root: Path) -> dict[str, list[tuple[object, ...]]]:
    """What a catalog says, less times and row ids that depend on when and how often a gc ran."""
    statements = {
        "blob": "SELECT hex(digest), size, state FROM blob",
        "version": "SELECT id, number, state FROM version",
        "version_blob": "SELECT * FROM version_blob",
        "component": "SELECT version_id, role, layout_id FROM component",
        "version_file": "SELECT version_id, path FROM version_file",
        "tensor_index": "SELECT prefix, hex(digest), ordinal FROM tensor_index JOIN blob ON blob.id = blob_id",
        "blob_tensors": "SELECT hex(digest) FROM blob_tensors JOIN blob ON blob.id = blob_id",
        "layout": "SELECT hex(digest) FROM layout",
        "lease": "SELECT purpose FROM lease",
        "event": "SELECT artifact_id, seq, kind, payload FROM event",
    }
    with closing(sqlite3.connect(f"file:{root}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        return {name: sorted(catalog.execute(text)) for name, text in statements.items()}


def expire_leases(root: Path) -> None:
    """As if the time of a gc that was killed had run out."""
    with closing(sqlite3.connect(root / "catalog.sqlite", isolation_level=None)) as catalog:
        catalog.execute("UPDATE lease SET acquired_at = acquired_at - 3600000000, expires_at = acquired_at - 1")


def holds_together(registry: Registry, root: Path) -> None:
    """What is present can be pulled, and no row says of a blob that it is there when it is not."""
    for version in registry.find():
        whole(registry, root, version.reference)
    there = digests(root)
    with closing(sqlite3.connect(f"file:{root}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        present = {row[0].lower() for row in catalog.execute("SELECT hex(digest) FROM blob WHERE state = 'present'")}
    assert present <= there


def killed_collections(template: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        prepared = to_collect(template, folder)
        root = Path(shutil.copytree(prepared, folder / "registry"))
        registry = Registry.open(root)
        expected = registry.gc(grace=NO_GRACE)
        assert expected.purged == ("walk/c0@1", "walk/c2@1")
        assert expected.orphans
        assert expected.temporaries
        last_digests, last_rows = digests(root), rows(root)

        def prepare(_: int) -> Callable[[], object]:
            registry.close()
            shutil.rmtree(root)
            shutil.copytree(prepared, root)
            return partial(registry.gc, grace=NO_GRACE)

        stages = blocked = 0
        for _, killed in killed_at_every_stage(prepare):
            stages += 1
            Registry.open(root).close()
            holds_together(registry, root)
            # What is half deleted can be pushed at once, whatever became of the lease.
            push(registry, folder / "0.safetensors", "walk/again")
            whole(registry, root, "walk/again@1")
            registry.remove("walk/again")
            if rows(root)["lease"]:
                assert killed, "a gc that came to its end left its lease"
                blocked += 1
                with pytest.raises(InUse, match="its lease runs out at"):
                    registry.gc(grace=NO_GRACE)
                expire_leases(root)
            registry.gc(grace=NO_GRACE)
            holds_together(registry, root)
            found = rows(root)
            for name in ("tensor_index", "blob_tensors", "layout", "lease", "component", "version_file"):
                assert found[name] == last_rows[name], name
            assert [row[1:] for row in found["version"]] == [*(row[1:] for row in last_rows["version"]), (1, "purged")]
            assert digests(root) == last_digests  # one manifest for `again` and the first of the four
            assert not (root / "tmp" / "left.tmp").exists()  # what the killed one was writing is younger than an hour
        assert stages > 30, stages
        assert blocked > 20, blocked
        registry.close()
        print(stages, blocked)


def push(registry: Registry, source: Path, name: str) -> int:
    """Pushes, and ends the deletions that are in the way."""
    while True:
        try:
            return registry.push(source, name).version
        except InUse:
            finish_deleting(registry._context)


@pytest.mark.exhaustive
def test_a_gc_that_is_killed_at_any_stage_is_ended_by_the_next(template: Path) -> None:
    print(succeeds_alone(killed_collections, template, timeout=300))


@pytest.mark.parametrize(
    "after", [pytest.param(False, id="before"), pytest.param(True, id="after", marks=pytest.mark.exhaustive)]
)
def test_a_gc_that_is_interrupted_at_any_stage_gives_its_lease_back(
    template: Path, tmp_path: Path, after: bool
) -> None:
    succeeds_alone(interrupted_collections, template, after, timeout=300)


def interrupted_collections(template: str, after: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        prepared = to_collect(template, folder)
        root = Path(shutil.copytree(prepared, folder / "registry"))
        registry = Registry.open(root)

        def prepare(_: int) -> Callable[[], object]:
            registry.close()
            shutil.rmtree(root)
            shutil.copytree(prepared, root)
            return partial(registry.gc, grace=NO_GRACE)

        registry.gc(grace=NO_GRACE)
        last_digests = digests(root)
        stages = kept = 0
        for _ in interrupted_at_every_stage(prepare, after=after == "True"):
            stages += 1
            kept += bool(rows(root)["lease"])
            expire_leases(root)
            Registry.open(root).close()
            registry.gc(grace=NO_GRACE)
            holds_together(registry, root)
            assert [one.name for one in registry.find(pattern="walk/c*")] == ["walk/c1", "walk/c3"]
            assert digests(root) == last_digests
        assert stages > 20, stages
        assert kept <= 3, kept  # a Ctrl-C in the very transaction that takes the lease or gives it back
        registry.close()


# ---------------------------------------------------------------- beside others


def a_gc_beside_pushes(template: str) -> None:
    """Two processes push and remove versions that share tensors while two others collect without any grace period."""
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        root = Path(shutil.copytree(template, folder / "registry"))
        sources = [tensor_file(folder / f"{n}.safetensors", checkpoint(n)) for n in range(6)]

        def pusher(who: int) -> None:
            with Registry.open(root) as registry:
                for turn in range(TURNS):
                    source = sources[(turn * (who + 1)) % len(sources)]
                    name = f"walk/p{who}-{turn}"
                    push(registry, source, name)
                    if turn % 3 != 2:
                        registry.remove(name)
            (folder / f"done{who}").touch()

        def collector() -> None:
            with Registry.open(root) as registry:
                while not ((folder / "done0").exists() and (folder / "done1").exists()):
                    with suppress(InUse):  # the other collector is at work
                        registry.gc(grace=NO_GRACE)

        assert at_once([partial(pusher, 0), partial(pusher, 1), collector, collector]) == [0, 0, 0, 0]
        with Registry.open(root) as registry:
            registry.gc(grace=NO_GRACE)
            assert len(registry.find(pattern="walk/p*")) == 2 * TURNS // 3
            holds_together(registry, root)
            for version in registry.find(pattern="walk/p*"):
                who, turn = (int(part) for part in version.name.removeprefix("walk/p").split("-"))
                out = folder / "out"
                registry.pull(version.reference, out)
                assert out.read_bytes() == sources[(turn * (who + 1)) % len(sources)].read_bytes()
                out.unlink()
            assert registry.gc(grace=NO_GRACE).bytes_freed == 0


def test_a_gc_beside_pushes_takes_nothing_that_they_need(template: Path) -> None:
    succeeds_alone(a_gc_beside_pushes, template, timeout=300)
