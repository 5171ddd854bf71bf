"""Damage to a store: bytes, events and placements that are not what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.damage import (
    BLOBS,
    COMMITTED,
    EVENTS,
    FULL,
    NEAR,
    PERTURB,
    blob_path,
    change_event,
    lie,
    placement_of,
    pushes,
    read,
    swap,
    write,
)
from tests.conformance.independent_reader import check_store
from tests.vectors.make_vectors import HERE

# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("path", BLOBS, ids=lambda path: path.name[:8])
def test_a_flipped_bit_in_any_blob_is_noticed(store: Path, path: Path) -> None:
    good = (store / path).read_bytes()
    for place in {0, min(8, len(good) - 1), len(good) // 2, len(good) - 1}:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        write(store / path, bytes(bad))
        assert any(path.name in problem for problem in check_store(store).problems)


@pytest.mark.parametrize("path", BLOBS, ids=lambda path: path.name[:8])
def test_a_missing_or_shortened_blob_is_noticed(store: Path, path: Path) -> None:
    good = (store / path).read_bytes()
    write(store / path, good[:-1])
    assert check_store(store).problems
    (store / path).unlink()
    report = check_store(store)
    if path.name == NEAR:
        assert (report.problems, report.state["names"]["walk/near"]["versions"]["1"]["external"]) == ([], [NEAR])
    else:
        assert any(path.name in problem for problem in report.problems)


def test_a_link_or_a_folder_in_the_place_of_a_blob_is_noticed(store: Path, tmp_path: Path) -> None:
    path = store / BLOBS[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert check_store(store).problems
    path.unlink()
    path.mkdir()
    assert check_store(store).problems


@pytest.mark.parametrize("path", EVENTS, ids=lambda path: "-".join(path.parts[1:])[:-5])
def test_a_flipped_bit_anywhere_in_an_event_is_noticed(store: Path, path: Path) -> None:
    good = (store / path).read_bytes()
    # In four places, which are others in each event.
    step = 1 + len(good) // 4
    for place in range(17 * EVENTS.index(path) % step, len(good), step):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 7)
        write(store / path, bytes(bad))
        assert check_store(store).problems, f"byte {place}"


@pytest.mark.parametrize("path", EVENTS, ids=lambda path: "-".join(path.parts[1:])[:-5])
def test_a_changed_event_is_noticed_however_well_it_is_written(store: Path, path: Path) -> None:
    change_event(store / path, lambda tree: tree.update(actor="eve"), signed=False)
    (problem,) = check_store(store).problems[:1]
    assert "sha256" in problem


def newest(path: Path) -> bool:
    return not (COMMITTED / path).with_name(f"{int(path.stem) + 1}.json").exists()


@pytest.mark.parametrize(
    "path", [path for path in EVENTS if not newest(path)], ids=lambda path: "-".join(path.parts[1:])[:-5]
)
def test_a_missing_event_is_noticed(store: Path, path: Path) -> None:
    (store / path).unlink()
    assert any("missing" in problem for problem in check_store(store).problems)


@pytest.mark.parametrize(
    "path", [path for path in EVENTS if newest(path)], ids=lambda path: "-".join(path.parts[1:])[:-5]
)
def test_the_newest_event_of_a_name_is_missed_by_the_database_or_by_a_blob(store: Path, path: Path) -> None:
    # What docs/format.md says of it: the store alone need not show that its newest event is lost.
    (store / path).unlink()
    report = check_store(store)
    assert report.state != json.loads((HERE / "store_state.json").read_bytes())
    shared = path == Path("journal/team/walker/1.json")  # all of its blobs belong to walk/base@1 as well
    if path in pushes() and not shared:
        assert report.orphans


def test_blobs_that_nobody_names_are_reported_and_no_error(store: Path) -> None:
    data = b"left by a crash"
    digest = sha256(data).hexdigest()
    write(blob_path(store, digest), data)
    write(store / "tmp" / "0123.tmp", b"half of a")
    write(store / "catalog.sqlite", b"not ours")
    write(store / "journal" / "Not-a-name" / "x" / "1.json", b"{}")
    report = check_store(store)
    assert (report.problems, report.orphans) == ([], [digest])


# ---------------------------------------------------------------- placements, events and manifests


@pytest.mark.parametrize(
    "change",
    [
        lambda p: swap(p["components"]["model"], 0, 2),  # two tensors of one shape
        lambda p: swap(p["components"]["model"], 0, 1),
        lambda p: swap(p["blobs"], 0, 1),
        lambda p: swap(p["blobs"], 2, 3),
        lambda p: p["files"].update({"full.safetensors": [1, True]}),
        lambda p: p["files"].update({"full.safetensors": [2, True]}),
        lambda p: p["files"].update({"full.safetensors": [3, False]}),
        lambda p: p["files"].clear(),
        lambda p: p["components"]["model"].pop(),
        lambda p: p["components"]["model"].append([1, 7, 1]),
        lambda p: p["components"]["model"].__setitem__(-1, [1, 8, 1]),
        lambda p: p["components"].update(ema=[]),
        lambda p: p["blobs"].pop(),
    ],
)
def test_a_placement_that_points_elsewhere_is_noticed(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    change_event(store / FULL, lambda tree: change(placement_of(tree)))
    assert any("walk/full" in problem for problem in check_store(store).problems)


def test_placements_of_two_versions_that_are_swapped_are_noticed(store: Path) -> None:
    one, other = PERTURB / "1.json", PERTURB / "8.json"
    trees = [json.loads(read(path))["payload"]["placement"] for path in (one, other)]
    change_event(store / one, lambda tree: tree["payload"].update(placement=trees[1]))
    change_event(store / other, lambda tree: tree["payload"].update(placement=trees[0]))
    assert any("walk/perturb" in problem for problem in check_store(store).problems)


def test_a_tensor_that_lies_twice_may_be_placed_at_either(store: Path) -> None:
    # lm_head is embed: what the placement says is proven by the digest, so both ways are right.
    change_event(store / FULL, lambda tree: swap(placement_of(tree)["components"]["model"], 4, 5))
    assert check_store(store).problems == []


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (PERTURB / "2.json", lambda tree: tree.update(format=2)),
        (PERTURB / "2.json", lambda tree: tree.update(format=1.5)),
        (PERTURB / "2.json", lambda tree: tree.update(more=1)),
        (PERTURB / "2.json", lambda tree: tree.update(registry="f" * 32)),
        (PERTURB / "2.json", lambda tree: tree.update(name="base")),
        (PERTURB / "2.json", lambda tree: tree.update(seq=3)),
        (PERTURB / "2.json", lambda tree: tree.update(kind="applause")),
        (PERTURB / "2.json", lambda tree: tree.update(version=9)),
        (PERTURB / "2.json", lambda tree: tree.update(version=None)),
        (PERTURB / "2.json", lambda tree: tree.update(tag="prod")),
        (PERTURB / "2.json", lambda tree: tree.update(at="2026-11-01T11:59:59.000000Z")),
        (PERTURB / "2.json", lambda tree: tree.update(at="2026-11-01T12:00:04Z")),
        (PERTURB / "2.json", lambda tree: tree["payload"].update(seed="3")),
        (PERTURB / "3.json", lambda tree: tree["payload"]["values"].update(reward="nan")),
        (PERTURB / "3.json", lambda tree: tree["payload"].update(step=-1)),
        (PERTURB / "1.json", lambda tree: tree.update(version=2)),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(base="walk/base@2")),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(base=None)),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(base="walk/nobody@1")),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(base="walk/base:v1")),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(content="0" * 64)),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(manifest=tree["payload"]["content"])),
        (PERTURB / "8.json", lambda tree: tree["payload"].update(parents=["walk/perturb@2"])),
        (PERTURB / "8.json", lambda tree: tree["payload"].update(parents=["walk/perturb@3"])),
        (PERTURB / "8.json", lambda tree: tree["payload"].update(parents=[])),
        (PERTURB / "12.json", lambda tree: tree["payload"].update({"from": 2})),
        (PERTURB / "12.json", lambda tree: tree["payload"].update(to=2)),
        (PERTURB / "12.json", lambda tree: tree.update(tag="latest")),
        (PERTURB / "12.json", lambda tree: tree.update(tag="7")),
        (PERTURB / "13.json", lambda tree: tree.update(kind="tag_unprotected")),
        (PERTURB / "17.json", lambda tree: tree.update(tag="prod")),
        (PERTURB / "5.json", lambda tree: tree["payload"].update(text=None)),
    ],
)
def test_an_event_that_does_not_follow_is_noticed(
    store: Path, path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    change_event(store / path, change)
    assert any("walk/perturb" in problem for problem in check_store(store).problems)


def test_an_event_that_moves_to_another_place_is_noticed(store: Path) -> None:
    write(store / "journal" / "walk" / "tied" / "2.json", read(PERTURB / "2.json"))
    assert any("walk/tied event 2" in problem for problem in check_store(store).problems)


def test_a_store_of_another_format_is_refused(store: Path) -> None:
    for text in (
        '{"id":"0123456789abcdef0123456789abcdef","store_format":2}',
        '{"id":"0123456789abcdef0123456789abcdef","store_format":true}',
        '{"id":"0123","store_format":1}',
        '{"id":"0123456789abcdef0123456789abcdef"}',
        '{"id":"0123456789abcdef0123456789abcdef","store_format":1,"x":0}',
        "",
    ):
        write(store / "registry.json", text.encode())
        assert any("registry.json" in problem or "JSON" in problem for problem in check_store(store).problems), text


def test_a_manifest_that_lies_about_its_tensors_is_noticed(store: Path) -> None:
    (problem,) = lie(store, "walk/merged", lambda tree: swap(tree["components"]["adapter"]["tensors"], 0, 2))
    assert "another digest" in problem
