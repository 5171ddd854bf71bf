"""`registry gc`: freeing what nothing needs any more, and telling who needed it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import BOLD, emit_json, emit_lines, escaped, human_size, paint, waiting, width
from registry.cli.table import Column, table_lines

if TYPE_CHECKING:
    from registry.operations.gc import Collected

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
DIGEST = 12
"""Digits of a digest that a table shows."""
COLUMNS = (Column("BLOB"), Column("SIZE", right=True), Column("AS"), Column("NEEDED BY", least=20))
NAMED = 3


def _duration(ctx: click.Context, parameter: click.Parameter, value: str | None) -> timedelta | None:
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", value)
    if match is None:
        raise click.BadParameter(f"expected a number with s, m, h, d or w, as 12h; found {value!r}", ctx, parameter)
    return timedelta(**{UNITS[match[2]]: int(match[1])})


@click.command(
    name="gc",
    cls=Command,
    short_help="Free the bytes of removed versions and of killed pushes.",
    examples=["registry gc --dry-run", "registry gc --grace 12h"],
)
@click.option("--dry-run", is_flag=True, help="Change nothing; tell what would be done.")
@click.option(
    "--grace",
    metavar="DURATION",
    callback=_duration,
    help="Leave what was removed or written since then: 30m, 12h, 2w; 0s for nothing.  [default: 7d]",
)
@common_options
@click.pass_obj
def gc_command(options: Options, dry_run: bool, grace: timedelta | None) -> None:
    """Free the bytes of removed versions, and of pushes that were killed.

    A removed version can be restored until its grace period is over; then it is purged: its files go, less what other
    versions share with it. What it was, its number, tags, metrics and lineage stay. Temporary files stay for an hour in
    any case: a push may be writing them.
    """
    with opened(options) as registry, waiting("collecting garbage"):
        collected = registry.gc(grace=grace, dry_run=dry_run)
    if options.json:
        emit_json(document(collected))
    else:
        emit_lines(_text(collected))


def document(collected: Collected) -> dict[str, Any]:
    """What `registry gc --json` prints."""

    def blob(digest: str, size: int) -> dict[str, Any]:
        return {"digest": f"sha256:{digest}", "size": size}

    return {
        "dry_run": collected.dry_run,
        "grace_seconds": int(collected.grace.total_seconds()),
        "bytes_freed": collected.bytes_freed,
        "purged": list(collected.purged),
        "waiting": list(collected.waiting),
        "deleted": [
            blob(one.digest, one.size) | {"roles": list(one.roles), "held_by": list(one.held_by)}
            for one in collected.deleted
        ],
        "kept": [
            blob(one.digest, one.size)
            | {"roles": list(one.roles), "held_by": list(one.held_by)}
            | {"kept_by": list(one.kept_by), "holders": one.holders}
            for one in collected.kept
        ],
        "orphans": [blob(digest, size) for digest, size in collected.orphans],
        "temporaries": [{"name": name, "size": size} for name, size in collected.temporaries],
    }


def _text(collected: Collected) -> Iterator[str]:
    would = collected.dry_run
    deleted = [
        (one.digest, one.size, ", ".join(one.roles) or "-", _named(one.held_by, len(one.held_by)))
        for one in collected.deleted
    ]
    deleted += [(digest, size, "orphan", "-") for digest, size in collected.orphans]
    deleted += [(name, size, "temporary", "-") for name, size in collected.temporaries]
    yield from _table("Would be deleted" if would else "Deleted", deleted)
    yield from _table(
        "Shared, and kept",
        [(one.digest, one.size, ", ".join(one.roles), _named(one.kept_by, one.holders)) for one in collected.kept],
    )
    if collected.purged:
        yield f"{'would purge' if would else 'purged'} {_named(collected.purged, len(collected.purged))}"
    if collected.waiting:
        wait = "waits" if len(collected.waiting) == 1 else "wait"
        yield f"{_named(collected.waiting, len(collected.waiting))} {wait} for the end of the grace period"
    if not deleted:
        yield "nothing to free"
        return
    blobs = len(collected.deleted) + len(collected.orphans)
    files = f"{blobs} blob{'' if blobs == 1 else 's'}"
    if collected.temporaries:
        files += f" and {len(collected.temporaries)} temporary file{'' if len(collected.temporaries) == 1 else 's'}"
    yield f"{'would free' if would else 'freed'} {human_size(collected.bytes_freed)} in {files}"


def _table(title: str, rows: Sequence[tuple[str, int, str, str]]) -> Iterator[str]:
    if not rows:
        return
    yield paint(title, BOLD)
    cells = [[escaped(digest[:DIGEST]), human_size(size), role, escaped(by)] for digest, size, role, by in rows]
    yield from table_lines(COLUMNS, cells, width())
    yield ""


def _named(references: Sequence[str], count: int) -> str:
    """The first few, and how many more."""
    few = list(references[:NAMED])
    more = count - len(few)
    return (", ".join(few) or "-") + (f" and {more} more" if more > 0 else "")
