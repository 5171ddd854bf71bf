"""Tags: moves and their history, protection, and what a tag was at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from registry import Registry
from registry.core.errors import (
    ArtifactNotFound,
    InvalidReference,
    TagMoved,
    TagNotFound,
    TagProtected,
    VersionNotFound,
)
from tests.catalog.artifacts import tensor_file

NAME = "team/walk"
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
TICK = timedelta(microseconds=1)


class Clock:
    """The time that operations see; it stands still until it is set."""

    def __init__(self) -> None:
        self.time = NOON

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    with monkeypatch.context() as patch:
        for room in ("context", "push", "annotate", "tagging", "discover"):
            patch.setattr(f"registry.operations.{room}.now", made, raising=False)
        yield made


@pytest.fixture
def versions(registry: Registry, tmp_path: Path) -> Callable[[int], None]:
    """Pushes so many versions of NAME."""
    made = 0

    def push(count: int) -> None:
        nonlocal made
        for _ in range(count):
            made += 1
            registry.push(tensor_file(tmp_path / "files", made), NAME)

    return push


def at(registry: Registry, moment: datetime, tag: str = "prod") -> int:
    return registry.get(f"{NAME}:{tag}@{{{moment.isoformat()}}}").version


def test_a_tag_moves_and_remembers(registry: Registry, versions: Callable[[int], None], clock: Clock) -> None:
    versions(2)
    registry.tag(f"{NAME}@1", "prod", why="first")
    clock.time += SECOND
    registry.tag(f"{NAME}@2", "prod", why="better")
    assert registry.get(f"{NAME}:prod").version == 2
    assert registry.get(f"{NAME}@2").tags == ("prod",)
    assert registry.get(f"{NAME}@1").tags == ()
    first, second = registry.tag_history(NAME, "prod")
    assert (first.kind, first.version, first.payload) == ("tag_moved", 1, {"from": None, "to": 1, "why": "first"})
    assert (second.version, second.payload) == (2, {"from": 1, "to": 2, "why": "better"})
    assert (first.at, second.at) == (NOON, NOON + SECOND)
    assert first.actor


def test_a_move_to_where_it_points_is_no_event(registry: Registry, versions: Callable[[int], None]) -> None:
    versions(1)
    registry.tag(NAME, "prod")
    registry.tag(f"{NAME}:prod", "prod", why="again")
    assert len(registry.tag_history(NAME, "prod")) == 1


def test_a_tag_is_found_as_it_was_at_any_instant(
    registry: Registry, versions: Callable[[int], None], clock: Clock
) -> None:
    versions(2)
    registry.tag(f"{NAME}@1", "prod")
    clock.time = NOON + 10 * SECOND
    registry.tag(f"{NAME}@2", "prod")
    clock.time = NOON + 20 * SECOND
    registry.delete_tag(NAME, "prod")
    clock.time = NOON + 30 * SECOND
    registry.tag(f"{NAME}@1", "prod")

    with pytest.raises(TagNotFound, match="not set then"):
        at(registry, NOON - TICK)
    assert at(registry, NOON) == 1
    assert at(registry, NOON + 10 * SECOND - TICK) == 1
    assert at(registry, NOON + 10 * SECOND) == 2
    assert at(registry, NOON + 20 * SECOND - TICK) == 2
    for gone in (NOON + 20 * SECOND, NOON + 30 * SECOND - TICK):
        with pytest.raises(TagNotFound, match="not set then"):
            at(registry, gone)
    assert at(registry, NOON + 30 * SECOND) == 1
    assert at(registry, datetime(9999, 12, 31, tzinfo=UTC)) == 1


def test_a_time_may_have_an_offset_or_be_a_bare_date(
    registry: Registry, versions: Callable[[int], None], clock: Clock
) -> None:
    versions(2)
    registry.tag(f"{NAME}@1", "prod")
    clock.time = datetime(2026, 11, 24, tzinfo=UTC)
    registry.tag(f"{NAME}@2", "prod")
    assert registry.get(f"{NAME}:prod@{{2026-11-24}}").version == 2
    assert registry.get(f"{NAME}:prod@{{2026-11-23T23:59:59.999999}}").version == 1
    assert registry.get(f"{NAME}:prod@{{2026-11-24T01:59:59+02:00}}").version == 1
    assert registry.get(f"{NAME}:prod@{{2026-11-24T02:00+02:00}}").version == 2
    with pytest.raises(TagNotFound):
        registry.get(f"{NAME}:prod@{{2026-11-23}}")


def test_latest_is_the_highest_number_and_cannot_be_set(
    registry: Registry, versions: Callable[[int], None], clock: Clock
) -> None:
    versions(1)
    clock.time += SECOND
    versions(2)
    registry.tag(f"{NAME}@1", "prod")
    assert registry.get(NAME).version == registry.get(f"{NAME}:latest").version == 3
    assert registry.get(f"{NAME}@{{{NOON.isoformat()}}}").version == 1
    assert registry.get(f"{NAME}:latest@{{{clock.time.isoformat()}}}").version == 3
    with pytest.raises(VersionNotFound):
        registry.get(f"{NAME}@{{{(NOON - TICK).isoformat()}}}")
    for attempt in (
        lambda: registry.tag(f"{NAME}@1", "latest"),
        lambda: registry.delete_tag(NAME, "latest"),
        lambda: registry.protect_tag(NAME, "latest"),
        lambda: registry.push("nowhere", f"{NAME}:latest"),
    ):
        with pytest.raises(InvalidReference, match="latest"):
            attempt()


def test_a_protected_tag_stays_until_that_is_lifted(
    registry: Registry, versions: Callable[[int], None], tmp_path: Path
) -> None:
    versions(2)
    registry.tag(f"{NAME}@1", "prod")
    assert registry.protect_tag(NAME, "prod", why="released")
    assert not registry.protect_tag(NAME, "prod")
    for attempt in (
        lambda: registry.tag(f"{NAME}@2", "prod"),
        lambda: registry.delete_tag(NAME, "prod"),
        lambda: registry.push(tensor_file(tmp_path, 77), NAME, tags=["prod"]),
    ):
        with pytest.raises(TagProtected, match="stays at @1; lift the protection first"):
            attempt()
    assert registry.get(NAME).version == 2, "the refused push left a version"
    registry.tag(f"{NAME}@1", "prod")  # it is there already
    assert registry.get(f"{NAME}:prod").version == 1

    assert registry.protect_tag(NAME, "prod", on=False)
    registry.tag(f"{NAME}@2", "prod")
    kinds = [event.kind for event in registry.tag_history(NAME, "prod")]
    assert kinds == ["tag_moved", "tag_protected", "tag_unprotected", "tag_moved"]


def test_a_deleted_tag_keeps_its_history_and_comes_back_unprotected(
    registry: Registry, versions: Callable[[int], None]
) -> None:
    versions(1)
    registry.tag(NAME, "prod")
    registry.delete_tag(NAME, "prod", why="withdrawn")
    with pytest.raises(TagNotFound, match=f"{NAME} has latest"):
        registry.get(f"{NAME}:prod")
    with pytest.raises(TagNotFound):
        registry.delete_tag(NAME, "prod")
    registry.tag(NAME, "prod")
    _, deleted, again = registry.tag_history(NAME, "prod")
    assert deleted.kind == "tag_deleted"
    assert (deleted.version, deleted.payload) == (1, {"from": 1, "why": "withdrawn"})
    assert again.payload["from"] is None


def test_a_move_can_name_what_it_expects(registry: Registry, versions: Callable[[int], None]) -> None:
    versions(3)
    with pytest.raises(TagMoved, match=r"points to nothing, expected @1; .*look again"):
        registry.tag(f"{NAME}@2", "prod", expected=1)
    registry.tag(f"{NAME}@1", "prod", expected=0)
    with pytest.raises(TagMoved, match="points to @1, expected nothing"):
        registry.tag(f"{NAME}@2", "prod", expected=0)
    with pytest.raises(TagMoved, match="points to @1, expected @3"):
        registry.tag(f"{NAME}@2", "prod", expected=3)
    registry.tag(f"{NAME}@2", "prod", expected=1)
    assert registry.get(f"{NAME}:prod").version == 2


def test_a_clock_that_goes_back_does_not_turn_history_round(
    registry: Registry, versions: Callable[[int], None], clock: Clock
) -> None:
    versions(1)
    registry.tag(NAME, "prod")
    clock.time = NOON - timedelta(hours=1)
    versions(1)
    registry.tag(f"{NAME}@2", "prod", why="pushed an hour before it was made, says the clock")
    registry.annotate(NAME, metadata={"k": "v"}, metrics={"m": 1.0})
    registry.delete_tag(NAME, "prod")

    assert {event.at for event in registry.events(NAME)} == {NOON}
    assert registry.get(f"{NAME}@2").created_at == NOON
    assert registry.get(f"{NAME}@{{{NOON.isoformat()}}}").version == 2
    with pytest.raises(VersionNotFound):
        registry.get(f"{NAME}@{{{(NOON - TICK).isoformat()}}}")
    with pytest.raises(TagNotFound):
        at(registry, NOON)
    clock.time = NOON + SECOND
    registry.tag(f"{NAME}@1", "prod")
    assert registry.tag_history(NAME, "prod")[-1].at == NOON + SECOND


def test_tags_of_two_names_are_two(registry: Registry, versions: Callable[[int], None], tmp_path: Path) -> None:
    versions(2)
    registry.push(tensor_file(tmp_path, 99), "team/run", tags=["prod"])
    registry.tag(f"{NAME}@2", "prod")
    assert registry.get("team/run:prod").version == 1
    assert [version.reference for version in registry.find(tag="prod")] == ["team/run@1", f"{NAME}@2"]
    registry.delete_tag("team/run", "prod")
    assert registry.get(f"{NAME}:prod").version == 2


def test_upper_and_lower_case_are_two_tags(registry: Registry, versions: Callable[[int], None]) -> None:
    versions(2)
    registry.tag(f"{NAME}@1", "Prod")
    registry.tag(f"{NAME}@2", "prod")
    assert (registry.get(f"{NAME}:Prod").version, registry.get(f"{NAME}:prod").version) == (1, 2)


def test_what_is_not_there_is_said(registry: Registry, versions: Callable[[int], None]) -> None:
    versions(1)
    registry.tag(NAME, "stable")
    with pytest.raises(TagNotFound, match=f"no such tag; {NAME} has stable, latest"):
        registry.get(f"{NAME}:prod")
    with pytest.raises(TagNotFound, match="no such tag"):
        at(registry, NOON, "prod")
    with pytest.raises(TagNotFound, match="never had a tag prod"):
        registry.tag_history(NAME, "prod")
    with pytest.raises(TagNotFound, match="has no tag prod"):
        registry.protect_tag(NAME, "prod")
    with pytest.raises(ArtifactNotFound, match=f"did you mean {NAME}"):
        registry.tag("team/wolk", "prod")
    with pytest.raises(VersionNotFound, match="highest number of team/walk is 1"):
        registry.tag(f"{NAME}@2", "prod")
