"""A store that the first program wrote, checked in as it was: today's program makes its catalog again, and gives back
every file of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from registry import Registry
from registry.core.canonical_json import parse_json
from tests.conformance.independent_reader import check_store

FIRST = Path(__file__).with_name("first_store")
PUSHED = sorted(
    (
        parse_json(path.read_bytes())
        for path in FIRST.glob("journal/*/*/*.json")
        if b'"kind":"pushed"' in path.read_bytes()
    ),
    key=lambda event: str(event["namespace"]) + str(event["name"]) + str(event["seq"]),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the store, with a catalog made from it."""
    copy = Path(shutil.copytree(FIRST, tmp_path_factory.mktemp("first") / "registry"))
    Registry.reindex(copy)
    return copy


@pytest.fixture(scope="module")
def registry(root: Path) -> Iterator[Registry]:
    with Registry.open(root) as opened:
        yield opened


def test_it_is_the_first_programs() -> None:
    assert len(PUSHED) > 10
    assert all("nonfinite" not in event["payload"] and "origin" not in event["payload"] for event in PUSHED)


@pytest.mark.parametrize("event", PUSHED, ids=lambda event: f"{event['namespace']}/{event['name']}@{event['version']}")
def test_every_file_of_it_comes_back(registry: Registry, tmp_path: Path, event: dict[str, object]) -> None:
    reference = f"{event['namespace']}/{event['name']}@{event['version']}"
    details = registry.show(reference)
    assert details.events[0].payload == event["payload"]
    registry.pull(reference, tmp_path / "out")
    for file in details.contents.files:
        path = tmp_path / "out" if (tmp_path / "out").is_file() else tmp_path / "out" / file.path
        assert sha256(path.read_bytes()).hexdigest() == file.sha256


def test_the_journal_is_as_it_was_and_the_registry_is_whole(root: Path) -> None:
    for path in FIRST.glob("journal/*/*/*.json"):
        assert (root / path.relative_to(FIRST)).read_bytes() == path.read_bytes()
    assert Registry.fsck(root, deep=True).problems == ()


def test_a_reader_of_the_page_takes_it_for_whole() -> None:
    assert check_store(FIRST).problems == []


def test_what_only_the_weights_know_is_found_again(tmp_path: Path) -> None:
    """The first program's events do not say which tensors hold NaN."""
    root = tmp_path / "registry"
    with Registry.init(root) as made:
        made.push({"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")])}, "walk/nan")
        (event, *_) = made.events("walk/nan")
        registry_id = made.id
    payload = {key: value for key, value in event.payload.items() if key not in ("nonfinite", "origin")}
    path = root / "journal" / "walk" / "nan" / "1.json"
    path.chmod(0o644)
    path.write_bytes(replace(event, payload=payload).document(registry_id))
    for file in root.glob("catalog.sqlite*"):
        file.unlink()
    Registry.reindex(root)
    with Registry.open(root) as again:
        assert [(one.code, one.subject) for one in again.show("walk/nan").findings] == [("C17", "bad")]
    assert Registry.fsck(root).problems == ()
