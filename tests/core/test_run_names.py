"""From paths to runs and names."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.reference import parse_artifact
from registry.core.run_names import RunPlace, choose_names, run_place, slug


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("runs/walk/checkpoint-500", RunPlace(("runs", "walk"), 500)),
        ("runs/walk", RunPlace(("runs", "walk"))),
        ("walk/final", RunPlace(("walk",), is_end=True)),
        ("walk/checkpoints/epoch=3-step=500", RunPlace(("walk",), 500, 3)),
        ("walk/lightning_logs/version_0/checkpoints/epoch=1-val_loss=0.12", RunPlace(("walk", "version_0"), None, 1)),
        ("walk_step_30", RunPlace(("walk",), 30)),
        ("Walk-epoch-3", RunPlace(("Walk",), None, 3)),
        ("walk/checkpoint-500/pytorch_model", RunPlace(("walk",), 500)),
        ("walk/global_step200", RunPlace(("walk",), 200)),
        ("walk-7b", RunPlace(("walk-7b",))),
        ("one-step", RunPlace(("one-step",))),
        ("loss=0.5", RunPlace(("loss=0.5",))),
        ("checkpoint-5", RunPlace((), 5)),
    ],
)
def test_a_path_says_run_and_step(path: str, place: RunPlace) -> None:
    assert run_place(path.split("/")) == place


def test_the_order_of_a_run_is_by_number_and_its_end_comes_last() -> None:
    paths = ["w/checkpoint-1000", "w/final", "w/checkpoint-500", "w/epoch-2", "w"]
    ordered = sorted(paths, key=lambda path: run_place(path.split("/")).order)
    assert ordered[:3] == ["w/epoch-2", "w/checkpoint-500", "w/checkpoint-1000"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My Wälk (v2)", "my-walk-v2"),
        ("a..b", "a.b"),
        ("_x_", "x"),
        ("走る", "unnamed-d3e9afc7"),
        ("\uff26\uff35\uff2c\uff2c width", "full-width"),
    ],
)
def test_a_slug_is_spelled_as_a_name_may_be(text: str, expected: str) -> None:
    assert slug(text) == expected


def test_slugs_of_other_scripts_are_told_apart() -> None:
    assert slug("走る v2") != slug("歩く v2")
    assert slug("走る v2").startswith("v2-")


@given(st.text(max_size=300))
def test_every_slug_may_stand_in_a_reference(text: str) -> None:
    parse_artifact(f"{slug(text)}/{slug(text)}")


def test_a_name_is_the_last_part_that_says_something() -> None:
    runs = [("runs", "walk"), ("sweep", "seed_1"), ("walk", "best"), ("x", "2026-03-walk")]
    assert choose_names(runs, default="d") == {
        ("runs", "walk"): "walk",
        ("sweep", "seed_1"): "sweep-seed_1",
        ("walk", "best"): "walk-best",
        ("x", "2026-03-walk"): "2026-03-walk",
    }
    assert choose_names([()], default="d") == {(): "d"}


def test_runs_that_would_share_a_name_are_told_apart_in_any_order() -> None:
    runs = [("a", "walk"), ("b", "walk"), ("walk",), ("c", "Walk"), ("c", "walk")]
    names = {tuple(sorted(choose_names(order, default="d").items())) for order in itertools.permutations(runs)}
    (chosen,) = names
    named = dict(chosen)
    assert (named[("a", "walk")], named[("b", "walk")], named[("walk",)]) == ("a-walk", "b-walk", "walk")
    assert len(set(named.values())) == 5
    assert all(named[run].startswith("c-walk-") for run in (("c", "Walk"), ("c", "walk")))


def test_a_name_that_is_given_stays_and_one_that_is_taken_is_avoided() -> None:
    runs = [("a", "walk"), ("b", "walk"), ("c", "carry"), ("lone",)]
    names = choose_names(runs, default="d", given={("a", "walk"): "walk"}, taken={"carry", "lone"})
    assert (names[("a", "walk")], names[("b", "walk")], names[("c", "carry")]) == ("walk", "b-walk", "c-carry")
    assert names[("lone",)].startswith("lone-")


@given(st.lists(st.lists(st.sampled_from(["a", "A", "b", "model", "seed_1", "ä", ""]), max_size=4).map(tuple)))
def test_names_are_unique(runs: list[tuple[str, ...]]) -> None:
    names = choose_names(runs, default="d")
    assert len(set(names.values())) == len(set(runs))
    for name in names.values():
        parse_artifact(f"n/{name}")
