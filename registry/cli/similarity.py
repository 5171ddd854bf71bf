"""`registry similarity`: which adapters will interfere when they are merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import YELLOW, emit_json, emit_lines, escaped, message, waiting, width
from registry.cli.table import Column, fold, natural_width, table_lines

if TYPE_CHECKING:
    from registry.merge.similarity import ModuleSimilarity
    from registry.operations.merging.similarity import PairSimilarity, Similarity


@click.command(
    name="similarity",
    cls=Command,
    short_help="Compare what adapters add, before they are merged.",
    examples=[
        "registry similarity walk/perturb@1 walk/perturb@2 --modules",
        "registry similarity --where 'base = walk/base'",
    ],
)
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option("--where", metavar="EXPR", multiple=True, help="Adapters by query, as of 'registry list'.")
@click.option("--modules", is_flag=True, help="Also every module of each pair, the most opposed first.")
@common_options
@click.pass_obj
def similarity_command(options: Options, refs: tuple[str, ...], where: tuple[str, ...], modules: bool) -> None:
    """Compare the updates of the adapters REF, pair by pair.

    COSINE is that of the updates: near 0 a sum keeps both, near -1 they cancel. WRITES and READS say how much of the
    subspaces they share in which they change outputs and look at inputs, 1 being all; random subspaces of these ranks
    share what is called chance. CONFLICT is the share of the elements whose signs differ (half of them in unrelated
    updates), and behind it the same counted by magnitude.
    """
    with opened(options) as registry, waiting("comparing"):
        found = registry.similarity(list(refs), where=where)
    if options.json:
        emit_json(found.to_json())
        return
    emit_lines(_page(found, width()))
    if modules:
        for pair in found.pairs:
            if pair.modules:
                emit_lines(_modules(pair, width()))
    for note in (*found.notes, *(note for pair in found.pairs for note in _notes(pair))):
        message(f"note: {note}", YELLOW)


def _page(found: Similarity, columns: int | None) -> Iterator[str]:
    """A line for each pair, the cosines of more than two adapters as a matrix where that fits, and what it means."""
    header = [
        Column("A", least=14),
        Column("B", least=14),
        *(Column(name, right=True) for name in ("COSINE", "WRITES", "READS", "CONFLICT", "BY SIZE", "SHARED")),
    ]
    rows = []
    for one in found.pairs:
        whole = one.overall
        numbers = (whole.cosine, whole.writes, whole.reads, whole.conflict, whole.weighted_conflict)
        shared = f"{len(one.modules)}/{len(one.modules) + sum(one.alone)}"
        rows.append([escaped(one.a), escaped(one.b), *map(_number, numbers), shared])
    yield from table_lines(header, rows, columns)
    if len(found.adapters) > 2:
        header, rows = _matrix(found)
        if columns is None or natural_width(header, rows) <= columns:
            yield ""
            yield from table_lines(header, rows, columns)
    yield ""
    for one in found.pairs:
        line = f"{escaped(one.a)} and {escaped(one.b)}: {one.verdict}"
        if one.overall.by_chance is not None:
            writes, reads = map(_number, one.overall.by_chance)
            line += f"; random subspaces would share {writes} in writes, {reads} in reads"
        yield from [line] if columns is None else fold(line, columns)


def _matrix(found: Similarity) -> tuple[list[Column], list[list[str]]]:
    """Cosines of all pairs, the adapters numbered."""
    places = {reference: place for place, reference in enumerate(found.adapters)}
    cells = [[""] * len(places) for _ in places]
    for pair in found.pairs:
        one, other = places[pair.a], places[pair.b]
        cells[one][other] = cells[other][one] = _number(pair.overall.cosine)
    header = [Column("COSINE"), *(Column(str(place + 1), right=True) for place in range(len(places)))]
    return header, [[f"{place + 1} {escaped(one)}", *cells[place]] for one, place in places.items()]


def _modules(pair: PairSimilarity, columns: int | None) -> Iterator[str]:
    def order(one: ModuleSimilarity) -> tuple[float, float, str]:
        return (2.0 if one.cosine is None else one.cosine, -(one.conflict or 0.0), one.path)

    names = ("COSINE", "WRITES", "CHANCE", "READS", "CHANCE", "CONFLICT", "BY SIZE")
    rows = []
    for one in sorted(pair.modules, key=order):
        by_chance = one.by_chance
        numbers = (one.cosine, one.writes, by_chance[0], one.reads, by_chance[1], one.conflict, one.weighted_conflict)
        rows.append([escaped(one.path), *map(_number, numbers)])
    yield ""
    yield f"{escaped(pair.a)} and {escaped(pair.b)}"
    yield from table_lines([Column("MODULE", least=18), *(Column(name, right=True) for name in names)], rows, columns)


def _notes(pair: PairSimilarity) -> Iterator[str]:
    """What was not compared, a line for each reason, and in how many elements signs were."""
    whole, both = pair.overall, f"{pair.a} and {pair.b}"
    reasons: dict[str, list[str]] = {}
    for path, why in pair.left_out.items():
        reasons.setdefault(why, []).append(path)
    for why, paths in reasons.items():
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        was = "was" if len(paths) == 1 else "were"
        yield f"{', '.join(paths[:3])}{more} of {both} {was} not compared: {why}"
    if whole.elements < whole.of_elements:
        share = whole.elements / whole.of_elements
        yield f"signs of {both} were compared in {share:.1%} of the elements: evenly spaced rows of large modules"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
