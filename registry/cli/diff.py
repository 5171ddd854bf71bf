"""`registry diff`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import (
    BOLD,
    YELLOW,
    emit_json,
    emit_lines,
    escaped,
    human_number,
    human_size,
    paint,
    waiting,
    width,
)
from registry.cli.table import Column, fold, table_lines

if TYPE_CHECKING:
    from registry.core.layout import TensorSpec
    from registry.operations.difference import (
        ComponentDifference,
        ModuleDifference,
        Norms,
        TensorDifference,
    )
    from registry.registry import Difference

ROWS = 20
NUMBERS = ("NORM A", "NORM B", "DISTANCE", "RELATIVE", "COSINE")
Row = tuple[str, "Norms | None", str]


@click.command(
    name="diff",
    cls=Command,
    short_help="Show what is different between two versions.",
    examples=["registry diff walk/perturb@1 walk/perturb:prod", "registry diff walk/base walk/base:v1 --no-weights"],
)
@click.argument("a", metavar="REF_A")
@click.argument("b", metavar="REF_B")
@click.option("--no-weights", is_flag=True, help="Compare digests alone; read no weights.")
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(min=0),
    default=ROWS,
    show_default=True,
    help="Rows of each table; --json always has all.",
)
@common_options
@click.pass_context
def diff_command(ctx: click.Context, a: str, b: str, no_weights: bool, limit: int) -> None:
    """Show what is different between versions REF_A and REF_B.

    Of adapters, what they add to the weight of each module is compared, whatever their ranks; of other tensors the
    norms. RELATIVE is the distance over the larger norm.

    Exit code 0: the same content, be it in another form; 1: the content differs.
    """
    options = ctx.find_object(Options) or Options()
    with opened(options) as registry, waiting(f"comparing {a} and {b}"):
        difference = registry.diff(a, b, weights=not no_weights)
    if options.json:
        from registry.cli.documents import difference_document

        emit_json(difference_document(difference))
    else:
        emit_lines(_page(difference, limit, width()))
    ctx.exit(0 if difference.same_content else 1)


def _page(difference: Difference, limit: int, columns: int | None) -> Iterator[str]:
    yield paint(f"A  {difference.a.reference}", BOLD)
    yield paint(f"B  {difference.b.reference}", BOLD)
    same = "A and B have the same content" if difference.same_content else "the content differs"
    yield "A and B are the same, to the last byte" if difference.a.digest == difference.b.digest else same
    for note in difference.notes:
        yield from (paint(line, YELLOW) for line in _folded(f"note: {escaped(note)}", columns))
    facts = list(_facts(difference))
    if facts:
        header = (Column("WHAT", least=14), Column("A", least=12), Column("B", least=12))
        yield ""
        yield from _limited(header, facts, limit, columns)
    for component in difference.components:
        yield from _component(component, limit, columns)


def _facts(difference: Difference) -> Iterator[list[str]]:
    for what, values in (
        ("", difference.facts),
        ("config ", difference.config),
        ("metadata ", difference.metadata),
        ("metric ", difference.metrics),
    ):
        for one in values:
            yield [escaped(what + one.key), _value(one.a), _value(one.b)]
    for file in difference.files:
        sizes = ("-" if side is None else human_size(side.size) for side in (file.a, file.b))
        yield [escaped(f"file {file.path}"), *sizes]


def _value(value: object) -> str:
    if value is None:
        return "-"
    return escaped(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _component(component: ComponentDifference, limit: int, columns: int | None) -> Iterator[str]:
    yield ""
    title = paint(f"Tensors of {component.role}", BOLD)
    if component.change in ("added", "removed"):
        side, count = ("A", component.count_a) if component.change == "removed" else ("B", component.count_b)
        yield f"{title}: {count}, in {side} alone"
        return
    changes = [one.change for one in component.tensors]
    counts = [f"{changes.count(change)} {change}" for change in ("changed", "removed", "added") if change in changes]
    yield f"{title}: {', '.join((*counts, f'{component.same} the same'))}"
    if component.values:
        yield ""
        header = [Column(f"{component.role.upper()} VALUE", least=14), Column("A", least=8), Column("B", least=8)]
        rows = [[escaped(one.key), _value(one.a), _value(one.b)] for one in component.values]
        yield from _limited(header, rows, limit, columns)
    modules = [(one.module, one.norms, _of_module(one)) for one in component.modules]
    if modules:
        yield ""
        yield f"Modules by what is added to their weight: {len(modules)} differ, {component.same_modules} the same"
        yield from _measured("MODULE", modules, limit, columns)
    tensors = [(one.name, one.norms, _of_tensor(one)) for one in component.tensors if not one.module]
    if tensors:
        yield ""
        yield from _measured("TENSOR", tensors, limit, columns)


def _measured(title: str, rows: Sequence[Row], limit: int, columns: int | None) -> Iterator[str]:
    """A table of names with norms, where there are any, and remarks."""
    numbers = NUMBERS if any(norms is not None for _, norms, _ in rows) else ()
    header = [Column(title, least=14), *(Column(number, right=True) for number in numbers)]
    noted = any(note for _, _, note in rows)
    if noted:
        header.append(Column("NOTE", least=12))
    cells = [
        [escaped(name), *(_numbers(norms) if numbers else ()), *([note] if noted else ())] for name, norms, note in rows
    ]
    yield from _limited(header, cells, limit, columns)


def _limited(header: Sequence[Column], rows: Sequence[list[str]], limit: int, columns: int | None) -> Iterator[str]:
    yield from table_lines(header, rows[:limit], columns)
    if len(rows) > limit:
        yield f"... and {len(rows) - limit} more; --limit {len(rows)} shows them"


def _numbers(norms: Norms | None) -> list[str]:
    if norms is None:
        return ["-"] * len(NUMBERS)
    cells = ["-" if one is None else f"{one:.4g}" for one in (norms.a, norms.b, norms.distance, norms.relative)]
    return [*cells, "-" if norms.cosine is None else f"{norms.cosine:.5f}"]


def _of_module(module: ModuleDifference) -> str:
    a, b = module.a, module.b
    notes = [] if module.change == "changed" else [f"in {'A' if b is None else 'B'} alone"]
    if a is not None and b is not None:
        pairs = (("r", a.rank, b.rank), ("scaling", a.scaling, b.scaling))
        notes += [f"{name} {human_number(x)} -> {human_number(y)}" for name, x, y in pairs if x != y]
    return escaped("; ".join((*notes, *([module.note] if module.note else ()))))


def _of_tensor(tensor: TensorDifference) -> str:
    a, b = tensor.a, tensor.b
    if a is None or b is None:
        return f"in {'A' if b is None else 'B'} alone, {_form(a or b)}"
    if tensor.elements is not None:
        return f"{tensor.elements:,} of {a.elements:,} elements differ"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{_form(a)} -> {_form(b)}"
    return escaped(tensor.note)


def _form(spec: TensorSpec | None) -> str:
    return "" if spec is None else f"{spec.dtype} {' x '.join(map(str, spec.shape)) or 'scalar'}"


def _folded(text: str, columns: int | None) -> list[str]:
    return [text] if columns is None else fold(text, columns)
