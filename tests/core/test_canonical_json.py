from __future__ import annotations

from typing import Any

import numpy
import pytest

from registry.core.canonical_json import MAX_INTEGER, canonical_json, parse_json
from registry.core.errors import InvalidInput


@pytest.mark.parametrize("value", [1e16, 1e20, -1e20, 2.0**60, float(2**53), 123456789012345680000.0])
def test_a_large_float_can_be_read_and_written_again(value: float) -> None:
    written = canonical_json(value, "x")
    assert b"." not in written
    assert b"e" not in written
    assert parse_json(written) == value
    assert canonical_json(parse_json(written), "x") == written


@pytest.mark.parametrize("value", [0, 1, -1, MAX_INTEGER, -MAX_INTEGER])
def test_an_integer_within_the_limit_stays_one(value: int) -> None:
    found = parse_json(canonical_json(value, "x"))
    assert (found, type(found)) == (value, int)


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "inf"),
        (2**53, "exceeds"),
        (-(2**53), "exceeds"),
        ("\ud800", "UTF-8"),
        ({"\ud800": 1}, "surrogate"),
        ({1: 2}, "keys must be strings"),
        (b"bytes", "bytes"),
        ({1, 2}, "set"),
        (numpy.float32(1), "float32"),
        (numpy.int64(1), "int64"),
    ],
)
def test_what_json_cannot_hold_is_our_error_and_names_the_document(tree: Any, reason: str) -> None:
    with pytest.raises(InvalidInput, match=f"^the note cannot be written as canonical JSON: .*{reason}"):
        canonical_json({"deep": [tree]} if reason != "keys must be strings" else tree, "the note")


def test_data_nested_too_deeply_is_our_error() -> None:
    tree: list[Any] = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(InvalidInput):
        canonical_json(tree, "x")


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{",
        b"[1,]",
        b'{"a":1,"a":2}',
        b"NaN",
        b"[Infinity]",
        b"1e999",
        b"9" * 400,
        b"9" * 5000,
        b"\xff",
        '"x"'.encode("utf-16"),
        b"\xef\xbb\xbf1",
    ],
)
def test_what_is_no_json_of_doubles_is_not_read(document: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # json's own errors and ours
        parse_json(document)
