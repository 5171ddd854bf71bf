from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from registry.core.canonical_json import canonical_json, parse_json
from registry.core.digest import sha256_hex
from registry.core.errors import Corrupt, DigestMismatch
from registry.core.event import Event
from registry.core.journal_document import read_event

ID = "0123456789abcdef" * 2
AT = datetime(2026, 11, 1, 12, 0, 7, 5, UTC)
EVENT = Event("walk", "perturb", 3, "metrics", 1, None, AT, "ada", {"values": {"x": "NaN"}, "step": 1e20})


def with_sound_digest(**changed: Any) -> bytes:
    tree = parse_json(EVENT.document(ID)) | changed
    del tree["sha256"]
    return canonical_json({**tree, "sha256": sha256_hex(canonical_json(tree, "x"))}, "x")


def test_reading_is_the_inverse_of_writing() -> None:
    assert read_event(EVENT.document(ID), "x") == (ID, EVENT)


def test_a_digest_that_is_not_its_own_is_told() -> None:
    with pytest.raises(DigestMismatch, match="the event: expected digest"):
        read_event(EVENT.document(ID).replace(b'"ada"', b'"bob"'), "the event")


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        EVENT.document(ID) + b" ",
        with_sound_digest(more=1),
        with_sound_digest(format=2),
        with_sound_digest(registry="x"),
        with_sound_digest(kind="other"),
        with_sound_digest(seq=0),
        with_sound_digest(seq=True),
        with_sound_digest(version="1"),
        with_sound_digest(tag=1),
        with_sound_digest(actor=None),
        with_sound_digest(payload=[]),
        with_sound_digest(name=".."),
        with_sound_digest(name="a/b"),
        with_sound_digest(at="2026-11-01T12:00:07Z"),
        with_sound_digest(at="2026-11-01T12:00:07.000005+00:00"),
        with_sound_digest(at="0001-01-01T00:00:00.000000+14:00"),
        with_sound_digest(at="yesterday"),
    ],
)
def test_what_is_no_event_is_refused(document: bytes) -> None:
    with pytest.raises(Corrupt):
        read_event(document, "x")
