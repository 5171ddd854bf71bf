from __future__ import annotations

import json
from typing import Any

import pytest

from registry.core.errors import InvalidManifest
from registry.core.placement import MAX_TENSORS, ROLES, FilePlacement, Placement, pack_entries, unpack_entries

BLOBS = tuple((f"{place:064x}", role) for place, role in enumerate(ROLES))


def placement(*entries: tuple[int, int]) -> Placement:
    return Placement(BLOBS, {"model": entries}, {"a.safetensors": FilePlacement(2, False), "b": FilePlacement(3, True)})


def test_neighbours_in_one_blob_become_one_run() -> None:
    runs = placement((0, 0), (0, 1), (0, 2), (1, 7), (1, 8), (0, 3), (0, 5), (0, 5)).to_json()["components"]["model"]
    assert runs == [[0, 0, 3], [1, 7, 2], [0, 3, 1], [0, 5, 1], [0, 5, 1]]


def test_what_is_written_is_read_back_also_through_json() -> None:
    for one in (placement(), placement((0, 0)), placement((1, 5), (0, 2), (0, 3), (1, 6), (1, 6), (1, 5))):
        assert Placement.from_json(one.to_json()) == one
        assert Placement.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ([[len(BLOBS), 0, 1]], f"with {len(BLOBS)} blobs"),
        ([[-1, 0, 1]], f"with {len(BLOBS)} blobs"),
        ([[0, -1, 1]], f"with {len(BLOBS)} blobs"),
        ([[0, 0, 0]], f"with {len(BLOBS)} blobs"),
        ([[0, 0, -1]], f"with {len(BLOBS)} blobs"),
        ([[0, 0, 10**15]], f"with {len(BLOBS)} blobs"),
        ([[0, MAX_TENSORS, 1]], f"with {len(BLOBS)} blobs"),
        ([[0, 0, MAX_TENSORS - 1], [1, 0, 2]], f"with {len(BLOBS)} blobs"),
        ([["0", 0, 1]], "whole numbers"),
        ([[0.0, 0, 1]], "whole numbers"),
        ([[True, 0, 1]], "whole numbers"),
        ([[0, None, 1]], "whole numbers"),
        ([[0, 1]], "unpack"),
        ([0], "unpack"),
        (0, "iterable"),
    ],
)
def test_a_bad_run_is_refused(runs: Any, reason: str) -> None:
    with pytest.raises(InvalidManifest, match=reason):
        Placement.from_json({**placement().to_json(), "components": {"model": runs}})


@pytest.mark.parametrize(
    "file", [[len(BLOBS), True], [-1, True], ["0", True], [0, 1], [0], [0, True, 1], None, [True, True]]
)
def test_a_bad_file_is_refused(file: Any) -> None:
    with pytest.raises(InvalidManifest, match="not a placement"):
        Placement.from_json({**placement().to_json(), "files": {"x": file}})


@pytest.mark.parametrize(
    "blobs",
    [
        [["0" * 63, "tensors"]],
        [["0" * 64, "tensor"]],
        [["0" * 64]],
        [["0" * 64, "tensors"], ["0" * 64, "header"]],
        [["0" * 64, ["tensors"]]],
        [[0, "tensors"]],
        None,
        "ab",
    ],
)
def test_a_bad_blob_is_refused(blobs: Any) -> None:
    with pytest.raises(InvalidManifest):
        Placement.from_json({"blobs": blobs, "components": {}, "files": {}})


@pytest.mark.parametrize(
    "tree", [None, [], 1, "x", {}, {"blobs": [], "components": []}, {"blobs": [], "components": {}}]
)
def test_what_is_no_placement_at_all_is_refused(tree: Any) -> None:
    with pytest.raises(InvalidManifest, match="not a placement"):
        Placement.from_json(tree)


def test_packed_entries_are_two_little_endian_words_each() -> None:
    assert pack_entries([(1, 2), (0x01020304, 0)]) == bytes.fromhex("01000000 02000000 04030201 00000000")
    assert unpack_entries(pack_entries([(1, 2), (3, 4)])) == ((1, 2), (3, 4))
    assert unpack_entries(b"") == ()


@pytest.mark.parametrize("length", [1, 4, 7, 9])
def test_packed_entries_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(InvalidManifest, match=f"{length} bytes"):
        unpack_entries(bytes(length))
