"""`registry fits`: every adapter that fits a base or a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from registry.cli.models import build_model, model_options
from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import emit_json, emit_lines, escaped, human_number, message, waiting, width
from registry.cli.table import Column, table_lines

if TYPE_CHECKING:
    from registry.registry import Fit

LIMIT = 100


@click.command(
    name="fits",
    cls=Command,
    short_help="List the adapters that fit a base or a model.",
    examples=["registry fits walk/base --where 'r <= 16 and tag = prod'", "registry fits walk/base --all"],
)
@click.argument("ref", required=False)
@model_options
@click.option("--where", metavar="EXPR", multiple=True, help="As of 'registry list'. Repeat for more.")
@click.option("--all", "everything", is_flag=True, help="Also those that do not fit, with the first reason why.")
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), default=LIMIT, show_default=True, help="At most so many."
)
@common_options
@click.pass_obj
def fits_command(
    options: Options,
    ref: str | None,
    model: str | None,
    kwargs: str | None,
    where: tuple[str, ...],
    everything: bool,
    limit: int,
) -> None:
    """List every adapter that fits the base version REF, or the class that --model names.

    Targets are compared with the modules of the model, once for each form of adapter, however many there are; weights
    by digest. 'registry check' says more of one.
    """
    built: Any = build_model(model, kwargs, ref)
    asked: Any = ref if built is None else built
    if asked is None:
        raise click.UsageError("give a base, or --model MODULE:CLASS")
    with opened(options) as registry, waiting("looking for adapters that fit"):
        found = registry.fits(asked, *where, everything=everything, limit=limit)
    if options.json:
        from registry.cli.documents import fit_document

        emit_json([fit_document(one) for one in found])
        return
    if not found:
        message("no adapter fits" + ("" if everything else "; --all shows why not"))
        return
    header = [
        Column("NAME", least=14),
        Column("VER", right=True),
        Column("TAGS", least=6),
        Column("R", right=True),
        Column("TARGETS", right=True),
        Column("FITS"),
    ]
    if everything or any(one.reason for one in found):
        header.append(Column("WHY", least=24))
    emit_lines(table_lines(header, [_row(one)[: len(header)] for one in found], width()))
    if len(found) == limit:
        message(f"the first {limit} are shown; --limit shows more")


def _row(fit: Fit) -> list[str]:
    version = fit.version
    return [
        version.name,
        str(version.version),
        ", ".join(version.tags) or "-",
        human_number(version.r),
        f"{fit.matched}/{fit.total}",
        {"fits": "yes", "does not fit": "no", "undecided": "?"}[fit.verdict],
        escaped(fit.reason),
    ]
