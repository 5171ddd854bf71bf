"""`registry fsck`: what is not as it must be, who suffers from it, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from registry.cli.opening import not_found
from registry.cli.options import Command, Options, common_options
from registry.cli.output import BOLD, emit_json, emit_lines, escaped, human_size, message, paint, waiting
from registry.cli.startup import quick_imports

if TYPE_CHECKING:
    from registry.operations.problems import Fsck, Problem

SUFFERING = 5
"""Versions that are named for a problem; of more there is the number. `--json` has them all."""


@click.command(
    name="fsck",
    cls=Command,
    short_help="Check a registry: every row, blob and event.",
    examples=["registry fsck", "registry fsck --deep --json"],
)
@click.option("--deep", is_flag=True, help="Read every byte of every blob, tensor and file.")
@common_options
@click.pass_context
def fsck_command(ctx: click.Context, deep: bool) -> None:
    """Check a registry, in whatever state it is, and change nothing.

    The journal and the manifests are followed into a catalog beside, and the registry's own is compared with that, row
    by row. Every blob that a version needs is looked for. Exit code 1: there are problems.
    """
    options: Options = ctx.obj
    with quick_imports():
        from registry.core.errors import RegistryNotFound
        from registry.operations.discover import locate
        from registry.operations.fsck import fsck

    location = locate(options.registry)
    try:
        with waiting("reading every byte" if deep else "checking"):
            found = fsck(location, deep=deep)
    except RegistryNotFound:
        if location.default:
            raise not_found(location) from None
        raise
    if options.json:
        emit_json(document(found))
    else:
        emit_lines(_text(found))
        for note in found.notes:
            message(f"note: {note}")
    if not found.whole:
        ctx.exit(1)


def document(found: Fsck) -> dict[str, Any]:
    """What `registry fsck --json` prints."""
    return {
        "registry": found.registry,
        "deep": found.deep,
        "whole": found.whole,
        "problems": [
            {
                "kind": one.kind,
                "subject": one.subject,
                "expected": one.expected,
                "found": one.found,
                "versions": list(one.versions),
                "mend": one.mend,
            }
            for one in found.problems
        ],
        "notes": list(found.notes),
        "names": found.names,
        "versions": found.versions,
        "events": found.events,
        "blobs": found.blobs,
        "bytes_read": found.bytes_read,
    }


def _text(found: Fsck) -> Iterator[str]:
    for problem in found.problems:
        yield from _lines(problem)
    read = f", {human_size(found.bytes_read)} read" if found.deep else ""
    looked = f"{found.names} names, {found.versions} versions, {found.events} events, {found.blobs} blobs{read}"
    if found.whole:
        yield f"whole: {looked}"
    else:
        number = len(found.problems)
        yield f"{number} problem{'' if number == 1 else 's'}: {looked}"


def _lines(problem: Problem) -> Iterator[str]:
    yield f"{paint(problem.kind, BOLD)} {escaped(problem.subject)}"
    yield f"  expected {escaped(problem.expected)}"
    yield f"  found    {escaped(problem.found)}"
    if problem.versions:
        more = len(problem.versions) - SUFFERING
        named = ", ".join(problem.versions[:SUFFERING]) + (f" and {more} more" if more > 0 else "")
        yield f"  suffers  {escaped(named)}"
    yield f"  mend     {escaped(problem.mend)}"
