"""A catalog that was lost, made again from the store: it says what the old one said."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
import torch
from sqlalchemy import select
from sqlalchemy.engine import make_url

from registry import Corrupt, Registry, StorageError
from registry.catalog import tables
from registry.catalog.dump import Dump, IndexRow, differences, dump, index_rows, wrong_index_rows
from registry.core.errors import InvalidInput, WrongStore
from registry.operations.context import Context
from tests.operations import varied


@dataclass
class Place:
    """A registry, by what names it, and the folder of its store."""

    url: str
    root: Path

    def dumped(self) -> tuple[Dump, set[IndexRow]]:
        with Registry.open(self.url) as registry, registry._context.reading() as connection:
            return dump(connection), index_rows(connection)

    def lose_catalog(self) -> None:
        if "://" in self.url:
            with psycopg.connect(self.url, autocommit=True) as connection:
                connection.execute("DROP SCHEMA public CASCADE")
                connection.execute("CREATE SCHEMA public")
        else:
            (self.root / "catalog.sqlite").unlink()


@pytest.fixture
def place(filled: Path, tmp_path: Path) -> Place:
    root = Path(shutil.copytree(filled, tmp_path / "registry"))
    return Place(str(root), root)


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A registry of its own on either database, filled here."""
    if request.param == "sqlite":
        place = request.getfixturevalue("place")
        assert isinstance(place, Place)
        yield place
        return
    url = str(request.getfixturevalue("postgresql_url"))
    (tmp_path / "source").mkdir()
    with Registry.init(url, store=tmp_path / "store") as registry:
        varied.fill(registry, tmp_path / "source")
    yield Place(url, tmp_path / "store")


def same(before: tuple[Dump, set[IndexRow]], after: tuple[Dump, set[IndexRow]]) -> None:
    assert list(differences(before[0], after[0])) == []
    assert {row.prefix for row in after[1]} == {row.prefix for row in before[1]}
    assert wrong_index_rows(after[1], after[0]) == []


def test_a_lost_catalog_comes_back_as_it_was(either: Place) -> None:
    before = either.dumped()
    assert all(before[0][table] for table in before[0] if table not in ("architecture", "module"))
    either.lose_catalog()
    done = Registry.reindex(either.url, store=either.root if "://" in either.url else None)
    assert (done.left_out, done.unreadable, done.kept_as) == ((), (), None)
    assert done.versions == len(before[0]["version"])
    assert done.events == len(before[0]["event"])
    same(before, either.dumped())


def test_a_catalog_that_is_there_is_filled_anew_in_its_place(either: Place) -> None:
    before = either.dumped()
    Registry.reindex(either.url)
    Registry.reindex(either.url)
    same(before, either.dumped())


def test_what_was_made_again_can_be_used(place: Place, tmp_path: Path) -> None:
    place.lose_catalog()
    Registry.reindex(place.url)
    with Registry.open(place.url) as registry:
        registry.pull("run/full", tmp_path / "run.ckpt")
        assert torch.equal(registry.load("run/model@1")["w0"], varied.tensors(1, (300, 400), (5,))["w0"])
        assert registry.push({"w0": torch.ones(2, 2)}, "hub/child", base="hub/stays").version == 2
        assert registry.get("walk/perturb:best").version == 2
    assert Registry.fsck(place.url, deep=True).problems == ()


def test_removed_and_purged_versions_stay_so(either: Place) -> None:
    with Registry.open(either.url) as registry:
        registry.remove("run/model@2", why="worse")
        registry.remove("walk/plain@1")
        registry.gc(grace=timedelta(0))
        registry.remove("hub/child@1")
        registry.remove("walk/live@1")
        registry.restore("walk/live@1", why="after all")
    before = either.dumped()
    states = {key: row["state"] for key, row in before[0]["version"].items()}
    assert {states["run/model", 2], states["walk/plain", 1]} == {"purged"}
    assert (states["hub/child", 1], states["walk/live", 1]) == ("removed", "present")
    assert Registry.fsck(either.url, deep=True).problems == ()
    either.lose_catalog()
    Registry.reindex(either.url, store=either.root if "://" in either.url else None)
    same(before, either.dumped())
    assert Registry.fsck(either.url, deep=True).problems == ()


def test_a_purged_version_that_was_pushed_again_lies_where_it_lies_now(either: Place, tmp_path: Path) -> None:
    own = {"w0": torch.full((300, 300), 2.0), "w1": torch.full((300, 300), 3.0)}
    with Registry.open(either.url) as registry:
        registry.push(own, "run/own")
        registry.push({**own, "w2": torch.ones(9)}, "run/more")
        registry.remove("run/own@1")
        registry.remove("run/more@1")
        registry.gc(grace=timedelta(0))
        # The other way round: now it is the other one that reuses.
        registry.push({**own, "w2": torch.ones(9)}, "run/more")
        registry.push(own, "run/own")
        assert registry.events("run/own")[-1].payload["placement"] is not None
    before = either.dumped()
    assert Registry.fsck(either.url, deep=True).problems == ()
    either.lose_catalog()
    Registry.reindex(either.url, store=either.root if "://" in either.url else None)
    after = either.dumped()
    # What gc had let go in between had another time, which the journal does not tell.
    differ = [one for one in differences(before[0], after[0]) if (one.table, one.column) != ("blob", "created_at")]
    assert differ == []
    assert Registry.fsck(either.url, deep=True).problems == ()
    with Registry.open(either.url) as registry:
        assert torch.equal(registry.load("run/own")["w1"], own["w1"])


def test_opening_without_the_catalog_names_the_mend(place: Place) -> None:
    place.lose_catalog()
    with pytest.raises(Corrupt, match=r"has lost its catalog.*registry reindex --registry"):
        Registry.open(place.url)
    for spoilt in (b"", b"no database at all" * 400):
        (place.root / "catalog.sqlite").write_bytes(spoilt)
        with pytest.raises(Corrupt, match=r"registry reindex"):
            Registry.open(place.url)


def test_a_lost_catalog_above_is_not_passed_over(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.lose_catalog()
    place.root.rename(tmp_path / ".registry")
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    monkeypatch.delenv("REGISTRY_URL", raising=False)
    with pytest.raises(Corrupt, match="has lost its catalog"):
        Registry.open()


@pytest.mark.parametrize("damage", ["not a database", "torn", "empty"])
def test_a_damaged_catalog_is_kept_beside_the_new_one(place: Place, damage: str) -> None:
    before = place.dumped()
    catalog = place.root / "catalog.sqlite"
    size = catalog.stat().st_size
    if damage == "torn":
        os.truncate(catalog, size // 2)
    else:
        catalog.write_bytes(b"" if damage == "empty" else b"no database at all" * 400)
    spoilt = catalog.read_bytes()
    done = Registry.reindex(place.url)
    assert done.kept_as is not None
    assert done.kept_as.name.startswith("catalog.sqlite.before-")
    assert done.kept_as.read_bytes() == spoilt
    same(before, place.dumped())
    assert list((place.root / "tmp").iterdir()) == []


def test_an_older_catalog_catches_up_with_the_journal(place: Place, tmp_path: Path) -> None:
    shutil.copy(place.root / "catalog.sqlite", tmp_path / "older.sqlite")
    with Registry.open(place.url) as registry:
        registry.tag("walk/perturb@1", "later")
    before = place.dumped()
    shutil.copy(tmp_path / "older.sqlite", place.root / "catalog.sqlite")
    (problem,) = (one for one in Registry.fsck(place.url).problems if one.kind == "catalog")
    assert problem.subject == "walk/perturb"
    Registry.reindex(place.url)
    same(before, place.dumped())


def test_events_that_are_still_to_be_journaled_are_rescued(either: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with Registry.open(either.url) as registry, monkeypatch.context() as patch:
        patch.setattr(Context, "journal", killed)
        with pytest.raises(KeyboardInterrupt):
            registry.tag("walk/perturb@1", "later")
    found = Registry.fsck(either.url)
    assert found.problems == ()
    assert "1 events are still to be written" in found.notes[0]
    assert Registry.reindex(either.url).rescued == 1
    with Registry.open(either.url) as registry:
        assert registry.get("walk/perturb:later").version == 1
    assert Registry.fsck(either.url).notes == ()


def damaged(place: Place, entry: str, change: str) -> Path:
    path = place.root / "journal" / entry
    if change == "missing":
        path.unlink()
    else:
        path.chmod(0o644)
        path.write_bytes(path.read_bytes().replace(b'"actor":"', b'"actor":"x'))
    return path


@pytest.mark.parametrize("change", ["missing", "damaged"])
def test_a_damaged_journal_is_refused_and_the_catalog_stays(place: Place, change: str) -> None:
    before = place.dumped()
    damaged(place, "walk/perturb/3.json", change)
    with pytest.raises(Corrupt, match=rf"walk/perturb ends before its event 3.*{change}.*--skip-damaged"):
        Registry.reindex(place.url)
    same(before, place.dumped())


def test_what_is_damaged_can_be_left_out_by_name(place: Place) -> None:
    damaged(place, "walk/perturb/3.json", "missing")
    damaged(place, "hub/stays/1.json", "damaged")
    with Registry.open(place.url) as registry:
        registry.tag("run/scheduler", "first")
    damaged(place, "run/scheduler/1.json", "missing")
    place.lose_catalog()
    done = Registry.reindex(place.url, skip_damaged=True)
    # hub/child came from hub/stays, walk/broken from a version that is still there.
    ends = {"walk/perturb": 3, "hub/stays": 1, "hub/child": 1, "run/scheduler": 1}
    assert {stop.name: stop.seq for stop in done.left_out} == ends
    with Registry.open(place.url) as registry:
        assert registry.get("walk/perturb").version == 1
        assert {version.name for version in registry.find(pattern="hub/*")} == {"hub/comes"}
        # Numbers that the journal has given are not given again.
        with pytest.raises(Corrupt, match="the journal knows more"):
            registry.tag("walk/perturb@1", "again")
        for name in ("hub/stays", "run/scheduler"):
            with pytest.raises(Corrupt, match="the journal knows more"):
                registry.push({"w0": torch.zeros(2)}, name)


def test_lost_weights_do_not_keep_the_catalog_from_being_made(place: Place) -> None:
    before = place.dumped()
    blobs = [place.root / "blobs" / "sha256" / one[0][:2] / one[0] for one in before[0]["blob_tensors"]]
    with Registry.open(place.url) as registry:
        (came,) = {blob for blob, role in registry.show("hub/comes").contents.blobs if role == "external"}
        (mixed,) = {blob for blob, role in registry.show("run/full").contents.blobs if role == "tensors"}
    there = [path for path in blobs if path.exists()]
    for path in there:
        path.unlink()
    place.lose_catalog()
    done = Registry.reindex(place.url)
    # No event says that the bytes of an external version came later: without them it is external again.
    assert {digest for digest, _ in done.unreadable} == {path.name for path in there} - {came}
    after = place.dumped()
    differ = list(differences(before[0], after[0]))
    # The names of tensors within a file of our own are lost with it; all else is told by others.
    assert {one.table for one in differ} <= {"blob", "layout", "layout_tensor"}
    assert {(one.key, one.column) for one in differ if one.column == "state"} == {((came,), "state")}
    assert {one.column for one in differ if one.table == "blob"} <= {"layout_id", "size", "state"}
    assert {one.key for one in differ if one.table == "blob"} <= {(came,), (mixed,)}


def test_a_catalog_of_another_registry_is_left_alone(place: Place, tmp_path: Path) -> None:
    Registry.init(tmp_path / "other").close()
    shutil.copy(tmp_path / "other" / "catalog.sqlite", place.root / "catalog.sqlite")
    with pytest.raises(WrongStore, match="move the catalog away"):
        Registry.reindex(place.url)


def test_a_damaged_catalog_that_others_use_is_left_alone(place: Place) -> None:
    catalog = place.root / "catalog.sqlite"
    with closing(sqlite3.connect(catalog, isolation_level=None)) as connection:
        connection.execute("DROP TABLE lease")
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="another process uses the damaged catalog"):
            Registry.reindex(place.url)
    assert Registry.reindex(place.url).kept_as is not None


def test_a_store_is_named_only_beside_a_server(place: Place, postgresql_url: str) -> None:
    with pytest.raises(InvalidInput, match="--store goes with"):
        Registry.reindex(place.url, store=place.root)
    with pytest.raises(InvalidInput, match="--store FOLDER"):
        Registry.reindex(postgresql_url)


def test_a_server_that_lost_its_catalog_is_asked_for_its_own_store(
    place: Place, tmp_path: Path, postgresql_url: str
) -> None:
    """The store of a folder's registry can be given a catalog on a server: they have one journal."""
    before = place.dumped()
    Registry.reindex(postgresql_url, store=place.root)
    same(before, Place(postgresql_url, place.root).dumped())
    with Registry.open(postgresql_url) as registry, registry._context.reading() as connection:
        assert connection.execute(select(tables.registry_meta.c.store_url)).scalar() == place.url
    assert make_url(postgresql_url).drivername == "postgresql"
