"""`registry extract`: an adapter out of a fine-tuned checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import emit, emit_json, emit_lines, escaped, report_findings, waiting, width
from registry.cli.table import Column, table_lines

if TYPE_CHECKING:
    from registry.operations.merging.extracted import ExtractResult

MOST_SHOWN = 10


@click.command(
    name="extract",
    cls=Command,
    short_help="Make an adapter out of a fine-tuned checkpoint.",
    examples=[
        "registry extract walk/perturbed --base walk/base --rank 4 -o walk/extracted",
        "registry extract walk/perturbed --energy 0.99 --modules q_proj \\",
        "    --base walk/base -o walk/extracted:q",
    ],
)
@click.argument("ref", metavar="CHECKPOINT")
@click.option("-o", "--output", "name", metavar="NAME", required=True, help="Name of the adapter, with a :tag or not.")
@click.option("--base", metavar="REF", help="The model before training. [default: the checkpoint's recorded base]")
@click.option("--rank", metavar="R", type=int, help="The most in each module; one with smaller dimensions has theirs.")
@click.option("--energy", metavar="E", type=float, help="Share of the squared norm to keep, in the smallest rank.")
@click.option(
    "--modules",
    metavar="PATTERN",
    multiple=True,
    help="Only these: a glob over paths, or what paths end in. Repeat for more. [default: all that differ]",
)
@click.option(
    "--attention-out",
    metavar="N",
    type=int,
    help="1 or 2: how often the out_proj of a MultiheadAttention is added; PEFT up to 0.21 adds it twice. "
    "[default: it is left out]",
)
@click.option("--dtype", metavar="T", help="f32, bf16 or f16. [default: f32]")
@click.option("--precise", is_flag=True, help="Compute in float64.")
@click.option("--device", metavar="D", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--tag", "tags", metavar="T", multiple=True, help="Tag to move to the version. Repeat for more.")
@click.option("-m", "--message", "text", metavar="TEXT", help="Why; kept with the version.")
@click.option("--force", is_flag=True, help="Also what does not fit the base.")
@common_options
@click.pass_obj
def extract_command(
    options: Options, /, ref: str, name: str, text: str | None, modules: tuple[str, ...], **keywords: Any
) -> None:
    """Make an adapter of what CHECKPOINT changed in the weights of its base, as a new version of NAME.

    Weights of linears, convolutions and embeddings that differ are subtracted and cut to the rank; tensors that are
    equal are not read. What no adapter can hold (norms, biases, tied weights, other shapes) is listed with its share.
    """
    with opened(options) as registry, waiting(f"extracting {ref}"):
        result = registry.extract(ref, name, modules=list(modules), message=text, **keywords)
    if options.json:
        emit_json(result.to_json())
    elif result.found is not None:
        what = "extracted" if result.created else "already there:"
        emit(f"{what} {result.reference}  (the same recipe made {result.found}; nothing was computed)")
    else:
        emit_lines(page(result, width()))
    report_findings(result.findings, result.notes)


def page(result: ExtractResult, columns: int | None) -> Iterator[str]:
    """The version and its error, the modules that are the farthest off, and what is not in the adapter."""
    what = "extracted" if result.created else "already there:"
    yield f"{what} {result.reference}  ({len(result.modules)} modules, {result.seconds:.2f} s)"
    yield f"  {result.checkpoint} less {result.base}"
    yield f"  relative error to the whole change: {result.relative_error or 0.0:.3g}"
    farthest = sorted(result.modules, key=lambda one: (-one.error, one.path))[:MOST_SHOWN]
    header = (
        Column("MODULE", least=24),
        Column("KIND"),
        Column("RANK", right=True),
        Column("NORM", right=True),
        Column("ERROR", right=True),
    )
    rows = [
        [escaped(one.path), one.kind, str(one.rank), f"{one.norm:.4g}", f"{one.relative_error:.3g}"] for one in farthest
    ]
    yield from ("", *table_lines(header, rows, columns))
    if len(result.modules) > len(farthest):
        yield f"and {len(result.modules) - len(farthest)} more that are nearer (--json has all)"
    if not result.left_out:
        return
    yield ""
    yield f"not in the adapter: {len(result.left_out)} tensors, {result.left_out_share or 0.0:.2%} of the squared norm"
    left = [
        [escaped(one.name), "-" if one.norm is None else f"{one.norm:.4g}", escaped(one.why)]
        for one in result.left_out[:MOST_SHOWN]
    ]
    yield from table_lines(
        (Column("TENSOR", least=24), Column("NORM", right=True), Column("WHY", least=30)), left, columns
    )
    if len(result.left_out) > len(left):
        yield f"and {len(result.left_out) - len(left)} more with smaller changes (--json has all)"
