"""The charts of docs/cheetah.md, bars and curves by matplotlib, and the file of results that they are made from, which
is checked first. The same thing has the same colour in all of them, and in film.py."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from examples.cheetah.intervals import NORMAL, seed_interval
from examples.cheetah.report import Results, gain_kept
from registry.core.errors import InvalidInput

LIMIT = 1_000_000  # bytes of a picture
WORLDS = ("original", "gear", "mass", "slope", "gravity")  # of `speeds`; not imported from worlds, which needs mujoco

# Okabe and Ito's colours, which the colour-blind tell apart too.
COLOURS = {"expert": "#555555", "base": "#E69F00", "lora": "#0072B2", "full": "#009E73"}
NAMES = {"expert": "expert", "base": "base", "lora": "base + LoRA", "full": "full fine-tuning"}
FIRST, SECOND, BOTH = "#CC79A7", "#D55E00", "#000000"  # of a pair: two worlds, and that with both changes
INK = "#222222"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
DASHED = (0, (5, 2))  # what a curve is compared with
DPI = 200  # of 8 inches: sharp where a page shows them 800 pixels wide


class ResultsError(InvalidInput):
    """A file of results that is not what a picture needs."""


# ---------------------------------------------------------------- results

KEYS: Mapping[str, tuple[str, ...]] = {
    "records": ("what", "trained_on", "world", "seed", "speed"),
    "curves": ("what", "world", "seed", "step", "speed"),
    "switching": ("world", "adapter", "control_seconds", "loaded_at", "unloaded_at", "speed"),
    "similarity": ("pair", "seed", "cosine"),
}

NEEDED: Mapping[str, tuple[str, ...]] = {
    "speeds": ("records",),
    "learning": ("records", "curves"),
    "switching": ("switching",),
    "merging": ("records", "similarity"),
}
"""Parts of the results that a chart is made of; a reduced study has not all of them."""


def read_results(path: Path, charts: Iterable[str] = NEEDED) -> dict[str, Any]:
    """The results of a file: an object with the lists `records`, `curves` and `similarity` of objects, and the object
    `switching`; KEYS has what is in each, and a merged record has its `method` too. Speeds are in m/s; `seed` is that
    of training, null for an expert; a pair is `gear-mass` in `trained_on` and `["gear", "mass"]` in `pair`; `loaded_at`
    and `unloaded_at` are control steps, and the speed of `switching` is a list of them for each roll-out.

    Raises:
        ResultsError: it cannot be read, or misses a key that these charts need.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read as results: {error}") from error
    try:
        return check_results(results, charts)
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from error


def check_results(results: Any, charts: Iterable[str] = NEEDED) -> dict[str, Any]:
    """The same.

    Raises:
        ResultsError: a key is missing; says where.
    """
    if not isinstance(results, dict):
        raise ResultsError(f"expected an object with {', '.join(KEYS)}, found a {type(results).__name__}")
    needed_parts = {part for chart in charts for part in NEEDED[chart]}
    for part, keys in KEYS.items():
        if part not in needed_parts:
            continue
        if part not in results:
            raise ResultsError(f"{part} is missing")
        single = part == "switching"
        entries = [results[part]] if single else results[part]
        for place, entry in enumerate(entries):
            where = part if single else f"{part}[{place}]"
            if not isinstance(entry, dict):
                raise ResultsError(f"{where}: expected an object, found a {type(entry).__name__}")
            needed = (*keys, "method") if entry.get("what") == "merged" and part == "records" else keys
            for key in needed:
                if key not in entry:
                    raise ResultsError(f"{where}: {key} is missing")
                if key in ("speed", "cosine") and not single and not isinstance(entry[key], int | float):
                    raise ResultsError(f"{where}: {key} is {entry[key]!r}; expected a number")
    return results


def speeds(results: Mapping[str, Any], what: str, world: str, trained_on: str | None = None, method: str = "") -> Any:
    """Speed in a world, m/s, by training seed."""
    return {
        record["seed"]: float(record["speed"])
        for record in results["records"]
        if (record["what"], record["world"]) == (what, world)
        and trained_on in (None, record["trained_on"])
        and method in ("", record.get("method"))
    }


def expert_speed(results: Mapping[str, Any], world: str) -> float:
    found = speeds(results, "expert", world)
    if not found:
        raise ResultsError(f"records: no expert of the world {world}")
    return seed_interval(list(found.values()))[0]


# ---------------------------------------------------------------- charts


def chart(draw: Callable[[Mapping[str, Any]], Figure]) -> Callable[[Mapping[str, Any]], Figure]:
    """In our style, whatever matplotlib's configuration is."""

    @functools.wraps(draw)
    def styled(results: Mapping[str, Any]) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(results)

    return styled


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(8, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no display is asked for
    return figure


@chart
def speeds_figure(results: Mapping[str, Any]) -> Figure:
    """Bars of the mean speed in each world."""
    figure = _figure(4)
    axes = figure.subplots()
    width = 0.2
    for place, world in enumerate(WORLDS):
        bars = {
            what: found
            for what in NAMES
            if (found := speeds(results, what, world, world if what in ("lora", "full") else None))
        }
        for number, (what, found) in enumerate(bars.items()):
            mean, half = seed_interval(list(found.values()))
            x = place + width * (number - (len(bars) - 1) / 2)
            axes.bar(x, mean, 0.92 * width, color=COLOURS[what], label=NAMES[what])
            if math.isfinite(half):
                axes.errorbar(x, mean, half, color=INK, linewidth=1, capsize=2.5)
    if not axes.containers:
        raise ResultsError("records: none of the worlds " + ", ".join(WORLDS))
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(WORLDS)), WORLDS)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("world")
    axes.set_ylabel("mean speed (m/s)")
    _legend_above(figure, axes)
    return figure


@chart
def learning_figure(results: Mapping[str, Any]) -> Figure:
    """Speed against training steps, a panel for each changed world."""
    worlds = list(dict.fromkeys(curve["world"] for curve in results["curves"]))
    if not worlds:
        raise ResultsError("curves: there are none")
    columns = min(len(worlds), 2)
    rows = math.ceil(len(worlds) / columns)
    figure = _figure(0.6 + (3.6 if columns == 1 else 2.7) * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, world in zip(panels, worlds, strict=False):
        for what in ("expert", "base"):
            if found := speeds(results, what, world):
                level = seed_interval(list(found.values()))[0]
                axes.axhline(level, color=COLOURS[what], linewidth=1.5, linestyle=DASHED, label=NAMES[what])
        for what in ("lora", "full"):
            steps, means, halves = _curve(results["curves"], what, world)
            if steps:
                axes.plot(steps, means, color=COLOURS[what], label=NAMES[what])
                if numpy.isfinite(halves).all():
                    low, high = numpy.subtract(means, halves), numpy.add(means, halves)
                    axes.fill_between(steps, low, high, color=COLOURS[what], alpha=0.2, linewidth=0)
        axes.set_title(f"world {world}")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.margins(x=0.02)
    for axes in panels[len(worlds) :]:
        axes.set_visible(False)
    figure.supxlabel("training step", fontsize=11)
    figure.supylabel("mean speed (m/s)", fontsize=11)
    _legend_above(figure, *panels)
    return figure


def _curve(curves: Iterable[Mapping[str, Any]], what: str, world: str) -> tuple[list[int], list[float], list[float]]:
    """Steps that all seeds have, with mean and half interval: of the others a mean would jump with the seeds in it."""
    found: dict[int, dict[Any, float]] = {}
    for curve in curves:
        if (curve["what"], curve["world"]) == (what, world):
            found.setdefault(curve["step"], {})[curve["seed"]] = float(curve["speed"])
    seeds = max(map(len, found.values()), default=0)
    steps = sorted(step for step, values in found.items() if len(values) == seeds)
    intervals = [seed_interval(list(found[step].values())) for step in steps]
    return steps, [mean for mean, _ in intervals], [half for _, half in intervals]


@chart
def switching_figure(results: Mapping[str, Any]) -> Figure:
    """Forward speed while an adapter is loaded and taken off; the line has the colour of what acts."""
    switching = results["switching"]
    try:
        speed = numpy.asarray(switching["speed"], dtype=numpy.float64)
    except ValueError as error:
        raise ResultsError(f"switching: the roll-outs in speed are not of one length: {error}") from error
    if speed.ndim != 2 or not speed.size:
        raise ResultsError("switching: speed has no roll-outs")
    seconds = numpy.arange(speed.shape[1]) * switching["control_seconds"]
    mean = speed.mean(axis=0)
    half = NORMAL * speed.std(axis=0, ddof=1) / math.sqrt(len(speed)) if len(speed) > 1 else None
    figure = _figure(3.6)
    axes = figure.subplots()
    moments = (switching["loaded_at"], switching["unloaded_at"])
    ends = (0, *moments, len(mean) - 1)
    for what, (begin, end) in zip(("base", "lora", "base"), itertools.pairwise(ends), strict=True):
        part = slice(begin, end + 1)
        axes.plot(seconds[part], mean[part], color=COLOURS[what], label=NAMES[what])
        if half is not None:
            low, high = (mean - half)[part], (mean + half)[part]
            axes.fill_between(seconds[part], low, high, color=COLOURS[what], alpha=0.25, linewidth=0)
    name = str(switching["adapter"]).rpartition("/")[2]
    for moment, label in zip(moments, (f"{name} loaded", "taken off"), strict=True):
        at = moment * switching["control_seconds"]
        axes.axvline(at, color=INK, linewidth=1)
        axes.annotate(label, (at, 1), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points", va="top")
    axes.set_ylim(min(0, axes.get_ylim()[0]), 1.12 * axes.get_ylim()[1])  # room for the labels
    axes.margins(x=0)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("forward speed (m/s)")
    axes.set_title(f"world {switching['world']}")
    _legend_above(figure, axes)
    return figure


@chart
def merging_figure(results: Mapping[str, Any]) -> Figure:
    """What each way to merge keeps, for each pair, and whether the parents' similarity foretells it."""
    merged = [record for record in results["records"] if record["what"] == "merged"]
    if not merged:
        raise ResultsError("records: none is merged")
    pairs = list(dict.fromkeys(record["trained_on"] for record in merged))
    methods = list(dict.fromkeys(record["method"] for record in merged))
    columns = min(len(pairs), 3)
    rows = math.ceil(len(pairs) / columns)
    high = 0.75 + 0.27 * (len(methods) + 1)
    figure = _figure(0.7 + high * rows + 3.2)
    upper, lower = figure.subfigures(2, 1, height_ratios=(0.6 + high * rows, 3.2))
    panels = upper.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, pair in zip(panels, pairs, strict=False):
        _pair_panel(axes, results, pair, methods)
    for axes in panels[len(pairs) :]:
        axes.set_visible(False)
    upper.supxlabel("speed, of the expert’s in that world", fontsize=11)
    _legend_above(upper, *panels)
    _similarity_panel(lower.subplots(), results, pairs, methods)
    return figure


def _pair_panel(axes: Any, results: Mapping[str, Any], pair: str, methods: Sequence[str]) -> None:
    first, second = _parents(pair)
    worlds = (
        (first, FIRST, "<", "first world"),
        (second, SECOND, ">", "second world"),
        (pair, BOTH, "o", "world with both changes"),
    )
    axes.axvline(1, color=COLOURS["expert"], linewidth=1.5, linestyle=DASHED, zorder=0, label=NAMES["expert"])
    ways = [("merged", method, method) for method in methods]
    if any(record["what"] == "both" for record in results["records"]):
        ways.append(("both", "", "one LoRA for both"))
    for row, (what, method, _) in enumerate(ways):
        for number, (world, colour, marker, label) in enumerate(worlds):
            if not (found := speeds(results, what, world, pair, method)):
                continue
            expert = expert_speed(results, world)
            mean, half = seed_interval([speed / expert for speed in found.values()])
            y = row + 0.22 * (number - 1)
            axes.plot(mean, y, marker, color=colour, markersize=5, linestyle="none", label=label)
            if math.isfinite(half):
                axes.plot((mean - half, mean + half), (y, y), color=colour, linewidth=1)
    axes.set_yticks(range(len(ways)), [name for _, _, name in ways])
    axes.set_ylim(len(ways) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title(f"{first} + {second}")


def _similarity_panel(axes: Any, results: Mapping[str, Any], pairs: Sequence[str], methods: Sequence[str]) -> None:
    cosines: dict[str, list[float]] = {}
    for entry in results["similarity"]:
        cosines.setdefault("-".join(entry["pair"]), []).append(float(entry["cosine"]))
    places = {}
    for pair in pairs:
        if pair not in cosines:
            raise ResultsError(f"similarity: none of the pair {pair}")
        places[pair] = seed_interval(cosines[pair])[0]
    shades = [str(shade) for shade in numpy.linspace(0, 0.6, len(methods))]
    for method, marker, shade in zip(methods, itertools.cycle("osD^vPX*"), shades, strict=False):
        lost = {pair: loss for pair in pairs if (loss := gain_lost(results, pair, method)) is not None}
        xs = [places[pair] for pair in lost]
        axes.plot(xs, list(lost.values()), marker, color=shade, markersize=6, linestyle="none", label=method)
    axes.axhline(0, color=INK, linewidth=0.8, zorder=0)
    axes.margins(x=0.08)
    low, high = axes.get_xlim()
    above = axes.get_xaxis_transform()  # x as the data, y as a part of the axes' height
    for pair, spot in spread(places, 0.04 * (high - low)).items():
        axes.annotate(
            pair.replace("-", " + "),
            (spot, 1.04),
            xycoords=above,
            rotation=35,
            rotation_mode="anchor",
            fontsize=9,
        )
        line = ((places[pair], places[pair], spot), (0, 1, 1.03))
        axes.plot(*line, color="#CCCCCC", linewidth=0.8, zorder=0, transform=above, clip_on=False)
    axes.set_xlim(low, high)
    axes.set_xlabel("cosine of the two parents’ updates")
    axes.set_ylabel("gain lost by merging")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)


def gain_lost(results: Mapping[str, Any], pair: str, method: str) -> float | None:
    """1 - the part of the parents' gain over the base that is left, see `report.gain_kept`: the mean over the seeds
    that have all of it; None where there are none."""
    parents = _parents(pair)
    needed = [speeds(results, "merged", world, pair, method) for world in parents]
    needed += [speeds(results, "lora", world, world) for world in parents]
    needed += [speeds(results, "base", world) for world in parents]
    seeds = set.intersection(*map(set, needed))
    losses = [1 - gain_kept(Results(results), parents, seed, method) for seed in seeds]
    return seed_interval(losses)[0] if losses else None


def _parents(pair: str) -> tuple[str, str]:
    first, found, second = pair.partition("-")
    if not found:
        raise ResultsError(f"records: {pair!r} is no pair of worlds; expected two with - between them")
    return first, second


def spread(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """Places in their order, at least `gap` from each other, around where they were."""
    names = sorted(places, key=lambda name: places[name])
    spots: list[float] = []
    for name in names:
        spots.append(places[name] if not spots else max(places[name], spots[-1] + gap))
    shift = sum(places[name] - spot for name, spot in zip(names, spots, strict=True)) / max(len(names), 1)
    return {name: spot + shift for name, spot in zip(names, spots, strict=True)}


def _legend_above(figure: Any, *panels: Any) -> None:
    """One for all panels, each name once."""
    known = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    order = sorted(known, key=lambda name: name not in NAMES.values())
    figure.legend([known[name] for name in order], order, loc="outside upper center", ncols=4, handlelength=1.4)


CHARTS = {
    "speeds": speeds_figure,
    "learning": learning_figure,
    "switching": switching_figure,
    "merging": merging_figure,
}
