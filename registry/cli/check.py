"""`registry check`: will an adapter load into a base or a model, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from registry.cli.models import build_model, model_options
from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import BOLD, YELLOW, emit_json, emit_lines, escaped, message, paint, waiting, width
from registry.cli.table import Column, fold, table_lines

if TYPE_CHECKING:
    from registry.core.findings import Finding
    from registry.registry import Compatibility

PURPOSES = ("load", "merge", "hotswap")


@click.command(
    name="check",
    cls=Command,
    short_help="Say whether an adapter fits a base or a model, and why not.",
    examples=[
        "registry check walk/perturb:prod --base walk/base",
        "registry check walk/perturb --peft 0.9 --for merge",
    ],
)
@click.argument("ref")
@click.option("--base", metavar="REF", help="Base version or checkpoint. [default: the one that it was trained on]")
@model_options
@click.option("--peft", metavar="VERSION", help="PEFT that would load it. [default: the installed one]")
@click.option(
    "--for",
    "purpose",
    type=click.Choice(PURPOSES),
    default="load",
    show_default=True,
    help="Load beside the weights, merge into them, or swap into a compiled slot.",
)
@click.option("--strict", is_flag=True, help="What cannot be decided is a no.")
@common_options
@click.pass_context
def check_command(
    ctx: click.Context,
    ref: str,
    base: str | None,
    model: str | None,
    kwargs: str | None,
    peft: str | None,
    purpose: str,
    strict: bool,
) -> None:
    """Say whether the adapter REF fits a base version or a model, before a byte of weights is read.

    With --model the class is built without weights (on torch's meta device), from the path and arguments that you give.

    Exit code 0: it fits, or nothing speaks against it and something is not known (said on standard error). 1: it
    does not fit; with --strict also where something is not known.
    """
    options = ctx.find_object(Options) or Options()
    against: Any = build_model(model, kwargs, base)
    with opened(options) as registry, waiting(f"checking {ref}"):
        found = registry.check(ref, base if against is None else against, peft=peft, purpose=purpose)
    if options.json:
        from registry.cli.documents import compatibility_document

        emit_json(compatibility_document(found))
    else:
        emit_lines(page(found, width()))
        for finding in found.undecided:
            message(f"not decided: {finding}", YELLOW)
    ctx.exit(0 if found and not (strict and found.verdict == "undecided") else 1)


def page(found: Compatibility, columns: int | None) -> Iterator[str]:
    """The verdict, and a table of what was found."""
    against = f" into {escaped(found.model)}" if found.model else ""
    how = "" if found.purpose == "load" else f", to {found.purpose}"
    targets = f"{found.matched} of {found.total} targets are there; " if found.model and found.total else ""
    title = f"{escaped(found.adapter)}{against}{how}: {found.verdict}"
    yield from (paint(line, BOLD) for line in ([title] if columns is None else fold(title, columns)))
    yield f"{targets}PEFT {escaped(found.peft)}"
    if found.findings:
        header = (Column("CODE"), Column("SEVERITY"), Column("WHERE", least=16), Column("WHAT", least=30))
        yield ""
        yield from table_lines(header, [row(one) for one in found.findings], columns)


def row(finding: Finding) -> list[str]:
    """One finding, in the cells of a table."""
    what = finding.message
    if finding.expected or finding.found:
        what += f" (expected {finding.expected or 'nothing'}, found {finding.found or 'nothing'})"
    if finding.mend:
        what += f"; {finding.mend}"
    return [finding.code, finding.severity, escaped(finding.subject) or "-", escaped(what)]
