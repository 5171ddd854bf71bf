"""What the events of one version say, read as strictly as they are written: where its bytes lie, what describes it, and
what was said of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from registry.core.annotations import (
    MAX_TEXT,
    MetadataValue,
    check_key,
    check_step,
    check_text,
    read_metrics,
)
from registry.core.digest import is_digest
from registry.core.errors import Corrupt, RegistryError
from registry.core.event import Event, number_from_json
from registry.core.manifest import Manifest
from registry.core.reference import shown
from registry.formats.source import Said

HISTORY = "history"
"""Role of the blob with the journal documents that an imported version had where it came from."""
_ROLE = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_TEXTS = ("python_version", "torch_version", "peft_version", "transformers_version", "platform", "git_commit")


@dataclass(frozen=True)
class Past:
    """What the events of one version say.

    Attributes:
        documents: all of them, in the order of their seq.
        placement: where its bytes lie, as the newest event that says so has it; plain data, still to be checked.
        content: its content digest.
        base, parents: references in the registry that it is of.
        described: digests of the blobs beside it, the newest of each role.
        all_described: those of older ones too.
        said: metadata, metrics and notes, oldest first.
        nonfinite: positions of tensors with NaN or Inf, by component.
    """

    documents: tuple[bytes, ...]
    placement: Any
    content: str
    base: str | None
    parents: tuple[str, ...]
    environment: Mapping[str, object]
    peft_version: str | None
    message: str | None
    nonfinite: Mapping[str, Sequence[int]]
    origin: Mapping[str, str]
    described: Mapping[str, str]
    all_described: frozenset[str]
    said: tuple[Said, ...]


def past_of(events: Sequence[tuple[Event, bytes]], manifest: Manifest, reference: str) -> Past:
    """What the events of a version say.

    Args:
        events: in the order of their seq, with their documents.

    Raises:
        Corrupt: one of them does not say what its kind has to say, or contradicts the manifest.
    """
    if [event.kind for event, _ in events].count("pushed") != 1 or events[0][0].kind != "pushed":
        raise Corrupt(f"{reference}: expected one event `pushed`, and that before all others")
    pushed = events[0][0].payload
    described: dict[str, str] = {}
    every: set[str] = set()
    said: list[Said] = []
    placement = None
    for event, _ in events:
        try:
            if event.kind in ("pushed", "restored"):
                placement = event.payload.get("placement", placement)
            if event.kind == "described":
                named = {_role(role): _digest(digest) for role, digest in event.payload["blobs"].items()}
                described.update(named)
                every.update(named.values())
            elif (one := _said(event)) is not None:
                said.append(one)
        except (RegistryError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(event, error) from error
    try:
        if pushed["manifest"] != manifest.digest:
            raise ValueError(f"its manifest is {manifest.digest}")
        return Past(
            documents=tuple(document for _, document in events),
            placement=placement,
            content=_digest(pushed["content"]),
            base=_text(pushed["base"]),
            parents=tuple(str(_text(one)) for one in pushed["parents"]),
            environment=_environment(pushed["environment"]),
            peft_version=_text(pushed["peft_version"]),
            message=None if pushed["message"] is None else check_text(pushed["message"], "message"),
            nonfinite=_nonfinite(pushed.get("nonfinite") or {}, manifest),
            origin={_key(key): str(_text(value)) for key, value in (pushed.get("origin") or {}).items()},
            described=described,
            all_described=frozenset(every),
            said=tuple(said),
        )
    except (RegistryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(events[0][0], error) from error


def _unreadable(event: Event, error: Exception) -> Corrupt:
    what = f"event {event.seq} of {event.namespace}/{event.name} ({event.kind})"
    return Corrupt(f"{what} cannot be read: {shown(f'{type(error).__name__}: {error}', 200)}")


def _said(event: Event) -> Said | None:
    payload = event.payload
    if event.kind == "metadata":
        return Said(metadata={check_key(key, "metadata"): _metadata(value) for key, value in payload.items()})
    if event.kind == "metrics":
        values = read_metrics({key: number_from_json(value) for key, value in payload["values"].items()})
        return Said(metrics=values, step=check_step(payload["step"]))
    if event.kind == "note":
        return Said(note=check_text(payload["text"], "note"))
    return None


def _metadata(value: Mapping[str, Any]) -> MetadataValue:
    text, number = check_text(value["text"], "metadata", MAX_TEXT), value["number"]
    if number is None:
        return MetadataValue(text, None)
    if type(number) not in (int, float) or float(text) != number:
        raise ValueError(f"the number {number!r} is not that of its text")
    return MetadataValue(text, float(number))


def _role(role: str) -> str:
    if not _ROLE.fullmatch(role):
        raise ValueError(f"role {role!r}")
    return role


def _digest(digest: object) -> str:
    if not is_digest(digest):
        raise ValueError(f"digest {digest!r}")
    return str(digest)


def _text(value: object) -> str | None:
    return None if value is None else check_text(value, "a text", 4096)


def _key(key: str) -> str:
    return check_key(key, "a key")


def _environment(tree: Mapping[str, Any]) -> dict[str, object]:
    for key, value in tree.items():
        _key(key)
        if type(value) is str:
            check_text(value, key, MAX_TEXT)
        if not (
            value is None
            or (type(value) is bool and key not in _TEXTS)
            or (type(value) in (str, int, float) and key != "git_dirty" and (key not in _TEXTS or type(value) is str))
        ):
            raise TypeError(f"environment {key}: {value!r}")
    return dict(tree)


def _nonfinite(tree: Mapping[str, Iterable[int]], manifest: Manifest) -> dict[str, list[int]]:
    lengths = {part.role: len(part.tensors) for part in manifest.components}
    found = {role: list(positions) for role, positions in tree.items()}
    for role, positions in found.items():
        if any(type(one) is not int or not 0 <= one < lengths[role] for one in positions):
            raise ValueError(f"nonfinite tensors of the {role} that are not there")
    return found
