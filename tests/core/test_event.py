from __future__ import annotations

import dataclasses
import json
import math
from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256
from typing import Any

import pytest

from registry.core.errors import InvalidInput
from registry.core.event import Event, format_moment, number_from_json, number_to_json, payload_text, read_payload

ID = "0" * 32
AT = datetime(2026, 11, 1, 12, 30, 15, 250, tzinfo=UTC)
EVENT = Event("walk", "perturb", 3, "metrics", 2, None, AT, "ada", {"values": {"x": 1.5, "y": "NaN"}, "step": 7})


def test_the_document_is_canonical_json_of_all_fields() -> None:
    document = EVENT.document(ID)
    tree = json.loads(document)
    digest = tree.pop("sha256")
    assert tree == {
        "format": 1,
        "registry": ID,
        "namespace": "walk",
        "name": "perturb",
        "seq": 3,
        "kind": "metrics",
        "version": 2,
        "tag": None,
        "at": "2026-11-01T12:30:15.000250Z",
        "actor": "ada",
        "payload": {"values": {"x": 1.5, "y": "NaN"}, "step": 7},
    }
    assert sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest() == digest
    # "sha256" sorts between "seq" and "tag": cutting it out leaves the bytes that it is the digest of.
    assert sha256(document.replace(f'"sha256":"{digest}",'.encode(), b"")).hexdigest() == digest


def test_the_document_does_not_depend_on_the_order_of_the_payload() -> None:
    turned = dataclasses.replace(EVENT, payload={"step": 7, "values": {"y": "NaN", "x": 1.5}})
    assert turned.document(ID) == EVENT.document(ID)


def test_every_field_changes_the_document() -> None:
    others: list[dict[str, Any]] = [
        {"namespace": "w"},
        {"name": "p"},
        {"seq": 4},
        {"kind": "note"},
        {"version": None},
        {"tag": "prod"},
        {"at": AT + timedelta(microseconds=1)},
        {"actor": "eve"},
        {"payload": {}},
    ]
    documents = {dataclasses.replace(EVENT, **one).document(ID) for one in others}
    assert len(documents | {EVENT.document(ID), EVENT.document("1" * 32)}) == len(others) + 2


@pytest.mark.parametrize(
    "payload",
    [
        {"number": 1e20, "text": "1e+20"},
        {"number": 2.0**60, "text": str(2**60)},
        {"number": -1e16},
        {"number": 3.0},
        {"number": -0.0},
        {"text": "\x00\u2028\x7f😀"},
        {"😀": 1, "\uffff": 2, "": None},
        {"deep": [[{"a": [True, None]}]]},
    ],
)
def test_a_row_that_was_read_back_gives_the_same_document(payload: dict[str, Any]) -> None:
    event = dataclasses.replace(EVENT, payload=payload)
    text = payload_text(event.payload)
    again = dataclasses.replace(event, payload=read_payload(text))
    assert again.document(ID) == event.document(ID)
    assert payload_text(again.payload) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, "\ud800", {1}, b"x"])
def test_a_payload_that_json_cannot_hold_is_refused_and_names_the_event(value: object) -> None:
    with pytest.raises(InvalidInput, match=r"^event 3 of walk/perturb cannot be written"):
        dataclasses.replace(EVENT, payload={"x": value}).document(ID)
    with pytest.raises(InvalidInput, match=r"^an event cannot be written"):
        payload_text({"x": value})


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (AT, "2026-11-01T12:30:15.000250Z"),
        (datetime(2026, 11, 1, tzinfo=UTC), "2026-11-01T00:00:00.000000Z"),
        (datetime(2026, 11, 1, 1, tzinfo=timezone(timedelta(hours=2))), "2026-10-31T23:00:00.000000Z"),
        (datetime(900, 1, 1, tzinfo=UTC), "0900-01-01T00:00:00.000000Z"),
        (datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_a_time_is_written_in_utc_always_in_27_characters(moment: datetime, text: str) -> None:
    assert format_moment(moment) == text
    assert len(text) == 27
    assert datetime.fromisoformat(text) == moment


def test_later_times_sort_after_earlier_ones_as_text() -> None:
    moments = [datetime(1, 1, 1, tzinfo=UTC), datetime(999, 1, 1, tzinfo=UTC), AT, AT + timedelta(microseconds=1)]
    texts = [format_moment(moment) for moment in moments]
    assert texts == sorted(texts)


@pytest.mark.parametrize("value", [0.0, 1.5, -1e300, 5e-324, math.inf, -math.inf])
def test_numbers_come_back_from_json(value: float) -> None:
    assert number_from_json(number_to_json(value)) == value


def test_nan_comes_back_from_json() -> None:
    assert number_to_json(math.nan) == "NaN"
    assert math.isnan(number_from_json("NaN"))
