"""`registry merge` and `registry remerge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import YELLOW, emit, emit_json, emit_lines, escaped, message, report_findings, waiting, width
from registry.cli.table import Column, table_lines

if TYPE_CHECKING:
    from registry.operations.merging.report import MergeResult, ModuleReport

EXIT_NO = 1


@click.command(
    name="merge",
    cls=Command,
    short_help="Merge adapters with each other, or into their base.",
    examples=[
        "registry merge walk/perturb@1 walk/perturb@2 --weights 0.7,0.3 -o walk/both",
        "registry merge --where 'base = walk/base and r <= 16' --method svd \\",
        "    --rank 8 -o walk/all:best",
        "registry merge walk/perturb:prod --into-base -o walk/perturbed",
    ],
)
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option(
    "-o", "--output", "name", metavar="NAME", required=True, help="Name of the result, with a :tag or without."
)
@click.option("--where", metavar="EXPR", multiple=True, help="Sources by query, as of 'registry list'.")
@click.option("--weights", metavar="W,W,...", help="One number a source, in their order. [default: 1 each]")
@click.option(
    "--module-weights",
    metavar="GLOB=W,W,...",
    multiple=True,
    help="Other weights for the modules that match. Repeat for more.",
)
@click.option(
    "--method",
    metavar="METHOD",
    default="cat",
    show_default=True,
    help="cat (the sum), svd, slerp, knots, tsv, ties, dare_linear, dare_ties, magnitude_prune; PEFT's forms on A and "
    "B "
    "apart: linear, ties_factors, dare_linear_factors, dare_ties_factors, magnitude_prune_factors.",
)
@click.option("--rank", metavar="R", type=int, help="Most that the result has in a module.")
@click.option("--energy", metavar="E", type=float, help="Share of the squared norm to keep, in the smallest rank.")
@click.option("--density", metavar="D", type=float, help="Share of elements that ties, dare and pruning keep.")
@click.option("--majority", metavar="HOW", help="How ties elects signs: total (default) or frequency.")
@click.option(
    "--inner", metavar="METHOD", help="Within knots: ties (default), dare_ties, dare_linear, magnitude_prune."
)
@click.option("--seed", metavar="N", type=int, help="Of what is dropped at random. [default: 0]")
@click.option("--base", metavar="REF", help="Base of the result. [default: that of the sources]")
@click.option("--into-base", is_flag=True, help="Into the weights of the base; the result is a model.")
@click.option("--saved", metavar="HOW", help="Whole copies on which sources disagree: drop, mean, or a source's REF.")
@click.option(
    "--attention-out",
    metavar="N",
    type=int,
    help="1 or 2: how often the out_proj of a MultiheadAttention counts in a base; PEFT up to 0.21 adds it twice.",
)
@click.option("--dtype", metavar="T", help="f32, bf16 or f16. [default: the sources' own]")
@click.option("--precise", is_flag=True, help="Compute in float64.")
@click.option("--device", metavar="D", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--tag", "tags", metavar="T", multiple=True, help="Tag to move to the version. Repeat for more.")
@click.option("-m", "--message", "text", metavar="TEXT", help="Why; kept with the version.")
@click.option("--force", is_flag=True, help="Also what does not fit, or what the base contains already.")
@click.option("--modules", is_flag=True, help="Show every module.")
@common_options
@click.pass_obj
def merge_command(
    options: Options,
    /,
    refs: tuple[str, ...],
    name: str,
    weights: str | None,
    module_weights: tuple[str, ...],
    text: str | None,
    modules: bool,
    **keywords: Any,
) -> None:
    """Merge the adapters REF into a new version of NAME.

    The algebra is on the factors where that is exact, and module by module on the updates where it is not; no model is
    built. Sources that do not fit together are refused with the reason. The recipe is kept: the same merge again is
    found, and 'registry remerge' computes it once more.
    """
    numbers = None if weights is None else _numbers(weights, "--weights")
    by_module: dict[str, list[float]] = {}
    for one in module_weights:
        pattern, equals, given = one.rpartition("=")
        if not equals or not pattern:
            raise click.UsageError(f"--module-weights: expected GLOB=W,W,..., found {escaped(one)!r}")
        by_module.pop(pattern, None)  # the last one counts
        by_module[pattern] = _numbers(given, "--module-weights")
    with opened(options) as registry, waiting("merging"):
        result = registry.merge(
            list(refs), name, weights=numbers, module_weights=by_module or None, message=text, **keywords
        )
    if options.json:
        emit_json(result.to_json())
    else:
        _print(result, modules)
    report_findings(result.findings, result.notes)


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(one) for one in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"{option}: expected numbers with commas between, found {escaped(text)!r}") from error


def _print(result: MergeResult, modules: bool) -> None:
    if result.found is not None:
        what = "already there" if not result.created else "merged"
        emit(f"{what}: {result.reference}  (the same recipe made {result.found}; nothing was computed)")
        return
    what = f"into {result.base}" if result.into_base else result.method
    counted = f"{len(result.sources)} sources, {len(result.modules)} modules, {result.seconds:.2f} s"
    emit(f"{'merged' if result.created else 'already there:'} {result.reference}  {what}  ({counted})")
    for reference, weight in result.sources:
        emit(f"  {weight:g} * {reference}")
    error = result.relative_error or 0.0
    if result.cross_terms:
        emit(f"  relative error to the true weighted sum: {error:.3g}, of which cross terms of A and B are the most")
    else:
        emit(f"  relative error to the true weighted sum: {error:.3g}")
    if result.unmoved is not None:
        emit(f"  weights that rounding left as they were: {result.unmoved:.2%}")
    if modules:
        emit_lines(_table(result))
    elif result.cross_terms:
        message("note: --method cat or svd adds the updates themselves, without cross terms", YELLOW)


def _table(result: MergeResult) -> list[str]:
    header = [
        Column("MODULE", least=24),
        Column("SOURCES", right=True),
        Column("RANKS", right=True),
        Column("RANK", right=True),
        Column("NORM", right=True),
        Column("ERROR", right=True),
    ]
    if result.into_base:
        header.append(Column("UNMOVED", right=True))
    return list(table_lines(header, [_row(one)[: len(header)] for one in result.modules], width()))


def _row(one: ModuleReport) -> list[str]:
    return [
        escaped(one.path),
        str(one.sources),
        str(one.of_ranks),
        "-" if one.rank is None else str(one.rank),
        f"{one.norm:.4g}",
        f"{one.relative_error:.3g}",
        "-" if one.unmoved is None else f"{one.unmoved:.1%}",
    ]


@click.command(
    name="remerge",
    cls=Command,
    short_help="Compute a merge again, and compare.",
    examples=["registry remerge walk/both"],
)
@click.argument("ref")
@click.option("--device", metavar="D", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@common_options
@click.pass_obj
def remerge_command(options: Options, ref: str, device: str) -> None:
    """Compute the recipe of REF again from its sources, and say whether the result is bit-equal or how far off.

    Nothing is stored. Exit code 1 where it is not bit-equal.
    """
    with opened(options) as registry, waiting(f"merging {ref} again"):
        result = registry.remerge(ref, device=device)
    if options.json:
        from registry.operations.merging.report import plain

        emit_json(
            {
                "reference": result.reference,
                "bit_equal": bool(result),
                "tensors": result.tensors,
                "equal": result.equal,
                "relative_difference": plain(result.relative_difference),
                "worst": None
                if result.worst is None
                else {"tensor": result.worst[0], "relative_difference": plain(result.worst[1])},
                "environment": list(result.environment),
                "seconds": result.seconds,
            }
        )
    elif result:
        emit(f"bit-equal: all {result.tensors} tensors of {result.reference}  ({result.seconds:.2f} s)")
    else:
        off = f"{result.tensors - result.equal} of {result.tensors} tensors differ"
        emit(f"not bit-equal: {off}, relative difference {result.relative_difference:.3g}")
        if result.worst is not None:
            emit(f"  farthest: {escaped(result.worst[0])}, {result.worst[1]:.3g}")
    for one in result.environment if not result else ():
        message(f"note: {one}", YELLOW)
    if not result:
        raise click.exceptions.Exit(EXIT_NO)
