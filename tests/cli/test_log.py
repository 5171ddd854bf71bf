from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from registry import Registry
from registry.catalog.lineage import Edge
from registry.cli.documents import lineage_document
from registry.cli.log import lineage_text
from registry.operations.inspect import Lineage
from tests.cli.artifacts import write_base
from tests.cli.conftest import Run


def lineage(root: int, up: Sequence[tuple[int, int]], down: Sequence[tuple[int, int]] = ()) -> Lineage:
    """Of (child, parent) pairs; version 7 is `walk/v@7`."""
    edges = [[Edge(child, parent, "continued_from", None) for child, parent in pairs] for pairs in (up, down)]
    ids = {root, *(number for pair in (*up, *down) for number in pair)}
    return Lineage(root, tuple(edges[0]), tuple(edges[1]), {number: f"walk/v@{number}" for number in ids})


def test_lineage_is_drawn_both_ways(run: Run, here: Path) -> None:
    ran = run("log", "walk/perturb:prod")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "walk/perturb@2 came from",
        "├── walk/base@1  (trained_on)",
        "└── walk/perturb@1  (continued_from)",
        "    └── walk/base@1  (trained_on)",
        "",
        "walk/perturb@2 led to",
        "└── walk/perturb@3  (continued_from it)",
    ]


def test_json_of_a_log_has_the_edges(run: Run, here: Path) -> None:
    document = run("log", "walk/perturb:prod", "--json").json
    assert document["reference"] == "walk/perturb@2"
    assert document["descendants"] == [
        {"child": "walk/perturb@3", "parent": "walk/perturb@2", "relation": "continued_from", "weight": None}
    ]
    assert {(edge["child"], edge["relation"], edge["parent"]) for edge in document["ancestors"]} == {
        ("walk/perturb@2", "trained_on", "walk/base@1"),
        ("walk/perturb@2", "continued_from", "walk/perturb@1"),
        ("walk/perturb@1", "trained_on", "walk/base@1"),
    }


def test_a_version_alone_says_that_it_is(run: Run, here: Path, artifacts: Path) -> None:
    run("push", artifacts / "base.safetensors", "walk/other")
    assert run("log", "walk/other").out.splitlines() == [
        "walk/other@1 came from nothing that is recorded",
        "",
        "walk/other@1 led to nothing yet",
    ]


def test_weights_of_a_merge_are_told(run: Run, here: Path, artifacts: Path) -> None:
    with Registry.open() as registry:
        parents = [("merged_from", "walk/perturb@1", 0.7), ("merged_from", "walk/perturb@2", 0.3)]
        registry.push(artifacts / "nan", "walk/both", parents=parents)
    assert "├── walk/perturb@1  (merged_from, weight 0.7)" in run("log", "walk/both").out
    assert "walk/both@1  (merged_from it, weight 0.7)" in run("log", "walk/perturb@1").out
    weights = [edge["weight"] for edge in run("log", "walk/both", "--json").json["ancestors"] if edge["weight"]]
    assert sorted(weights) == [0.3, 0.7]


def test_a_diamond_is_drawn_once() -> None:
    # 5 from 4 and 3, both from 2, which is from 1.
    text = lineage_text(lineage(5, [(5, 4), (5, 3), (4, 2), (3, 2), (2, 1)]))
    assert text.splitlines()[:6] == [
        "walk/v@5 came from",
        "├── walk/v@4  (continued_from)",
        "│   └── walk/v@2  (continued_from)",
        "│       └── walk/v@1  (continued_from)",
        "└── walk/v@3  (continued_from)",
        "    └── walk/v@2  (continued_from), see above",
    ]


def test_many_diamonds_do_not_multiply() -> None:
    # 40 diamonds below each other have 2 to the 40 paths.
    pairs = [
        pair
        for top in range(121, 1, -3)
        for pair in ((top, top - 1), (top, top - 2), (top - 1, top - 3), (top - 2, top - 3))
    ]
    lines = lineage_text(lineage(121, pairs)).splitlines()
    assert len(lines) < 2 * len(pairs)
    assert {f"walk/v@{number}" for number in range(1, 122)} <= {word for line in lines for word in line.split()}


@pytest.mark.parametrize("columns", [None, "80"])
def test_a_chain_of_1000_versions_is_drawn_whole(columns: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    chain = [(number, number - 1) for number in range(1000, 1, -1)]
    lines = lineage_text(lineage(1000, chain)).splitlines()
    words = [word for line in lines for word in line.split() if word.startswith("walk/v@")]
    assert words[:3] == ["walk/v@1000", "walk/v@999", "walk/v@998"]
    assert {f"walk/v@{number}" for number in range(1, 1001)} == set(words)
    assert max(map(len, lines)) <= 80
    assert "walk/v@990 came from" in lines
    assert (
        sum(line.endswith("(continued_from), see below") for line in lines)
        == sum("came from" in line for line in lines) - 1
    )


def test_a_chain_of_1000_is_a_document_too() -> None:
    chain = [(number, number - 1) for number in range(1000, 1, -1)]
    assert len(lineage_document(lineage(500, chain, chain))["descendants"]) == 999


def test_a_long_training_can_be_read_back_from_its_last_version(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_URL", str(tmp_path / "registry"))
    with Registry.init(tmp_path / "registry") as registry:
        for number in range(1, 31):
            source = write_base(tmp_path / "base.safetensors", seed=number)
            before = f"walk/base@{number - 1}" if number > 1 else None
            registry.push(source, "walk/base", continued_from=before)
    started = time.monotonic()
    out = run("log", "walk/base").out
    assert time.monotonic() - started < 10
    for number in range(1, 31):
        assert f"walk/base@{number} " in out
