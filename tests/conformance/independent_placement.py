"""Placements of docs/format.md, read from that page alone."""

from __future__ import annotations

from typing import Any

from tests.conformance.independent_documents import is_digest, is_text, is_whole, members, require

ROLES = ("tensors", "reused", "header", "file", "data", "layout", "manifest", "external")
MOST = 1 << 24


def read_placement(tree: Any) -> dict[str, Any]:
    """Placement with its runs written out: `blobs` as pairs, `components` as role -> [(blob, ordinal), ...], `files` as
    path -> (blob, whole, splices or None)."""
    members(tree, "placement", "blobs components files")
    blobs, components, files = tree["blobs"], tree["components"], tree["files"]
    require(isinstance(blobs, list) and isinstance(components, dict) and isinstance(files, dict), "placement")
    for pair in blobs:
        require(isinstance(pair, list) and len(pair) == 2 and is_digest(pair[0]), "placement: a blob is no digest")
        require(pair[1] in ROLES, "placement: unknown role")
    require(len({digest for digest, _ in blobs}) == len(blobs), "placement: a blob twice")
    spread = {role: read_runs(runs, len(blobs)) for role, runs in components.items()}
    read = {path: read_file_entry(path, entry, len(blobs), spread) for path, entry in files.items()}
    return {"blobs": [(digest, role) for digest, role in blobs], "components": spread, "files": read}


def read_runs(runs: Any, blobs: int) -> list[tuple[int, int]]:
    require(isinstance(runs, list), "placement: a component is no list")
    found: list[tuple[int, int]] = []
    for run in runs:
        require(isinstance(run, list) and len(run) == 3 and all(map(is_whole, run)), f"placement: run {run}")
        blob, first, count = run
        require(blob < blobs and count >= 1, f"placement: run {run}")
        require(first + count + len(found) <= MOST, f"placement: run {run} is longer than any header")
        found += [(blob, first + step) for step in range(count)]
    return found


def read_file_entry(
    path: str, entry: Any, blobs: int, components: dict[str, list[tuple[int, int]]]
) -> tuple[int, bool, list[tuple[int, str, int, int]] | None]:
    require(isinstance(entry, list) and len(entry) in (2, 3), f"placement of {path}")
    blob, whole = entry[:2]
    require(is_whole(blob) and blob < blobs and type(whole) is bool, f"placement of {path}")
    if len(entry) == 2:
        return blob, whole, None
    require(not whole and isinstance(entry[2], list), f"placement of {path}: splices")
    splices, before = [], 0
    for splice in entry[2]:
        require(isinstance(splice, list) and len(splice) == 4, f"placement of {path}: splice {splice}")
        at, role, first, count = splice
        require(
            is_whole(at, before) and is_whole(first) and is_whole(count, 1), f"placement of {path}: splice {splice}"
        )
        require(is_text(role) and role in components, f"placement of {path}: no component {role!r}")
        require(
            first + count <= len(components[role]), f"placement of {path}: {role} has no tensor {first + count - 1}"
        )
        splices.append((at, role, first, count))
        before = at
    return blob, whole, splices
