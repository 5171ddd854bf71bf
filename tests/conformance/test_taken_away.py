"""Versions that were removed, restored or purged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.damage import (
    COMMITTED,
    RUN,
    append,
    blob_path,
    put,
    read,
)
from tests.conformance.independent_documents import length as spec_length
from tests.conformance.independent_documents import read_header
from tests.conformance.independent_reader import check_store


def test_a_removed_version_is_whole_and_not_among_the_others(store: Path) -> None:
    append(store, "walk/run", "removed", 1, {"why": "by mistake"})
    report = check_store(store)
    assert (report.problems, report.orphans) == ([], [])
    run = report.state["names"]["walk/run"]
    assert (run["versions"], run["gone"], run["latest"]) == ({}, {"1": "removed"}, None)
    append(store, "walk/run", "restored", 1, {"why": None, "placement": None})
    assert list(check_store(store).state["names"]["walk/run"]["versions"]) == ["1"]


def test_of_a_purged_version_the_manifest_and_the_layouts_stay(store: Path) -> None:
    payload = json.loads(read(RUN))["payload"]
    append(store, "walk/run", "removed", 1, {"why": None})
    append(store, "walk/run", "purged", 1, {"bytes": 1})
    own = [digest for digest, role in payload["placement"]["blobs"] if role in ("tensors", "header", "data")]
    assert check_store(store).orphans == sorted(own), "they are there still, and nothing needs them"
    kept = {digest: blob_path(store, digest).read_bytes() for digest in own}
    for digest in own:
        blob_path(store, digest).unlink()
    assert check_store(store).problems == []
    assert check_store(store).state["names"]["walk/run"]["gone"] == {"1": "purged"}

    # Pushed again it has another placement: the tensors that were found again lie elsewhere.
    whole = b"".join(rebuilt(kept, payload))
    digest = put(store, whole)
    placement = json.loads(json.dumps(payload["placement"]))
    placement["blobs"] = [[digest if role == "header" else one, role] for one, role in placement["blobs"]]
    placement["files"] = {"run.pth": [2, True]}
    append(store, "walk/run", "restored", 1, {"why": None, "placement": placement})
    assert any("missing" in problem for problem in check_store(store).problems)
    for one, role in payload["placement"]["blobs"]:
        if role in ("tensors", "data"):
            put(store, kept[one])
    report = check_store(store)
    assert (report.problems, report.orphans) == ([], [])
    for one in (payload["manifest"], next(one for one, role in placement["blobs"] if role == "layout")):
        data = blob_path(store, one).read_bytes()
        blob_path(store, one).unlink()
        assert any(one in problem for problem in check_store(store).problems)
        put(store, data)


def rebuilt(kept: dict[str, bytes], payload: dict[str, Any]) -> Iterator[bytes]:
    """The file of walk/run, put together as docs/format.md says, once more."""
    placement = payload["placement"]
    position, _, splices = placement["files"]["run.pth"]
    skeleton, done = kept[placement["blobs"][position][0]], 0
    for at, role, first, length in splices:
        yield skeleton[done:at]
        done = at
        entries = [(b, start + step) for b, start, count in placement["components"][role] for step in range(count)]
        for place, ordinal in entries[first : first + length]:
            data = blob_path(COMMITTED, placement["blobs"][place][0]).read_bytes()
            head = read_header(data)
            begin = head.head + head.begins[ordinal]
            yield data[begin : begin + spec_length(head.specs[ordinal])]
    yield skeleton[done:]


@pytest.mark.parametrize(
    "events",
    [
        [("removed", {})],
        [("removed", {"why": 7})],
        [("purged", {"bytes": 0})],
        [("restored", {"why": None, "placement": None})],
        [("removed", {"why": None}), ("removed", {"why": None})],
        [("removed", {"why": None}), ("purged", {"bytes": -1})],
        [("removed", {"why": None}), ("purged", {"bytes": 0}), ("purged", {"bytes": 0})],
        [("removed", {"why": None}), ("purged", {"bytes": 0}), ("restored", {"why": None, "placement": None})],
        [("removed", {"why": None}), ("restored", {"why": None, "placement": {}})],
        [("removed", {"why": None}), ("restored", {"why": None})],
    ],
)
def test_a_state_that_does_not_follow_is_noticed(store: Path, events: list[tuple[str, dict[str, Any]]]) -> None:
    for kind, payload in events:
        append(store, "walk/run", kind, 1, payload)
    assert any("walk/run" in problem for problem in check_store(store).problems)


def test_a_version_that_is_present_came_from_what_is_present(store: Path) -> None:
    append(store, "walk/far", "removed", 1, {"why": None})
    assert check_store(store).problems == ["walk/onfar@1: its parent walk/far@1 is removed"]
    append(store, "walk/onfar", "removed", 1, {"why": None})
    assert check_store(store).problems == []


def test_a_version_with_a_protected_tag_is_not_removed(store: Path) -> None:
    append(store, "walk/perturb", "removed", 3, {"why": None})
    assert any("protected" in problem for problem in check_store(store).problems)
