"""`registry tag`: pointing a tag at a version, protecting, deleting, and its history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import emit, emit_json, emit_lines, escaped, human_time, width
from registry.cli.table import Column, table_lines

if TYPE_CHECKING:
    from registry.core.event import Event
    from registry.registry import Registry

COLUMNS = (
    Column("WHEN (UTC)"),
    Column("EVENT"),
    Column("FROM", right=True),
    Column("TO", right=True),
    Column("BY", least=8),
    Column("WHY", least=20),
)


@click.command(
    name="tag",
    cls=Command,
    short_help="Point a tag at a version, protect or delete it, or see its history.",
    examples=[
        "registry tag walk/perturb@2 prod -m 'passed the field test'",
        "registry tag walk/perturb prod --protect",
        "registry tag --history walk/perturb:prod",
    ],
)
@click.argument("ref", required=False)
@click.argument("tag", required=False)
@click.option("--protect", "action", flag_value="protect", help="Let nobody move or delete it.")
@click.option("--unprotect", "action", flag_value="unprotect", help="Lift that.")
@click.option("--delete", "action", flag_value="delete", help="Delete it; its history stays.")
@click.option("--history", metavar="NAME:TAG", help="Show every move, protection and deletion of a tag.")
@click.option("-m", "--message", "why", metavar="WHY", help="Why; kept in the history.")
@common_options
@click.pass_obj
def tag_command(
    options: Options, ref: str | None, tag: str | None, action: str | None, history: str | None, why: str | None
) -> None:
    """Point TAG at version REF; namespace/name alone is its latest version.

    With --protect, a REF that is namespace/name alone protects a tag that is there where it is; otherwise the tag
    moves first. With --unprotect and --delete, a REF that says more than namespace/name must be the version that the
    tag points to.
    """
    if history is not None:
        if ref is not None or action is not None or why is not None:
            raise click.UsageError("--history takes NAME:TAG and nothing else")
        _show_history(options, history)
        return
    if ref is None or tag is None:
        raise click.UsageError("give REF and TAG, or --history NAME:TAG")
    from registry.core.reference import parse_reference

    name = parse_reference(ref).artifact
    with opened(options) as registry:
        before = _history(registry, name, tag)
        _change(registry, ref, name, tag, action, why)
        events = _history(registry, name, tag)
    state = _state(name, tag, events, since=len(before))
    if options.json:
        emit_json(state)
    else:
        emit(_in_words(state))


def _history(registry: Registry, name: str, tag: str) -> list[Event]:
    from registry.core.errors import TagNotFound

    try:
        return registry.tag_history(name, tag)
    except TagNotFound:
        return []


def _change(registry: Registry, ref: str, name: str, tag: str, action: str | None, why: str | None) -> None:
    from registry.core.errors import TagNotFound

    alone = ref.removeprefix("registry://") == name
    expected = None if alone or action not in ("unprotect", "delete") else registry.get(ref).version
    if action == "protect":
        if alone:
            try:
                registry.protect_tag(name, tag, why=why)
                return
            except TagNotFound:
                pass  # then it is made, at the latest version
        registry.tag(ref, tag, why=why, protect=True)
    elif action == "unprotect":
        registry.protect_tag(name, tag, on=False, why=why, expected=expected)
    elif action == "delete":
        registry.delete_tag(name, tag, why=why, expected=expected)
    else:
        registry.tag(ref, tag, why=why)


def _state(name: str, tag: str, events: Sequence[Event], *, since: int) -> dict[str, Any]:
    """Where a tag stands after all its events.

    Args:
        since: how many of them were there before; `previous`, `moved` and `changed` tell of the later ones.
    """
    version: int | None = None
    protected = False
    for event in events:
        if event.kind in ("tag_moved", "tag_deleted"):
            version = event.version if event.kind == "tag_moved" else None
        else:
            protected = event.kind == "tag_protected"
    moves = [event for event in events[since:] if event.kind in ("tag_moved", "tag_deleted")]
    return {
        "name": name,
        "tag": tag,
        "version": version,
        "protected": protected,
        "previous": moves[0].payload.get("from") if moves else version,
        "moved": bool(moves),
        "changed": len(events) > since,
    }


def _in_words(state: dict[str, Any]) -> str:
    pointer = f"{state['name']}:{state['tag']}"
    if state["version"] is None:
        return f"{pointer} is deleted (was @{state['previous']})"
    if state["moved"]:
        said = f" (was @{state['previous']})" if state["previous"] else " (new)"
    else:
        said = "" if state["changed"] else " as before"
    if state["protected"]:
        said += ", protected"
    elif state["changed"] and not state["moved"]:
        said += ", no longer protected"
    return f"{pointer} -> @{state['version']}{said}"


def _show_history(options: Options, pointer: str) -> None:
    from registry.core.errors import InvalidReference
    from registry.core.reference import parse_reference

    parsed = parse_reference(pointer)
    if parsed.tag is None or parsed.moment is not None:
        raise InvalidReference(f"--history {escaped(pointer)}: expected namespace/name:tag")
    with opened(options) as registry:
        events = registry.tag_history(parsed.artifact, parsed.tag)
    from registry.cli.documents import tag_event_document

    documents = [tag_event_document(event) for event in events]
    if options.json:
        emit_json(documents)
        return
    rows = [
        [
            human_time(event.at),
            document["event"],
            f"@{document['from']}" if document["from"] else "-",
            f"@{document['to']}" if document["to"] else "-",
            escaped(event.actor),
            escaped(document["why"] or ""),
        ]
        for event, document in zip(events, documents, strict=True)
    ]
    emit_lines(table_lines(COLUMNS, rows, width()))
