"""Architectures: arguments come back as they were, and what is no plain data is refused by its place."""

from __future__ import annotations

import enum
import json
from typing import Any

import pytest

from registry.core.architecture import MAX_BYTES, Architecture, read_architecture
from registry.core.errors import InvalidInput

ARGUMENTS: dict[str, Any] = {
    "n_head": 4,
    "dropout": 0.0,
    "scale": 16.5,
    "kernel": (3, 3),
    "causal": True,
    "name": "é $x",
    "nothing": None,
    "nested": {"$a": [1.0, -0.0, 2**60], "b": [{}]},
}


def test_arguments_come_back_with_their_types() -> None:
    found = read_architecture(Architecture("pdp.Net", ARGUMENTS).to_bytes(), "it")
    assert (found.class_name, repr(sorted(found.arguments.items()))) == ("pdp.Net", repr(sorted(ARGUMENTS.items())))


def test_equal_architectures_have_equal_bytes_whatever_their_order() -> None:
    turned = dict(reversed(ARGUMENTS.items()))
    assert Architecture("a.B", turned).to_bytes() == Architecture("a.B", ARGUMENTS).to_bytes()


def test_the_document_is_that_of_the_format_page() -> None:
    data = Architecture("a.B", {"n": 4, "p": 0.0}).to_bytes()
    assert data == b'{"arguments":{"n":4,"p":{"$float":"0.0"}},"class":"a.B","format":1}'


class Mode(enum.StrEnum):
    FAST = "fast"


def looped() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), r"arguments\['x'\]: a object is no plain data"),
        ([1, {"y": {1}}], r"arguments\['x'\]\[1\]\['y'\]: a set is no plain data"),
        (Mode.FAST, "a Mode is no plain data; give its value"),
        (b"bytes", "a bytes is no plain data"),
        ({1: 2}, "the key 1 is no text"),
        (2**70, "an integer of 71 bits"),
        (looped(), "nested over 32 deep"),
        ("x" * MAX_BYTES, "expected at most 1048576"),
        ("\ud800", "cannot be written as canonical JSON"),
    ],
)
def test_what_is_no_argument_is_refused(value: object, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        Architecture("a.B", {"x": value}).to_bytes()


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 513])
def test_what_is_no_name_of_a_class_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="expected a name of at most 512 characters"):
        Architecture(name, {}).to_bytes()


def document(**members: Any) -> bytes:
    whole = {"format": 1, "class": "a.B", "arguments": {}, **members}
    return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is no architecture"),
        (b"{", "is no architecture"),
        (b"[]", "expected format, class and arguments"),
        (b'{"arguments":{},"class":"a.B"}', "expected format, class and arguments"),
        (document(format=2), "expected format 1, found 2; upgrade"),
        (document(format=True), "expected format 1, found True"),
        (document(**{"class": 3}), "the class is 3"),
        (document(arguments=[]), "the arguments are a list"),
        (document(arguments={"x": {"$bytes": "AAAA"}}), "a bytes is no plain data"),
        (document(arguments={"x": {"$tensor": "w"}}), "KeyError"),
        (document(arguments={"x": {"$opaque": "os.system", "arguments": [], "state": None}}), "a Inert is no plain"),
        (document(arguments={"x": {"$dict": [[1, 2]]}}), "the key 1 is no text"),
        (document() + b" ", "canonical"),
        (b" " * (MAX_BYTES + 1), "expected at most"),
        (b"[" * 100_000, "is no architecture"),
    ],
)
def test_what_is_no_architecture_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        read_architecture(data, "the thing")


def test_members_of_later_programs_are_ignored() -> None:
    later = document(modules=[["q", "Linear"]], source="ab12")
    assert read_architecture(later, "it") == Architecture("a.B", {})
