"""What is different between two versions. The catalog tells which tensors differ (their digests, under canonical
names, so that adapter names and wrappers do not matter); weights are read only of those, and only if asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from registry.catalog.contents import Contents, read_contents
from registry.catalog.versions import resolve
from registry.core.adapter_config import AdapterConfig, canonical_config
from registry.core.reference import parse_reference, shown
from registry.operations.context import Context
from registry.operations.diff_components import changes, compare
from registry.operations.diff_state import state_differences
from registry.operations.difference import ComponentDifference, Difference, FileDifference, ValueDifference
from registry.operations.inspect import Found, found_of
from registry.operations.load import config_of
from registry.operations.reading import BlobReader
from registry.operations.version import as_version

FACTS = ("kind", "base", "peft_version", "message")


@dataclass(frozen=True)
class _Side:
    found: Found
    contents: Contents
    config: AdapterConfig | None

    @property
    def reference(self) -> str:
        return self.found.record.reference

    @property
    def is_adapter(self) -> bool:
        return "adapter" in self.contents.components


def diff(context: Context, a: str, b: str, *, weights: bool = True) -> Difference:
    """Compares two versions; see `Registry.diff`."""
    wanted = [parse_reference(a), parse_reference(b)]
    with context.reading() as connection:
        read = [_read(connection, resolve(connection, reference).id) for reference in wanted]
    with BlobReader(context.store.blobs) as reader:
        one, two = (
            _Side(found, contents, config_of(context.store.blobs, reader, contents)) for found, contents in read
        )
    notes = tuple(_notes(one, two))
    components = tuple(_components(context, one, two, weights=weights))
    return Difference(
        a=as_version(one.found),
        b=as_version(two.found),
        facts=_values(*({name: _fact(side, name) for name in FACTS} for side in (one, two))),
        config=_config(one.config, two.config),
        metadata=_values(*({key: value.plain for key, value in side.found.metadata.items()} for side in (one, two))),
        metrics=_values(*({key: value.json for key, value in side.found.metrics.items()} for side in (one, two))),
        files=tuple(
            FileDifference(path, change, mine, other)
            for path, change, mine, other in changes(
                *({file.path: file for file in side.contents.files} for side in (one, two))
            )
            if mine is None or other is None or mine.sha256 != other.sha256
        ),
        components=components,
        weights=weights,
        notes=notes,
    )


def _read(connection: Connection, version_id: int) -> tuple[Found, Contents]:
    return found_of(connection, [version_id])[0], read_contents(connection, version_id)


def _notes(one: _Side, two: _Side) -> Iterator[str]:
    """What is not compared, and why."""
    roles = [side.contents.components.keys() for side in (one, two)]
    if not roles[0] & roles[1]:
        kinds = (
            f"{side.reference} is of kind {side.found.record.kind} ({', '.join(sorted(of))})"
            for side, of in zip((one, two), roles, strict=True)
        )
        yield f"{' and '.join(kinds)}: they have no component in common, so no tensors are compared"
    for side in (one, two):
        if side.contents.external:
            yield f"{side.reference} is recorded without its bytes, so tensors are compared by their digests alone"
    if not (one.is_adapter and two.is_adapter):
        return
    for side in (one, two):
        if side.config is None:
            yield f"{side.reference} has no configuration, so configurations and modules cannot be compared"
        elif side.config.peft_type != "LORA":
            tuner = shown(side.config.peft_type)
            yield f"{side.reference} is of the tuner {tuner}, whose change to a weight is not known: tensors alone"


def _values(a: Mapping[str, object], b: Mapping[str, object]) -> tuple[ValueDifference, ...]:
    return tuple(ValueDifference(*one) for one in changes(a, b))


def _fact(side: _Side, name: str) -> object:
    return getattr(side.found.record, name)


def _config(a: AdapterConfig | None, b: AdapterConfig | None) -> tuple[ValueDifference, ...]:
    """Keys whose values differ; none where one side has no configuration at all, which is a note."""
    if a is None or b is None:
        return ()
    # Null and no such key are one to PEFT, and every PEFT has other keys.
    found = [{key: value for key, value in canonical_config(one).items() if value is not None} for one in (a, b)]
    # 1 and true are equal to Python and not to PEFT.
    kinds = [{key: (type(value) is bool, value) for key, value in document.items()} for document in found]
    return tuple(
        ValueDifference(key, change, found[0].get(key), found[1].get(key)) for key, change, _, _ in changes(*kinds)
    )


def _components(context: Context, one: _Side, two: _Side, *, weights: bool) -> Iterator[ComponentDifference]:
    mine, others = one.contents.components, two.contents.components
    for role in sorted({*mine, *others}):
        if role not in others:
            yield ComponentDifference(role, "removed", len(mine[role].layout), 0, 0)
            continue
        if role not in mine:
            yield ComponentDifference(role, "added", 0, len(others[role].layout), 0)
            continue
        difference, modules = compare(mine[role], others[role], one.config, two.config)
        difference = replace(
            difference, values=state_differences(context.store.blobs, mine[role].data, others[role].data)
        )
        if weights and difference.change and not (one.contents.external or two.contents.external):
            from registry.operations.diff_weights import measure

            difference = measure(context.store.blobs, mine[role], others[role], difference, modules)
        yield difference
