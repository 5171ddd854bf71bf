"""`registry log`: lineage as trees."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import drawn, emit, emit_json, human_number, width

if TYPE_CHECKING:
    from rich.tree import Tree

    from registry.catalog.lineage import Edge
    from registry.registry import Lineage

DEPTH = 10
"""Levels of one tree. A longer history goes on in a tree of its own below, so that lines stay short."""
ALL_COLUMNS = 10_000


@click.command(
    name="log",
    cls=Command,
    short_help="Show what a version came from, and what came from it.",
    examples=["registry log walk/perturb:prod"],
)
@click.argument("ref")
@common_options
@click.pass_obj
def log_command(options: Options, ref: str) -> None:
    """Show what version REF came from, and what came from it.

    Each version's own edges are drawn once; where it comes up again, it says where they are.
    """
    with opened(options) as registry:
        lineage = registry.log(ref)
    if options.json:
        from registry.cli.documents import lineage_document

        emit_json(lineage_document(lineage))
    else:
        emit(lineage_text(lineage))


def lineage_text(lineage: Lineage) -> str:
    """Ancestors, then descendants, as trees."""
    return "\n".join((*_one_way(lineage, up=True), "", *_one_way(lineage, up=False)))


def _one_way(lineage: Lineage, *, up: bool) -> Iterator[str]:
    edges = lineage.ancestors if up else lineage.descendants
    names = {one: f"{name}, removed" if one in lineage.removed else name for one, name in lineage.names.items()}
    if not edges:
        nothing = "came from nothing that is recorded" if up else "led to nothing yet"
        yield f"{names[lineage.id]} {nothing}"
        return
    following = _following(edges, up=up)
    heading = "came from" if up else "led to"
    for index, tree in enumerate(_trees(lineage.id, following, names, heading)):
        if index:
            yield ""
        yield from drawn(tree, width() or ALL_COLUMNS)


def _following(edges: Iterable[Edge], *, up: bool) -> Mapping[int, list[tuple[int, str]]]:
    """By version, those it leads to and how, in words."""
    found: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for edge in edges:
        weight = "" if edge.weight is None else f", weight {human_number(edge.weight)}"
        here, there = (edge.child_id, edge.parent_id) if up else (edge.parent_id, edge.child_id)
        found[here].append((there, f"{edge.relation}{'' if up else ' it'}{weight}"))
    return found


def _trees(
    root: int, following: Mapping[int, list[tuple[int, str]]], names: Mapping[int, str], heading: str
) -> Iterator[Tree]:
    from rich.text import Text
    from rich.tree import Tree

    waiting = deque([root])
    drawn = {root}

    def grow(tree: Tree, version: int, depth: int) -> None:
        for other, relation in following.get(version, ()):
            label = f"{names[other]}  ({relation})"
            if other not in following:
                tree.add(Text(label))
            elif other in drawn:
                tree.add(Text(f"{label}, see {'below' if other in waiting else 'above'}"))
            else:
                drawn.add(other)
                if depth == DEPTH:
                    waiting.append(other)
                    tree.add(Text(f"{label}, see below"))
                else:
                    grow(tree.add(Text(label)), other, depth + 1)

    while waiting:
        version = waiting.popleft()
        tree = Tree(Text(f"{names[version]} {heading}", style="bold"), guide_style="dim")
        grow(tree, version, 1)
        yield tree
