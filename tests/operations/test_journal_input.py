"""What a push, a tag or an annotation is given goes into manifest and journal: what those cannot hold is refused before
anything is stored, and what they can comes back out of the journal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.core.errors import InvalidInput


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def reg(home: Path) -> Iterator[Registry]:
    with Registry.init(home) as made:
        made.push({"a": torch.arange(8.0)}, "walk/base")
        yield made


OTHER = {"a": torch.arange(9.0)}


def stored(home: Path) -> list[str]:
    return sorted(
        str(path.relative_to(home)) for part in ("blobs", "journal", "tmp") for path in (home / part).rglob("*")
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"parents": [("merged_from", "walk/base", "much")]}, "the weight 'much' is no finite number"),
        ({"parents": [("merged_from", "walk/base", float("nan"))]}, "the weight nan is no finite number"),
        ({"parents": [("merged_from", "walk/base", True)]}, "the weight True is no finite number"),
        ({"parents": [("continued_from", "walk/base", 0.5)]}, "only merged_from takes a weight"),
        ({"parents": [("copied_from", "walk/base", None)]}, "relation 'copied_from'"),
        (
            {"parents": [("merged_from", "walk/base", 0.5), ("merged_from", "walk/base@1", 0.3)]},
            "given twice, with the weights 0.5 and 0.3",
        ),
        ({"message": "half \ud800"}, "message: NUL and halves"),
        ({"message": "nul \0"}, "message: NUL and halves"),
        ({"metadata": {"k": "half \ud800"}}, "metadata k: NUL and halves"),
        ({"metrics": {"k": 1}, "step": 2**60}, "step 1152921504606846976"),
        ({"metrics": {"k": 1}, "step": "ten"}, "step 'ten'"),
        ({"metrics": {"k": 1}, "step": -1}, "step -1"),
    ],
)
def test_a_push_of_what_cannot_be_written_stores_nothing(
    reg: Registry, home: Path, options: dict[str, Any], reason: str
) -> None:
    before = stored(home)
    with pytest.raises(InvalidInput) as caught:
        reg.push(OTHER, "walk/child", **options)
    assert reason in str(caught.value)
    assert stored(home) == before
    assert [version.name for version in reg.find()] == ["walk/base"]


def test_a_parent_that_is_said_twice_is_one_edge(reg: Registry) -> None:
    said = [("trained_on", "walk/base@1", None), ("continued_from", "walk/base", None)]
    reg.push(OTHER, "walk/child", base="walk/base", parents=[*said, *said])
    lineage = reg.log("walk/child")
    assert sorted(edge.relation for edge in lineage.ancestors) == ["continued_from", "trained_on"]


def test_trained_on_and_base_are_the_same_version_whichever_way_it_is_said(reg: Registry) -> None:
    first = reg.push(OTHER, "walk/child", base="walk/base")
    again = reg.push(OTHER, "walk/child", base="walk/base", parents=[("trained_on", "walk/base", None)])
    assert (again.digest, again.created) == (first.digest, False)


@pytest.mark.parametrize("why", ["half \ud800", "nul \0", "x" * 10_001, 7])
def test_a_reason_that_cannot_be_written_moves_no_tag(reg: Registry, why: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^reason: "):
        reg.tag("walk/base", "prod", why=why)
    assert reg.get("walk/base").tags == ()


def test_an_actor_of_bytes_that_are_no_text_can_act(reg: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_ACTOR", "ad\udce4")
    reg.push(OTHER, "walk/child")
    assert reg.get("walk/child").created_by == "ad?"


def test_numbers_beyond_the_integers_of_json_come_back_from_the_events(reg: Registry, home: Path) -> None:
    reg.annotate("walk/base", metadata={"seed": 2**60, "size": 1e16}, metrics={"big": 1e20, "neg": -1e18})
    for event in reg.events("walk/base"):
        document = (home / "journal" / "walk" / "base" / f"{event.seq}.json").read_bytes()
        assert event.document(reg.id) == document
    values = {**reg.get("walk/base").metadata, **reg.get("walk/base").metrics}
    assert values == {"seed": 2.0**60, "size": 1e16, "big": 1e20, "neg": -1e18}


def test_the_event_of_a_push_names_base_and_parents(reg: Registry, home: Path) -> None:
    reg.push({"a": torch.arange(8.0)}, "team/base")  # the same manifest as walk/base@1
    reg.push(OTHER, "walk/child", base="team/base", continued_from="walk/base@1")
    payload = json.loads((home / "journal" / "walk" / "child" / "1.json").read_bytes())["payload"]
    assert (payload["base"], payload["parents"]) == ("team/base@1", ["walk/base@1"])
