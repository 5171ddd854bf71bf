"""`registry adopt`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, attachment_options, common_options
from registry.cli.output import (
    YELLOW,
    emit_json,
    emit_lines,
    escaped,
    human_size,
    is_terminal,
    message,
    width,
)
from registry.cli.table import Column, table_lines

if TYPE_CHECKING:
    from registry.operations.adoption import Adoption, Item, Progress

COLUMNS = (
    Column("PATH", least=20),
    Column("KIND"),
    Column("NAME", least=14),
    Column("STEP", right=True),
    Column("BASE", least=14),
    Column("VERDICT", least=20),
)
PHASES = {"scan": "looking for artifacts", "look": "reading headers", "push": "pushing"}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _bytes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A size like `500M` or `2GiB`; `none` for no limit."""
    if value is None or value.lower() == "none":
        return None
    text = value.strip().upper().removesuffix("B").removesuffix("I")
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M", "G", "T") else (text, "")
    try:
        size = float(number) * _UNITS[unit]
        if 0 <= size < 2**63:
            return int(size)
    except ValueError:
        pass
    raise click.BadParameter(f"{value!r} is no size; expected one like 500M or 2GiB, or none", ctx, parameter)


@click.command(
    name="adopt",
    cls=Command,
    short_help="Push all adapters and checkpoints of a tree of folders.",
    examples=["registry adopt . --dry-run", "registry adopt . --namespace walk --external-over 2GiB"],
)
@click.argument("folder", metavar="DIR")
@click.option("--namespace", metavar="N", help="Namespace of all names. [default: the folder's name]")
@click.option("--dry-run", is_flag=True, help="Show the plan, write nothing.")
@click.option(
    "--external-over",
    metavar="SIZE",
    default="2GiB",
    callback=_bytes,
    help="Record larger bases without their bytes; none: store all. [default: 2GiB]",
)
@click.option("--keep-duplicates", is_flag=True, help="Push also what is in the registry already under another path.")
@attachment_options(files="optimizer, tokenizer", larger="larger ones are left out")
@common_options
@click.pass_obj
def adopt_command(options: Options, /, folder: str, attachment_limit: int | None, **keywords: Any) -> None:
    """Push all adapters and checkpoints in the tree DIR that are not in the registry yet.

    Found are PEFT folders, folders that transformers or diffusers saved a model in (a hub cache too), and single files
    of tensors. Checkpoints of one run become versions of one name, in the order of their steps. Bases go first, and
    adapters get the base that they name or fit. What is broken is told and stops nothing else. Run it again after an
    interruption, or when there is more: what is in is passed over.

    Exit code 1: something was broken or could not be read.
    """
    limit = None if attachment_limit is None else attachment_limit << 20
    with opened(options, make_default=True) as registry, _progress() as progress:
        try:
            adoption = registry.adopt(folder, attachment_limit=limit, progress=progress, **keywords)
        except KeyboardInterrupt:
            message("what was adopted so far stays; the same command goes on from there")
            raise
    if options.json:
        emit_json(adoption_document(adoption))
    else:
        emit_lines(table_lines(COLUMNS, [_row(item) for item in adoption.items], width()) if adoption.items else ())
    for line in _summary(adoption):
        message(line)
    for line in _warnings(adoption):
        message(line, YELLOW)
    if not adoption.is_whole:
        raise click.exceptions.Exit(1)


def _row(item: Item) -> list[str]:
    return [
        escaped(item.path),
        item.kind or "-",
        item.name or "-",
        "-" if item.step is None else str(item.step),
        _base(item),
        escaped(_verdict(item)),
    ]


def _base(item: Item) -> str:
    from registry.operations.base_guess import listed

    if item.base is not None or item.guess is None:
        return item.base or "-"
    if item.verdict == "new":
        bases = escaped(listed(item.guess.bases))
        return {"recorded": bases, "fits": f"{bases} (guessed)", "undecided": f"undecided: {bases}"}.get(
            item.guess.how, item.guess.how
        )
    return "-"


def _verdict(item: Item) -> str:
    said: str = item.verdict
    if item.verdict == "adopted":
        said = f"adopted as {item.reference}" + (", external" if item.external else "")
    elif item.verdict == "there":
        said = f"there: {item.reference}"
    elif item.verdict == "new" and item.external:
        said = "new, external"
    if item.findings:
        said += f", {item.findings} finding{'s' if item.findings > 1 else ''}"
    why = item.why or (item.guess.why if item.verdict == "new" and item.guess is not None else "")
    return f"{said}: {why}" if why else said


def _summary(adoption: Adoption) -> Iterator[str]:
    verdicts = adoption.verdicts
    order = ("new", "adopted", "there", "duplicate", "left out", "broken")
    said = ", ".join(f"{verdicts[one]} {one}" for one in order if one in verdicts) or "no adapter and no checkpoint"
    added = "" if adoption.dry_run else f"; {human_size(adoption.bytes_new)} added to the store"
    yield f"{said} in {adoption.root}{added}"
    if adoption.counted:
        yield "no artifacts: " + ", ".join(f"{count} {kind}" for kind, count in adoption.counted.items())


def _warnings(adoption: Adoption) -> Iterator[str]:
    for skipped in adoption.skipped:
        yield f"{'unreadable' if skipped.unreadable else 'not entered'}: {skipped.path}: {skipped.why}"
    if without := adoption.without_base:
        yield f"{len(without)} adapters have no base; the table says why"


def adoption_document(adoption: Adoption) -> dict[str, Any]:
    """`registry adopt --json`."""
    return {
        "root": _text(str(adoption.root)),
        "namespace": adoption.namespace,
        "dry_run": adoption.dry_run,
        "whole": adoption.is_whole,
        "verdicts": adoption.verdicts,
        "bytes_new": adoption.bytes_new,
        "items": [_item_document(item) for item in adoption.items],
        "skipped": [
            {"path": _text(one.path), "why": one.why, "unreadable": one.unreadable} for one in adoption.skipped
        ],
        "counted": dict(adoption.counted),
    }


def _item_document(item: Item) -> dict[str, Any]:
    guess = item.guess
    return {
        "path": _text(item.path),
        "form": item.form,
        "kind": item.kind,
        "name": item.name or None,
        "step": item.step,
        "size": item.size,
        "external": item.external,
        "verdict": item.verdict,
        "reference": item.reference,
        "why": item.why or None,
        "base": item.base,
        "guess": None
        if guess is None
        else {
            "how": guess.how,
            "recorded": guess.recorded,
            "bases": [_text(base.label) for base in guess.bases],
            "why": guess.why,
        },
        "continued_from": item.continued_from,
        "findings": item.findings,
        "bytes_new": item.bytes_new,
        "notes": list(item.notes),
    }


def _text(text: str) -> str:
    """A path as text that every reader of JSON takes: bytes that are no UTF-8 are replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar on a terminal's standard error."""
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[path]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(PHASES["scan"], total=None, path="")

        def show(phase: str, done: int, total: int, path: str) -> None:
            bar.update(task, description=PHASES[phase], completed=done, total=total or None, path=escaped(path)[-40:])

        yield show
