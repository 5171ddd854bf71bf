"""`registry similarity`: which adapters will interfere when they are merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import YELLOW, emit_json, emit_lines, escaped, message, waiting, width
from registry.cli.table import Column, table_lines

if TYPE_CHECKING:
    from registry.operations.merging.similarity import PairSimilarity


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
    subspaces they share in which they change outputs and look at inputs, 1 being all. CONFLICT is the share of the
    elements whose signs differ (half of them in unrelated updates), and behind it the same counted by magnitude.
    """
    with opened(options) as registry, waiting("comparing"):
        found = registry.similarity(list(refs), where=where)
    if options.json:
        emit_json({"adapters": list(found.adapters), "pairs": [one.to_json() for one in found.pairs]})
        return
    header = [Column("A", least=14), Column("B", least=14), *_NUMBERS, Column("SHARED", right=True)]
    rows = [
        [
            escaped(one.a),
            escaped(one.b),
            *_numbers(one.overall),
            f"{len(one.modules)}/{len(one.modules) + sum(one.alone)}",
        ]
        for one in found.pairs
    ]
    emit_lines(table_lines(header, rows, width()))
    if modules:
        for pair in found.pairs:
            emit_lines(_modules(pair))
    for pair in found.pairs:
        if not pair.modules and not pair.left_out:
            message(f"note: {pair.a} and {pair.b} change no module together, so a sum keeps both", YELLOW)
        for path, why in list(pair.left_out.items())[:3]:
            message(f"note: {path} of {pair.a} and {pair.b} was not compared: {why}", YELLOW)
        if any(one.sampled for one in pair.modules):
            message(
                f"note: signs of {pair.a} and {pair.b} were compared in evenly spaced rows of large modules", YELLOW
            )


_NUMBERS = [
    Column("COSINE", right=True),
    Column("WRITES", right=True),
    Column("READS", right=True),
    Column("CONFLICT", right=True),
    Column("BY SIZE", right=True),
]


def _modules(pair: PairSimilarity) -> Iterator[str]:
    ordered = sorted(pair.modules, key=lambda one: (2.0 if one.cosine is None else one.cosine, one.path))
    yield ""
    yield f"{pair.a} and {pair.b}"
    rows = [[escaped(one.path), *_numbers(one)] for one in ordered]
    yield from table_lines([Column("MODULE", least=24), *_NUMBERS], rows, width())


def _numbers(one: object) -> list[str]:
    values = (getattr(one, name) for name in ("cosine", "writes", "reads", "conflict", "weighted_conflict"))
    return ["-" if value is None else f"{value:.3f}" for value in values]
