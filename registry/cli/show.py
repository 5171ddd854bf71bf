"""`registry show`: one version in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

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
    human_time,
    message,
    paint,
    width,
)
from registry.cli.table import Column, fold, table_lines
from registry.core.errors import BlobNotFound, Corrupt

if TYPE_CHECKING:
    from registry.core.architecture import Architecture
    from registry.core.event import Event
    from registry.operations.inspect import Details

INDENT = "  "
KEY_WIDTH = 9
"""With a key of it, a digest ends at column 80."""
MOST_EVENTS = 20


@click.command(
    name="show",
    cls=Command,
    short_help="Show all that is known of a version.",
    examples=["registry show walk/perturb:prod --tensors"],
)
@click.argument("ref")
@click.option("--tensors", is_flag=True, help="Also name every tensor, with dtype and shape.")
@common_options
@click.pass_obj
def show_command(options: Options, ref: str, tensors: bool) -> None:
    """Show all that is known of version REF."""
    with opened(options) as registry:
        details = registry.show(ref)
        try:
            architecture = registry.architecture(details.found.record.reference)
        except (BlobNotFound, Corrupt) as error:  # all else is in the catalog, and wanted the more
            architecture = None
            message(f"the architecture cannot be read: {error}", YELLOW)
    if options.json:
        from registry.cli.documents import details_document

        emit_json(details_document(details, architecture, tensors=tensors))
        return
    emit_lines(_page(details, architecture, tensors=tensors, columns=width()))


def _page(details: Details, architecture: Architecture | None, *, tensors: bool, columns: int | None) -> Iterator[str]:
    title = details.found.record.reference
    yield from (paint(line, BOLD) for line in ([title] if columns is None else fold(title, columns)))
    yield from _pairs(list(_facts(details, architecture)), columns)
    found = details.found
    yield from _section("Metadata", ((key, value.text) for key, value in found.metadata.items()), columns)
    yield from _section("Metrics", ((key, _metric(value.json)) for key, value in found.metrics.items()), columns)
    files = ((file.path, human_size(file.size)) for file in details.contents.files)
    yield from _section("Files", files, columns)
    yield from _components(details, tensors=tensors, columns=columns)
    if details.findings:
        yield from ("", paint("Findings", BOLD))
        for finding in details.findings:
            yield from (paint(line, YELLOW) for line in _indented(escaped(str(finding)), columns))
    yield from _history(details.events, columns)


def _facts(details: Details, architecture: Architecture | None) -> Iterator[tuple[str, str]]:
    record = details.found.record
    yield "kind", record.kind
    if record.tags:
        yield "tags", ", ".join(record.tags)
    yield "digest", f"sha256:{record.digest}"
    yield "content", f"sha256:{record.content_digest}"
    if record.base is not None:
        yield "base", record.base
    if record.base_model is not None:
        yield "model", f"{record.base_model} (as the adapter says)"
    if record.kind == "adapter" or record.peft_type is not None:
        yield from _adapter_facts(record)
    if architecture is not None:
        arguments = ", ".join(f"{name}={value!r}" for name, value in architecture.arguments.items())
        yield "class", f"{architecture.class_name}({arguments})"
    yield "size", f"{human_size(record.size)}; its push added {human_size(record.bytes_new)} to the store"
    yield "created", f"{human_time(record.created_at, seconds=True)} by {record.created_by}"
    pushed = next((event.payload for event in details.events if event.kind == "pushed"), {})
    origin = pushed.get("origin")
    if origin:
        yield "from", ", ".join(value if key == "path" else f"{key} {value}" for key, value in origin.items())
    if details.contents.external:
        yield "external", "its tensors are not in the store"
    described = [role for event in details.events if event.kind == "described" for role in event.payload["blobs"]]
    if described:
        yield "beside", ", ".join(dict.fromkeys(described))
    versions = _environment(pushed.get("environment", {}))
    if versions:
        yield "python", versions
    if record.git_commit is not None:
        yield "git", f"{record.git_commit}{', with changes that are not in it' if record.git_dirty else ''}"
    if record.message:
        yield "message", record.message


def _adapter_facts(record: Any) -> Iterator[tuple[str, str]]:
    settings = [
        f"{name} {human_number(value)}"
        for name, value in (("r", record.r), ("lora_alpha", record.lora_alpha), ("lora_dropout", record.lora_dropout))
        if value is not None
    ]
    settings += [name for name in ("use_rslora", "use_dora") if getattr(record, name)]
    unknown = "configuration unknown" if record.peft_type is None else record.peft_type
    yield "adapter", ", ".join((unknown, *settings))
    if record.target_modules is not None:
        targets = record.target_modules
        yield "targets", targets if isinstance(targets, str) else ", ".join(targets)
    yield "peft", record.peft_version or "unknown"


def _environment(environment: dict[str, Any]) -> str:
    named = (("", "python_version"), ("torch", "torch_version"), ("peft", "peft_version"))
    return ", ".join(f"{name} {environment[key]}".strip() for name, key in named if environment.get(key))


def _components(details: Details, *, tensors: bool, columns: int | None) -> Iterator[str]:
    for component in details.contents.components.values():
        layout = component.layout
        yield ""
        more = ", and values beside them" if component.data is not None else ""
        yield paint("Tensors", BOLD) + f" of {component.role}: {len(layout)}, {layout.parameters:,} parameters{more}"
        if tensors:
            header = (Column("NAME", least=30), Column("DTYPE"), Column("SHAPE", right=True))
            rows = [[escaped(spec.name), spec.dtype, " x ".join(map(str, spec.shape)) or "scalar"] for spec in layout]
            room = None if columns is None else columns - len(INDENT)
            yield from (INDENT + line for line in table_lines(header, rows, room))


def _history(events: Sequence[Event], columns: int | None) -> Iterator[str]:
    """What was said after the push; the newest where it is much."""
    later = [event for event in events if event.kind != "pushed"]
    if not later:
        return
    yield from ("", paint("History", BOLD))
    if len(later) > MOST_EVENTS:
        yield f"{INDENT}{len(later) - MOST_EVENTS} earlier events are in --json"
    for event in later[-MOST_EVENTS:]:
        line = f"{human_time(event.at)}  {escaped(_in_words(event))}  ({escaped(event.actor)})"
        yield from _indented(line, columns)


def _in_words(event: Event) -> str:
    payload = event.payload
    if event.kind == "metadata":
        return "metadata " + ", ".join(f"{key}={value['text']}" for key, value in payload.items())
    if event.kind == "metrics":
        step = "" if payload.get("step") is None else f" at step {payload['step']}"
        return "metrics " + ", ".join(f"{key}={_metric(value)}" for key, value in payload["values"].items()) + step
    why = f": {payload['why']}" if payload.get("why") else ""
    if event.tag is not None:
        came = f"moved here (from @{payload['from']})" if payload.get("from") else "set here"
        done = came if event.kind == "tag_moved" else event.kind.removeprefix("tag_")
        return f"tag {event.tag} {done}{why}"
    return f"{event.kind} {payload['text']}" if payload.get("text") else f"{event.kind}{why}"


def _metric(value: float | str) -> str:
    return value if isinstance(value, str) else human_number(value)


def _section(title: str, pairs: Iterator[tuple[str, str]], columns: int | None) -> Iterator[str]:
    listed = list(pairs)
    if listed:
        yield from ("", paint(title, BOLD))
        yield from _pairs(listed, columns, indent=INDENT)


def _pairs(pairs: Sequence[tuple[str, str]], columns: int | None, *, indent: str = "") -> Iterator[str]:
    """Keys and values below each other; a long value goes on below itself."""
    wide = max(KEY_WIDTH, *(len(key) + 2 for key, _ in pairs)) if not indent else 2 + max(len(key) for key, _ in pairs)
    for key, value in pairs:
        room = None if columns is None else max(columns - len(indent) - wide, 20)
        lines = [escaped(value)] if room is None else fold(escaped(value), room)
        for index, line in enumerate(lines):
            yield f"{indent}{key if index == 0 else '':{wide}}{line}".rstrip()


def _indented(text: str, columns: int | None) -> Iterator[str]:
    room = None if columns is None else max(columns - 2 * len(INDENT), 20)
    for index, line in enumerate([text] if room is None else fold(text, room)):
        yield f"{INDENT if index == 0 else 2 * INDENT}{line}"
