"""Damage to what is more than one state dict in one file: splices, state documents, external blobs, descriptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.damage import (
    APART,
    COMMITTED,
    FAR,
    FULL,
    NEAR,
    RUN,
    append,
    blob_path,
    change_event,
    lie,
    placement_of,
    put,
    swap,
)
from tests.conformance.independent_reader import check_store

# ---------------------------------------------------------------- splices and state documents


@pytest.mark.parametrize(
    "change",
    [
        lambda splices: swap(splices, 0, 1),
        lambda splices: splices[0].__setitem__(0, 2052),
        lambda splices: splices[-1].__setitem__(0, 10**6),
        lambda splices: splices[0].__setitem__(1, "scheduler"),
        lambda splices: splices[0].__setitem__(2, 3),
        lambda splices: splices[0].__setitem__(3, 2),
        lambda splices: splices.pop(),
        lambda splices: splices.append(splices[-1]),
        lambda splices: splices.clear(),
    ],
)
def test_splices_that_say_something_else_are_noticed(store: Path, change: Callable[[Any], None]) -> None:
    change_event(store / RUN, lambda tree: change(placement_of(tree)["files"]["run.pth"][2]))
    assert any("walk/run" in problem for problem in check_store(store).problems)


def test_a_splice_may_name_the_same_tensor_of_another_component(store: Path) -> None:
    change_event(store / RUN, lambda tree: placement_of(tree)["files"]["run.pth"][2][0].__setitem__(1, "ema"))
    assert check_store(store).problems == []


@pytest.mark.parametrize("entry", [[2, False], [2, True], [0, True], [3, False, []], [2, False, None]])
def test_a_file_that_is_placed_in_another_way_is_noticed(store: Path, entry: list[Any]) -> None:
    change_event(store / RUN, lambda tree: placement_of(tree)["files"].update({"run.pth": entry}))
    assert any("walk/run" in problem for problem in check_store(store).problems)


def test_splices_of_a_file_that_is_a_component_are_noticed(store: Path) -> None:
    # The same bytes: but what a file is, is said once.
    change_event(
        store / FULL,
        lambda tree: placement_of(tree)["files"]["full.safetensors"].append(
            [[blob_path(COMMITTED, placement_of(tree)["blobs"][2][0]).stat().st_size, "model", 0, 11]]
        ),
    )
    assert any("splices" in problem for problem in check_store(store).problems)


@pytest.mark.parametrize(
    "change",
    [
        lambda payload: payload["nonfinite"].clear(),
        lambda payload: payload["nonfinite"].update(model=[0]),
        lambda payload: payload["nonfinite"].update(optimizer=[0, 1]),
        lambda payload: payload["nonfinite"].update(optimizer=[1, 1]),
        lambda payload: payload["nonfinite"].update(optimizer=[2]),
        lambda payload: payload["nonfinite"].update(optimizer=[True]),
        lambda payload: payload["nonfinite"].update(model=[]),
        lambda payload: payload["nonfinite"].update(discriminator=[0]),
        lambda payload: payload.update(nonfinite=None),
        lambda payload: payload.update(origin="elsewhere"),
        lambda payload: payload.update(origin={"path": 7}),
        lambda payload: payload.pop("origin"),
    ],
)
def test_a_push_that_says_something_else_of_its_source_is_noticed(
    store: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    change_event(store / RUN, lambda tree: change(tree["payload"]))
    assert any("walk/run" in problem for problem in check_store(store).problems)


def test_a_file_that_is_said_to_be_another_component_is_noticed(store: Path) -> None:
    def same_layout(tree: dict[str, Any]) -> None:
        swap(tree["components"], "ema", "model")
        tree["files"][0]["component"] = "model"

    assert any("splices" in problem for problem in lie(store, "walk/run", same_layout))


@pytest.mark.parametrize(
    "document",
    [b'{"$tensor":"state.0.other"}', b'{"$call":"os.system"}', b'{ "a":1}', b"", b'{"$tuple":{}}'],
)
def test_a_state_document_that_is_none_is_noticed(store: Path, document: bytes) -> None:
    digest = put(store, document)
    problems = lie(store, "walk/run", lambda tree: tree["components"]["optimizer"].update(data=digest))
    assert [problem.partition(":")[0] for problem in problems] == ["walk/run@1"]


# ---------------------------------------------------------------- external blobs and descriptions


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (FAR, lambda p: p["blobs"][0].__setitem__(1, "tensors")),
        (FAR, lambda p: p["files"].update({"far.safetensors": [0, False]})),
        (FAR, lambda p: p["files"].update({"far.safetensors": [1, True]})),
        (FAR, lambda p: p["components"].update(model=[[0, 1, 1]])),
        (FAR, lambda p: p["components"].update(model=[[1, 0, 1]])),
        (APART, lambda p: p["components"].update(model=[[0, 0, 2], [0, 0, 2]])),
        (APART, lambda p: p["components"].update(model=[[0, 0, 1], [0, 0, 1], [1, 0, 2]])),
        (APART, lambda p: p["components"].update(model=[[0, 0, 2], [1, 0, 1]])),
        (APART, lambda p: swap(p["blobs"], 0, 1)),
        (APART, lambda p: p["blobs"].__setitem__(0, ["0" * 64, "external"])),
        (APART, lambda p: p["blobs"].__setitem__(2, ["0" * 64, "external"])),
    ],
)
def test_what_is_said_of_an_absent_blob_may_not_contradict_itself(
    store: Path, path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    change_event(store / path, lambda tree: change(placement_of(tree)))
    assert any("walk/far" in problem for problem in check_store(store).problems)


def test_a_blob_that_another_version_needs_may_not_be_absent(store: Path) -> None:
    # All versions but one say that it is external.
    change_event(store / "journal" / "walk" / "near" / "1.json", lambda tree: tree["payload"].update(nonfinite={}))
    assert any("walk/near@1" in problem for problem in check_store(store).problems), "it is there, so it is proven"
    blob_path(store, NEAR).unlink()
    assert check_store(store).problems == [], "it is not there, so nobody can say"
    append(store, "walk/run", "described", 1, {"blobs": {"probe": NEAR}})
    assert any(NEAR in problem for problem in check_store(store).problems)


@pytest.mark.parametrize(
    "payload",
    [
        {"blobs": {}},
        {"blobs": {"probe": "0" * 64}},
        {"blobs": {"probe": "0"}},
        {"blobs": {"Probe": NEAR}},
        {"blobs": [NEAR]},
        {"blobs": {"probe": NEAR}, "more": 1},
        {},
    ],
)
def test_a_description_that_is_none_is_noticed(store: Path, payload: dict[str, Any]) -> None:
    append(store, "walk/run", "described", 1, payload)
    assert any("walk/run" in problem for problem in check_store(store).problems)


def test_the_newest_blob_of_each_role_describes_a_version(store: Path) -> None:
    first, second, other = (put(store, data) for data in (b"first", b"second", b"other"))
    append(store, "walk/run", "described", 1, {"blobs": {"probe": first, "history": other}})
    append(store, "walk/run", "described", 1, {"blobs": {"probe": second}})
    report = check_store(store)
    assert (report.problems, report.orphans) == ([], [])
    described = report.state["names"]["walk/run"]["versions"]["1"]["described"]
    assert described == {"history": other, "probe": second}
    blob_path(store, first).unlink()
    assert any(first in problem for problem in check_store(store).problems), "older ones are kept"
