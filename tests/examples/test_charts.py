"""The charts of docs/cheetah.md: what they say is what the results say. The intervals of intervals.py are here too, as
charts and tables have them."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy
import pytest
from matplotlib.colors import same_color

from examples.cheetah import charts
from examples.cheetah.charts import COLOURS, ResultsError
from examples.cheetah.intervals import QUANTILES, seed_interval

CHANGES = ("gear", "mass", "slope", "gravity")
PAIRS = tuple("-".join(pair) for pair in itertools.combinations(CHANGES, 2))


def made_up(seeds: int = 3) -> dict[str, Any]:
    """Results whose means and intervals are known: seed s is 0.1 s faster than the first."""
    records: list[dict[str, Any]] = []

    def add(what: str, trained_on: str, world: str, speed: float, **more: Any) -> None:
        for seed in [None] if what == "expert" else range(seeds):
            faster = speed + 0.1 * (seed or 0)
            records.append(
                {"what": what, "trained_on": trained_on, "world": world, "seed": seed, "speed": faster} | more
            )

    for world in ("original", *CHANGES, *PAIRS):
        add("expert", world, world, 5.0)
        add("base", "original", world, 2.0)
    for world in CHANGES:
        add("lora", world, world, 4.0)
        add("full", world, world, 4.5)
        add("lora", world, "original", 1.0)  # elsewhere than at home: no bar
    for pair in PAIRS:
        for world in (*pair.split("-"), pair):
            add("both", pair, world, 4.0)
            add("merged", pair, world, 3.0, method="svd")
            add("merged", pair, world, 2.0, method="ties")
    return {
        "records": records,
        "curves": [
            {"what": what, "world": "gear", "seed": seed, "step": step, "speed": speed + 0.1 * seed + step / 1000}
            for what, speed in (("lora", 2.0), ("full", 2.5))
            for seed in range(seeds)
            for step in (0, 100, 200)
        ],
        "switching": {
            **{"world": "gear", "adapter": "cheetah/gear:prod", "control_seconds": 0.05},
            **{"loaded_at": 10, "unloaded_at": 20},
            "speed": [[1.0 + row + 3 * (10 <= step < 20) for step in range(30)] for row in range(3)],
        },
        "similarity": [
            {"pair": pair.split("-"), "seed": seed, "cosine": 0.1 * number + 0.01 * seed}
            for number, pair in enumerate(PAIRS)
            for seed in range(seeds)
        ],
    }


def coloured(artists: Any, what: str) -> list[Any]:
    """Those that have a thing's colour."""
    found = []
    for one in artists:
        colour = one.get_facecolor() if hasattr(one, "get_facecolor") else one.get_color()
        colour = numpy.asarray(colour).reshape(-1, 4)[0] if not isinstance(colour, str) else colour
        if same_color(colour if isinstance(colour, str) else (*colour[:3], 1.0), COLOURS[what]):
            found.append(one)
    return found


# ---------------------------------------------------------------- intervals


def test_an_interval_over_seeds_is_students() -> None:
    mean, half = seed_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / math.sqrt(3))
    assert seed_interval([2.0] * 5) == (2.0, 0.0)


def test_one_seed_has_no_interval_and_many_have_the_normals() -> None:
    mean, half = seed_interval([1.5])
    assert mean == 1.5
    assert math.isnan(half)
    values = [float(number % 2) for number in range(40)]
    assert seed_interval(values)[1] == pytest.approx(1.96 * numpy.std(values, ddof=1) / math.sqrt(40))
    assert len(QUANTILES) == 30
    assert list(QUANTILES) == sorted(QUANTILES, reverse=True)


# ---------------------------------------------------------------- charts


def test_bars_are_as_high_as_the_mean_over_seeds_and_an_expert_has_no_interval() -> None:
    axes = charts.speeds_figure(made_up()).axes[0]
    heights = {what: [bar.get_height() for bar in coloured(axes.patches, what)] for what in COLOURS}
    assert heights["expert"] == pytest.approx([5.0] * 5)
    assert heights["base"] == pytest.approx([2.1] * 5)
    assert heights["lora"] == pytest.approx([4.1] * 4)  # of the original world there is no LoRA
    assert heights["full"] == pytest.approx([4.6] * 4)
    bars = [
        one.lines[2][0].get_segments()[0][:, 1] for one in axes.containers if type(one).__name__ == "ErrorbarContainer"
    ]
    assert len(bars) == 5 + 4 + 4
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert bars[0] == pytest.approx([2.1 - half, 2.1 + half], abs=1e-4)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(charts.WORLDS)
    assert axes.get_ylabel() == "mean speed (m/s)"


def test_the_worlds_of_the_bars_are_those_that_there_are() -> None:
    from examples.cheetah import worlds

    assert list(charts.WORLDS) == [worlds.ORIGINAL, *worlds.CHANGES]


def test_learning_has_a_band_around_the_mean_and_levels_of_expert_and_base() -> None:
    axes = charts.learning_figure(made_up()).axes[0]
    for what, at in (("lora", 2.0), ("full", 2.5)):
        (line,) = coloured(axes.lines, what)
        assert list(line.get_xdata()) == [0, 100, 200]
        assert list(line.get_ydata()) == pytest.approx([at + 0.1, at + 0.2, at + 0.3])
        (band,) = coloured(axes.collections, what)
        found = band.get_paths()[0].vertices
        half = 4.3027 * 0.1 / math.sqrt(3)
        assert found[:, 1].min() == pytest.approx(at + 0.1 - half, abs=1e-4)
        assert found[:, 1].max() == pytest.approx(at + 0.3 + half, abs=1e-4)
    assert [line.get_ydata()[0] for line in coloured(axes.lines, "expert")] == [5.0]
    assert [line.get_ydata()[0] for line in coloured(axes.lines, "base")] == pytest.approx([2.1])


def test_a_step_that_not_all_seeds_have_is_left_out() -> None:
    results = made_up()
    del results["curves"][1]  # of seed 0, step 100
    (line,) = coloured(charts.learning_figure(results).axes[0].lines, "lora")
    assert list(line.get_xdata()) == [0, 200]


def test_one_seed_has_no_band_and_no_interval() -> None:
    results = made_up(seeds=1)
    assert not charts.learning_figure(results).axes[0].collections
    bars = charts.speeds_figure(results).axes[0].containers
    assert {type(one).__name__ for one in bars} == {"BarContainer"}
    charts.merging_figure(results)


def test_switching_has_the_colour_of_what_acts_and_lines_at_the_two_moments() -> None:
    axes = charts.switching_figure(made_up()).axes[0]
    (acting,) = coloured(axes.lines, "lora")
    assert acting.get_xdata()[0] == pytest.approx(0.5)
    assert acting.get_xdata()[-1] == pytest.approx(1.0)
    assert list(acting.get_ydata()[:10]) == pytest.approx([5.0] * 10)
    assert [line.get_ydata()[0] for line in coloured(axes.lines, "base")] == pytest.approx([2.0, 2.0])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(2 - 1.96 / math.sqrt(3))
    moments = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert moments == pytest.approx([0.5, 1.0])
    assert [text.get_text() for text in axes.texts] == ["gear:prod loaded", "taken off"]


def test_switching_refuses_roll_outs_of_different_lengths() -> None:
    with pytest.raises(ResultsError, match="not of one length"):
        charts.switching_figure({"switching": {**made_up()["switching"], "speed": [[1.0], [1.0, 2.0]]}})


def test_merging_is_told_of_the_expert_and_of_the_parents() -> None:
    results = made_up()
    figure = charts.merging_figure(results)
    *panels, scatter = figure.axes
    assert [axes.get_title() for axes in panels] == [pair.replace("-", " + ") for pair in PAIRS]
    points = [line for line in panels[0].lines if line.get_marker() == "<"]
    assert [line.get_xdata()[0] for line in points] == pytest.approx([3.1 / 5, 2.1 / 5, 4.1 / 5])
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["svd", "ties", "one LoRA for both"]
    svd = next(line for line in scatter.lines if line.get_label() == "svd")
    assert list(svd.get_xdata()) == pytest.approx([0.1 * number + 0.01 for number in range(6)])
    # Of 2 m/s that each parent gains over the base, the merged adapters keep 1.
    assert list(svd.get_ydata()) == pytest.approx([0.5] * 6)


def test_labels_keep_their_order_and_a_distance() -> None:
    spots = charts.spread({"b": 0.51, "a": 0.5, "c": 2.0}, 0.2)
    assert spots["b"] - spots["a"] == pytest.approx(0.2)
    assert spots["c"] - spots["b"] >= 0.2


def test_matplotlibs_own_state_stays_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    charts.speeds_figure(made_up())
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
