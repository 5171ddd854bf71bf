"""Reading journal documents: the inverse of `Event.document`, byte for byte, as strict as docs/format.md asks of a
reader."""

from __future__ import annotations

import re
from datetime import datetime

from registry.core.canonical_json import MAX_INTEGER, parse_json
from registry.core.errors import Corrupt, DigestMismatch, RegistryError
from registry.core.event import FORMAT, Event
from registry.core.reference import parse_artifact, shown

KINDS = (
    *("pushed", "described", "tag_moved", "tag_protected", "tag_unprotected", "tag_deleted"),
    *("metadata", "metrics", "note", "removed", "restored", "purged"),
)
_REGISTRY_ID = re.compile(r"[0-9a-f]{32}")


def read_event(document: bytes, what: str) -> tuple[str, Event]:
    """The registry's id and the event of a journal document. What the payload says is a matter of the kind and is not
    looked at.

    Args:
        what: names the document in errors.

    Raises:
        DigestMismatch: its `sha256` is not that of the rest.
        Corrupt: not canonical, other members, another format, an unknown kind, or a member of the wrong type.
    """
    try:
        tree = parse_json(document)
        if tree["format"] != FORMAT:
            raise Corrupt(f"{what}: event format {shown(repr(tree['format']))}; this program reads format {FORMAT}")
        registry, kind, version, tag = tree["registry"], tree["kind"], tree["version"], tree["tag"]
        if not isinstance(registry, str) or not _REGISTRY_ID.fullmatch(registry):
            raise ValueError("registry is no id of 32 hex digits")
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}")
        if not _is_number(tree["seq"]) or not (version is None or _is_number(version)):
            raise ValueError("seq and version are numbers from 1")
        if not (tag is None or isinstance(tag, str)) or not isinstance(tree["actor"], str):
            raise ValueError("tag and actor are texts")
        if not isinstance(tree["payload"], dict):
            raise ValueError("payload is no object")
        namespace, name = parse_artifact(f"{tree['namespace']}/{tree['name']}")
        event = Event(
            namespace,
            name,
            tree["seq"],
            kind,
            version,
            tag,
            datetime.fromisoformat(tree["at"]),
            tree["actor"],
            tree["payload"],
        )
        again = event.document(registry)
    except Corrupt:
        raise
    except (RegistryError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Corrupt(f"{what} is no event: {shown(f'{type(error).__name__}: {error}', 200)}") from error
    if again != document:
        expected, found = parse_json(again)["sha256"], tree.get("sha256")
        if found != expected:
            raise DigestMismatch(what, expected=shown(str(found), 80), actual=expected)
        raise Corrupt(f"{what} is not in canonical form (RFC 8785), or has unknown members")
    return registry, event


def _is_number(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_INTEGER
