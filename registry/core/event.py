"""An event: what is said of a version after or beside its content. Its journal document is a pure
function of these fields, so a database row and a journal object can always be held against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from registry.core.canonical_json import canonical_json, parse_json
from registry.core.digest import sha256_hex

FORMAT = 1


@dataclass(frozen=True)
class Event:
    """One event of one name.

    Attributes:
        seq: 1, 2, 3, ... within the name, without gaps.
        kind: `pushed`, `tag_moved`, `metadata`, `metrics`, ...; docs/format.md has each kind's payload.
        version: number of the version that it is about, if one.
        at: UTC; never before the event with the seq before it.
        payload: plain data, without NaN or Infinity (see `number_to_json`).
    """

    namespace: str
    name: str
    seq: int
    kind: str
    version: int | None
    tag: str | None
    at: datetime
    actor: str
    payload: Mapping[str, Any]

    def document(self, registry_id: str) -> bytes:
        """Canonical JSON for the journal.

        Its member `sha256` is the digest of the rest, so that damage shows without the catalog.

        Raises:
            InvalidInput: canonical JSON cannot hold the payload.
        """
        tree = {
            "format": FORMAT,
            "registry": registry_id,
            "namespace": self.namespace,
            "name": self.name,
            "seq": self.seq,
            "kind": self.kind,
            "version": self.version,
            "tag": self.tag,
            "at": format_moment(self.at),
            "actor": self.actor,
            "payload": dict(self.payload),
        }
        what = f"event {self.seq} of {self.namespace}/{self.name}"
        return canonical_json({**tree, "sha256": sha256_hex(canonical_json(tree, what))}, what)


def payload_text(payload: Mapping[str, Any]) -> str:
    """A payload as the canonical JSON that the catalog keeps.

    Raises:
        InvalidInput: canonical JSON cannot hold it.
    """
    return canonical_json(dict(payload), "an event").decode("utf-8")


def read_payload(text: str) -> dict[str, Any]:
    """Reads what `payload_text` wrote; written again it is the same text."""
    tree: dict[str, Any] = parse_json(text)
    return tree


def format_moment(moment: datetime) -> str:
    """ISO 8601 in UTC with microseconds and a Z, always 27 characters."""
    # Not strftime: its %Y writes the year 900 with three digits.
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def number_to_json(value: float) -> float | int | str:
    """A number for JSON; non-finite ones are the strings `NaN`, `Infinity` and `-Infinity`."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def number_from_json(value: float | str) -> float:
    """The inverse of `number_to_json`."""
    return float(value)
