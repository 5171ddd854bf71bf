"""The tables of docs/cheetah.md, made from the numbers of a study; the page keeps its own words around them.

python -m examples.cheetah.report                       writes the tables into docs/cheetah.md
python -m examples.cheetah.report --results FILE --print
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy

from examples.cheetah.intervals import seed_interval

RESULTS = Path("docs/cheetah/results.json")
PAGE = Path("docs/cheetah.md")
ORIGINAL = "original"  # as worlds.py has it, which needs MuJoCo
NAMES = {"expert": "expert", "base": "base", "lora": "base + LoRA", "full": "full fine-tuning"}


class Results:
    """The numbers of a study; see `examples.cheetah.study`."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        self.records: list[dict[str, Any]] = found["records"]

    @property
    def worlds(self) -> list[str]:
        """Those with at most one change."""
        return [one["world"] for one in self.records if one["what"] == "expert" and "-" not in one["world"]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys(tuple(one["pair"]) for one in self.found["similarity"]))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(one["method"] for one in self.records if one["what"] == "merged"))

    def values(self, measure: str, **wanted: Any) -> list[float]:
        """One for each training seed."""
        return [one[measure] for one in self.records if all(one.get(key) == value for key, value in wanted.items())]

    def cell(self, measure: str, **wanted: Any) -> str:
        """Speeds with half of their interval: over training seeds, the expert's over roll-outs. Of parts of roll-outs,
        where such an interval would go beyond 1, the least and the largest seed."""
        values = self.values(measure, **wanted)
        if measure != "speed":
            return spread(values)
        if wanted.get("what") == "expert":
            return f"{values[0]:.2f} ± {self.values('speed_ci95', **wanted)[0]:.2f}"
        return shown(values)

    def made(self, what: str) -> list[dict[str, Any]]:
        return [one for one in self.found["made"] if one["what"] == what]


def shown(values: Sequence[float], digits: int = 2) -> str:
    """`mean ± half of the 95 % interval over seeds`."""
    if not values:
        return "–"
    mean, half = seed_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def spread(values: Sequence[float]) -> str:
    """`mean (least to largest)`."""
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{fmean(values):.2f}" + (f" ({low:.2f} to {high:.2f})" if high > low else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speeds(results: Results) -> str:
    """Speed and success of everything in its own world."""
    whats = [what for what in NAMES if results.made(what) or what == "expert"]
    head = ["world", *(f"{NAMES[what]}, m/s" for what in whats), *(f"{NAMES[what]}, success" for what in whats)]
    rows = []
    for world in results.worlds:
        row = [world]
        for measure in ("speed", "success"):
            for what in whats:
                trained_on = ORIGINAL if what == "base" else world
                row.append(results.cell(measure, what=what, trained_on=trained_on, world=world))
        rows.append(row)
    return table(head, rows)


def at_home(results: Results) -> str:
    """Each adapter in the original world."""
    whats = [what for what in ("lora", "full") if results.made(what)]
    rows = [["base", *(results.cell(m, what="base", world=ORIGINAL) for m in ("speed", "success", "upright"))]]
    for what in whats:
        for world in results.worlds:
            if world != ORIGINAL:
                wanted = {"what": what, "trained_on": world, "world": ORIGINAL}
                cells = [results.cell(measure, **wanted) for measure in ("speed", "success", "upright")]
                rows.append([f"{world}, {NAMES[what]}", *cells])
    return table(["in the original world", "m/s", "success", "on its feet"], rows)


def costs(results: Results) -> str:
    rows = []
    for what, name in NAMES.items():
        made = results.made(what)
        if made:
            rows.append(
                [
                    name,
                    f"{made[0]['parameters']:,}",
                    f"{fmean(one['bytes'] for one in made) / 1000:,.0f}",
                    f"{fmean(one['bytes_new'] for one in made) / 1000:,.0f}",
                    f"{fmean(one['seconds'] for one in made):.0f}",
                ]
            )
    head = ["", "trained parameters", "kB of the version", "kB added to the registry", "processor seconds of training"]
    return table(head, rows)


def merging(results: Results) -> str:
    """For each pair: the parents' likeness, and speeds in three worlds."""
    found = []
    for pair in results.pairs:
        name = "-".join(pair)
        worlds = [*pair, name]
        alike = [one for one in results.found["similarity"] if tuple(one["pair"]) == pair]
        rows = [["expert of the world", *(results.cell("speed", what="expert", world=world) for world in worlds)]]
        rows.append(["base", *(results.cell("speed", what="base", world=world) for world in worlds)])
        for parent in pair:
            cells = [results.cell("speed", what="lora", trained_on=parent, world=world) for world in worlds]
            rows.append([f"adapter of {parent}", *cells])
        cells = [results.cell("speed", what="both", trained_on=name, world=world) for world in worlds]
        rows.append(["trained on both", *cells])
        for method in results.methods:
            wanted = {"what": "merged", "method": method, "trained_on": name}
            rows.append([f"merged, {method}", *(results.cell("speed", **wanted, world=world) for world in worlds)])
        cosine, conflict = (shown([one[key] for one in alike]) for key in ("cosine", "conflict"))
        found.append(f"**{pair[0]} and {pair[1]}**: cosine of the updates {cosine}, sign conflict {conflict}\n")
        found.append(table([f"{name}, m/s", *(f"in {world}" for world in worlds)], rows) + "\n")
    return "\n".join(found)


def gain_kept(results: Results, pair: tuple[str, str], seed: int, method: str) -> float:
    """Of what each parent gains over the base in its own world, the part that a merged adapter still has there: the
    mean of both. 0 is the base, 1 the parents, below 0 it is worse than the base."""
    parts = []
    for parent in pair:
        [own] = results.values("speed", what="lora", trained_on=parent, world=parent, seed=seed)
        [base] = results.values("speed", what="base", world=parent, seed=seed)
        wanted = {"what": "merged", "method": method, "trained_on": "-".join(pair), "world": parent, "seed": seed}
        [merged] = results.values("speed", **wanted)
        parts.append((merged - base) / (own - base))
    return fmean(parts)


def prediction(results: Results) -> str:
    """Whether the parents' likeness says how much a merge keeps: rank correlations over the pairs, each the mean of its
    seeds; and how far the seeds differ, each with correlations of its own."""
    points = results.found["similarity"]
    seeds = results.found["form"]["seeds"]
    rows = []
    for method in results.methods:
        keeps = {
            (tuple(one["pair"]), one["seed"]): gain_kept(results, tuple(one["pair"]), one["seed"], method)
            for one in points
        }
        means = [fmean(keeps[pair, seed] for seed in seeds) for pair in results.pairs]
        row = [method, shown([fmean(keeps[pair, seed] for pair in results.pairs) for seed in seeds])]
        for key in ("cosine", "conflict"):
            alike = {(tuple(one["pair"]), one["seed"]): one[key] for one in points}
            if len(results.pairs) < 3:
                row.append("–")
                continue
            overall = rank_correlation([fmean(alike[pair, seed] for seed in seeds) for pair in results.pairs], means)
            each = [
                rank_correlation(
                    [alike[pair, seed] for pair in results.pairs], [keeps[pair, seed] for pair in results.pairs]
                )
                for seed in seeds
            ]
            row.append(f"{overall:+.2f} ({min(each):+.2f} to {max(each):+.2f})")
        rows.append(row)
    head = ["method", "part of the parents' gain kept", "Spearman with the cosine", "with the sign conflict"]
    counted = (
        f"{len(results.pairs)} pairs, each the mean of {len(seeds)} training seeds; in parentheses the least and the "
        "largest correlation of one seed alone."
    )
    return f"{table(head, rows)}\n\n{counted}"


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, of which equal values share the mean."""
    return float(numpy.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: Sequence[float]) -> list[float]:
    return [fmean(at for at, one in enumerate(sorted(values)) if one == value) for value in values]


TABLES: dict[str, Callable[[Results], str]] = {
    "speeds": speeds,
    "at-home": at_home,
    "costs": costs,
    "merging": merging,
    "prediction": prediction,
}


def fill(page: str, results: Results) -> str:
    """A page with each table in its place, `<!-- table: name -->` to `<!-- end -->`."""
    for name, made in TABLES.items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = made(results)
        page, count = place.subn(lambda match, text=text: f"{match[1]}\n{text}\n\n{match[2]}", page)
        if count != 1:
            raise SystemExit(f"the page has {count} places for the table {name}; expected one")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--print", action="store_true", help="print the tables instead")
    given = parser.parse_args()
    try:
        results = Results(json.loads(given.results.read_text(encoding="utf-8")))
        tables = [made(results) for made in TABLES.values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(
            f"{given.results} holds no results of a study ({type(error).__name__}: {error}); make study makes them"
        )
    if given.print:
        print("\n\n".join(tables))
        return
    given.page.write_text(fill(given.page.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"wrote the tables of {given.page}")


if __name__ == "__main__":
    main()
