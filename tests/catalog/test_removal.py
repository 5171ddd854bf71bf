"""Versions that are removed, restored and purged, on both databases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import func, select

from registry import Registry
from registry.catalog import removal, tables
from registry.catalog.tables import metadata
from registry.core.errors import ArtifactNotFound, InUse, InvalidReference, TagProtected, VersionNotFound
from registry.core.reference import parse_artifact
from registry.operations.context import now, under_lock
from tests.catalog.artifacts import peft_folder, tensor_file

BASE, NAME = "team/base", "team/walk"
NOW = timedelta(0)


@pytest.fixture
def three(registry: Registry, tmp_path: Path) -> Registry:
    """A base, and three adapters on it of which the last continues the second; `prod` is on the second."""
    registry.push(tensor_file(tmp_path / "files", 1.0), BASE)
    for number in (1, 2, 3):
        registry.push(
            peft_folder(tmp_path / f"adapter-{number}", float(number)),
            NAME,
            base=BASE,
            force=True,
            tags=["prod"] if number == 2 else [],
            continued_from=f"{NAME}@2" if number == 3 else None,
            metadata={"number": number},
        )
    return registry


def kinds(registry: Registry, name: str) -> list[tuple[str, int | None]]:
    wanted = ("pushed", "removed", "restored", "purged")
    return [(event.kind, event.version) for event in registry.events(name) if event.kind in wanted]


def found(registry: Registry) -> list[str]:
    return [version.reference for version in registry.find()]


class TestRemove:
    def test_hides_a_version_from_every_question(self, three: Registry) -> None:
        digest = three.get(f"{NAME}@3").digest
        [removed] = three.remove(NAME, why="a bad run")
        assert (removed.reference, removed.digest, removed.changed) == (f"{NAME}@3", digest, True)
        assert three.resolve(NAME) == f"{NAME}@2"
        for reference in (f"{NAME}@3", f"{NAME}@sha256:{digest[:10]}"):
            with pytest.raises(VersionNotFound, match=f"{NAME}@3 was removed; to bring it back: registry restore"):
                three.resolve(reference)
        assert found(three) == [f"{BASE}@1", f"{NAME}@2", f"{NAME}@1"]
        assert three.events(NAME)[-1].payload == {"why": "a bad run"}

    def test_never_gives_a_number_again(self, three: Registry, tmp_path: Path) -> None:
        three.remove(f"{NAME}@3")
        assert three.push(peft_folder(tmp_path / "four", 4.0), NAME).version == 4

    def test_leaves_tags_where_they_are(self, three: Registry) -> None:
        removed = three.remove(f"{NAME}@3", f"{NAME}@2")
        assert [one.tags for one in removed] == [(), ("prod",)]
        with pytest.raises(VersionNotFound, match=f"{NAME}:prod points to {NAME}@2, which was removed"):
            three.get(f"{NAME}:prod")
        assert three.tag(f"{NAME}@1", "prod").tags == ("prod",)

    def test_is_refused_while_others_came_from_it(self, three: Registry) -> None:
        with pytest.raises(InUse, match=f"{BASE}@1 is the base or a parent of {NAME}@1, {NAME}@2, {NAME}@3;"):
            three.remove(BASE)
        with pytest.raises(InUse, match=f"{NAME}@2 is the base or a parent of {NAME}@3"):
            three.remove(f"{NAME}:prod")
        assert kinds(three, BASE) == [("pushed", 1)]

    def test_names_a_few_of_many_that_came_from_it(self, three: Registry, tmp_path: Path) -> None:
        for number in range(4, 8):
            three.push(peft_folder(tmp_path / f"{number}", float(number)), NAME, base=BASE, force=True)
        with pytest.raises(InUse, match=f"{NAME}@5 and 2 more; remove"):
            three.remove(BASE)

    def test_takes_several_in_any_order_or_none_of_them(self, three: Registry) -> None:
        with pytest.raises(InUse):
            three.remove(f"{NAME}@3", BASE)
        with pytest.raises(ArtifactNotFound):
            three.remove(f"{NAME}@3", "team/other")
        assert len(found(three)) == 4
        three.remove(BASE, f"{NAME}@1", f"{NAME}@3", f"{NAME}@2", f"{NAME}@2")
        assert found(three) == []
        assert kinds(three, NAME)[3:] == [("removed", 3), ("removed", 2), ("removed", 1)]
        with pytest.raises(VersionNotFound, match="every version of it was removed"):
            three.get(NAME)

    def test_is_refused_under_a_protected_tag(self, three: Registry) -> None:
        three.protect_tag(NAME, "prod")
        with pytest.raises(TagProtected, match=f"registry tag {NAME} prod --unprotect"):
            three.remove(f"{NAME}@3", f"{NAME}@2")
        three.protect_tag(NAME, "prod", on=False)
        three.remove(f"{NAME}@3", f"{NAME}@2")
        with pytest.raises(VersionNotFound, match="which was removed"):
            three.protect_tag(NAME, "prod")

    def test_of_what_is_removed_is_not_found(self, three: Registry) -> None:
        three.remove(f"{NAME}@3")
        with pytest.raises(VersionNotFound, match="was removed"):
            three.remove(f"{NAME}@3")

    def test_leaves_it_in_the_lineage_of_the_others(self, three: Registry) -> None:
        three.remove(f"{NAME}@3")
        lineage = three.log(f"{NAME}@2")
        assert [lineage.names[one] for one in lineage.removed] == [f"{NAME}@3"]


class TestRestore:
    def test_undoes_a_removal(self, three: Registry) -> None:
        before = three.show(f"{NAME}@3")
        three.remove(f"{NAME}@3")
        [restored] = three.restore(f"{NAME}@3", why="it was good")
        assert restored.changed
        after = three.show(f"{NAME}@3")
        assert (after.found, after.contents) == (before.found, before.contents)
        assert three.events(NAME)[-1].payload == {"why": "it was good", "placement": None}
        assert three.resolve(NAME) == f"{NAME}@3"

    def test_finds_a_version_by_number_digest_and_tag_alone(self, three: Registry) -> None:
        digest = three.get(f"{NAME}@2").digest
        for reference in (f"{NAME}@2", f"{NAME}:prod", f"{NAME}@sha256:{digest[:8]}"):
            three.remove(f"{NAME}@2") if reference != f"{NAME}@2" else three.remove(f"{NAME}@3", f"{NAME}@2")
            assert three.restore(reference)[0].reference == f"{NAME}@2"
        for reference in (NAME, f"{NAME}:latest"):
            with pytest.raises(InvalidReference, match="which version of it"):
                three.restore(reference)
        with pytest.raises(VersionNotFound, match="no such version"):
            three.restore(f"{NAME}@9")

    def test_of_what_is_present_changes_nothing(self, three: Registry) -> None:
        assert [one.changed for one in three.restore(f"{NAME}@3")] == [False]
        assert kinds(three, NAME) == [("pushed", 1), ("pushed", 2), ("pushed", 3)]

    def test_needs_those_that_it_came_from(self, three: Registry) -> None:
        three.remove(BASE, f"{NAME}@1", f"{NAME}@2", f"{NAME}@3")
        with pytest.raises(VersionNotFound, match=f"{BASE}@1 was removed; to bring it back: registry restore {BASE}@1"):
            three.restore(f"{NAME}@1")
        three.restore(f"{NAME}@3", f"{NAME}@2", f"{BASE}@1")
        assert found(three) == [f"{BASE}@1", f"{NAME}@3", f"{NAME}@2"]


class TestPurge:
    def test_keeps_what_a_version_was(self, three: Registry) -> None:
        three.remove(f"{NAME}@3")
        three.gc(grace=NOW)
        rows = {table.name: rows_about(three, table.name, 3) for table in metadata.tables.values()}
        assert {name for name, count in rows.items() if count} == {"version", "event", "lineage", "metadata"} | {
            *("version_blob", "finding"),
        }
        assert rows["version_blob"] == 2  # its manifest and its layout
        event = three.events(NAME)[-1]
        assert (event.kind, event.version) == ("purged", 3)
        assert event.payload["bytes"] > 0
        with pytest.raises(VersionNotFound, match="was removed, and gc took its bytes; push it again"):
            three.restore(f"{NAME}@3")
        with pytest.raises(VersionNotFound, match="gc took its bytes"):
            three.pull(f"{NAME}@3", "nowhere")

    def test_happens_to_removed_versions_alone(self, three: Registry) -> None:
        def purge(number: int) -> object:
            key = removal_key(three, number)
            return under_lock(
                three._context, *parse_artifact(NAME), lambda name, at: removal.purge(name, key, actor="gc", at=at)
            )

        assert purge(3) is None
        three.remove(f"{NAME}@3")
        assert purge(3) is not None
        assert purge(3) is None

    def test_ends_when_a_push_puts_the_bytes_somewhere(self, three: Registry) -> None:
        three.remove(f"{NAME}@3")
        three.gc(grace=NOW)
        key = removal_key(three, 3)
        placement = {"blobs": [], "components": {}, "files": {}}
        under_lock(
            three._context,
            *parse_artifact(NAME),
            lambda name, at: removal.restore(name, key, actor="ada", at=at, placement=placement),
        )
        assert three.events(NAME)[-1].payload == {"why": None, "placement": placement}
        assert rows_about(three, "version_blob", 3) == 0  # the push inserts its own
        assert three.resolve(NAME) == f"{NAME}@3"


def removal_key(registry: Registry, number: int) -> removal.VersionKey:
    version = tables.version
    with registry._context.reading() as connection:
        row = connection.execute(
            select(version.c.id, version.c.artifact_id, version.c.number, version.c.manifest_digest).where(
                version.c.number == number
            )
        ).one()
    return removal.VersionKey(*row)


def rows_about(registry: Registry, name: str, number: int) -> int:
    """How many rows of a table are about the version of this number."""
    table = metadata.tables[name]
    column = next((c for c in ("version_id", "child_id") if c in table.c), "id" if name == "version" else None)
    if column is None:
        return 0
    with registry._context.reading() as connection:
        statement = select(func.count()).select_from(table).where(table.c[column] == removal_key(registry, number).id)
        return connection.execute(statement).scalar_one()


def race(**works: Callable[[], object]) -> dict[str, Exception | None]:
    """Runs each in a thread of its own, all at the same moment; gives the refusals."""
    start = threading.Barrier(len(works))
    outcome: dict[str, Exception | None] = {}

    def run(what: str, work: Callable[[], object]) -> None:
        start.wait(timeout=30)
        try:
            work()
        except (InUse, VersionNotFound) as refused:
            outcome[what] = refused
        else:
            outcome[what] = None

    threads = [threading.Thread(target=run, args=pair) for pair in works.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert set(outcome) == set(works), "one of them failed or did not end"
    return outcome


def test_a_push_and_the_removal_of_its_base_never_both_succeed(
    three: Registry, registry_url: str, tmp_path: Path
) -> None:
    """Whoever is later is told: a child that is there has a base that is there."""
    three.remove(f"{NAME}@1", f"{NAME}@2", f"{NAME}@3")
    with Registry.open(registry_url) as other:
        for turn in range(8):
            folder = peft_folder(tmp_path / f"turn-{turn}", 100.0 + turn)
            outcome = race(
                push=partial(three.push, folder, f"team/turn-{turn}", base=f"{BASE}@1", force=True),
                remove=partial(other.remove, f"{BASE}@1"),
            )
            assert sorted(error is None for error in outcome.values()) == [False, True], outcome
            if outcome["remove"] is None:
                assert isinstance(outcome["push"], VersionNotFound)
                three.restore(f"{BASE}@1")
            else:
                three.remove(f"team/turn-{turn}@1")


def test_a_parent_that_a_push_holds_cannot_be_removed_until_it_ends(three: Registry, registry_url: str) -> None:
    three.remove(f"{NAME}@3")
    held, removed = removal_key(three, 2), threading.Event()

    def remove() -> None:
        with Registry.open(registry_url) as registry:
            registry.remove(f"{NAME}@2")
            removed.set()

    thread = threading.Thread(target=remove)
    with three._context.writing() as connection:
        removal.hold_present(connection, [held.id])
        thread.start()
        assert not removed.wait(timeout=0.3)
    thread.join(timeout=30)
    assert removed.is_set()
    with three._context.writing() as connection, pytest.raises(VersionNotFound, match=f"{NAME}@2 was removed"):
        removal.hold_present(connection, [held.id])
    with three._context.reading() as connection:
        assert removal.states(connection, [held.id]) == {held.id: "removed"}
    assert now() >= three.events(NAME)[-1].at
