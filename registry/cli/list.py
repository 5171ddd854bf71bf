"""`registry list`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from registry.cli.opening import opened
from registry.cli.options import KINDS, Command, Options, common_options
from registry.cli.output import (
    emit_json,
    emit_lines,
    escaped,
    human_number,
    human_size,
    human_time,
    message,
    width,
)
from registry.cli.table import Column, natural_width, table_lines
from registry.core.query import parse_sort, parse_where

if TYPE_CHECKING:
    from registry.registry import Version

COLUMNS = (
    Column("NAME", least=14),
    Column("VER", right=True),
    Column("TAGS", least=6),
    Column("KIND"),
    Column("R", right=True),
    Column("ALPHA", right=True),
    Column("BASE", least=11),
    Column("SIZE", right=True),
    Column("CREATED"),
)
FINDINGS = Column("FINDINGS", right=True)
"""Of versions about which there is something to say; 'registry show' has it in full."""
MOST_TAGS = 3


def _count(ctx: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
    # Not an IntRange: that writes its bounds into the help.
    if value is not None and not 0 <= value < 2**53:
        raise click.BadParameter(f"{value} is no number of versions", ctx, parameter)
    return value


@click.command(
    name="list",
    cls=Command,
    short_help="List versions, or find them by what is known of them.",
    examples=[
        "registry list 'walk/*' --base walk/base",
        "registry list --where 'r >= 4 and metric.reward > 900' \\",
        "    --sort -created_at --limit 10",
    ],
)
@click.argument("pattern", required=False)
@click.option("--base", metavar="REF", help="Only those trained on it; namespace/name means any version of it.")
@click.option("--tag", metavar="T", help="Only those with this tag; latest is one too.")
@click.option("--kind", metavar="KIND", type=click.Choice(KINDS), help="Only adapter, base or checkpoint.")
@click.option(
    "--where",
    metavar="EXPR",
    multiple=True,
    help="FIELD OP VALUE, joined by 'and'; OP is = != < <= > >= or ~ (contains, or * and ?). "
    "Fields are columns such as r, lora_alpha, target, size, and meta.KEY and metric.KEY. Repeat for more.",
)
@click.option("--sort", metavar="F", help="Field, or -FIELD for descending. [default: by name, newest first]")
@click.option("--limit", metavar="N", type=int, callback=_count, help="At most so many.")
@common_options
@click.pass_obj
def list_command(options: Options, /, where: tuple[str, ...], sort: str | None, **keywords: Any) -> None:
    """List versions. PATTERN is namespace/name with * and ?, or one of the two halves."""
    with opened(options) as registry:
        versions = registry.find(*where, order_by=sort, **keywords)
    if options.json:
        from registry.cli.documents import version_document

        emit_json([version_document(version) for version in versions])
    elif versions:
        asked = asked_for(where, sort)
        noticed = any(version.findings for version in versions)
        more = [Column(key, right=field == "metric", least=6) for field, key in asked]
        columns = (*COLUMNS, *((FINDINGS,) if noticed else ()), *more)
        room = width()
        rows = [row(version, asked, findings=noticed) for version in versions]
        if room is not None and natural_width(columns, rows) > room:
            rows = [row(version, asked, short=True, findings=noticed) for version in versions]
        emit_lines(table_lines(columns, rows, room))
    elif keywords["limit"] != 0:
        message("no version is like that" if where or any(keywords.values()) else "no versions yet")


def asked_for(where: Sequence[str], sort: str | None) -> list[tuple[str, str]]:
    """The metadata and metrics that the question is about, (`meta` or `metric`, key): the answer shows them too."""
    fields = [(condition.field, condition.key) for condition in parse_where(where)]
    if sort is not None:
        key = parse_sort(sort)
        fields.append((key.field, key.key))
    return list(dict.fromkeys(pair for pair in fields if pair[1]))


def row(
    version: Version, asked: Sequence[tuple[str, str]] = (), *, short: bool = False, findings: bool = False
) -> list[str]:
    """The cells of one version; `-` for what is not known or does not apply.

    Args:
        asked: metadata and metrics to show, see `asked_for`.
        short: the day alone, and the number of tags after the third.
        findings: also how many errors and warnings its push noticed.
    """
    tags = version.tags
    if short and len(tags) > MOST_TAGS + 1:
        tags = (*tags[:MOST_TAGS], f"+{len(tags) - MOST_TAGS}")
    return [
        version.name,
        str(version.version),
        ", ".join(tags) or "-",
        version.kind,
        "-" if version.r is None else str(version.r),
        human_number(version.lora_alpha),
        escaped(version.base or "-"),
        human_size(version.size),
        f"{version.created_at:%Y-%m-%d}" if short else human_time(version.created_at),
        *((str(version.findings or "-"),) if findings else ()),
        *(_said(version, field, key) for field, key in asked),
    ]


def _said(version: Version, field: str, key: str) -> str:
    if field == "metric":
        return human_number(version.metrics.get(key), digits=6)
    return escaped(str(version.metadata.get(key, "-")))
