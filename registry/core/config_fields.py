"""Typed reading of a JSON object's keys: each method gives a key's value as one type, or refuses it by an error that
names the key, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from registry.core.errors import InvalidConfig

T = TypeVar("T")
MAX_WHOLE = 2**31 - 1
"""What a column of the catalog holds."""


def kind_of(value: object) -> str:
    """What JSON calls the type of a value, with an article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a flag"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


class _Refused(Exception):
    """The value is not of the expected type."""


class Fields:
    """Reads keys of one document.

    A missing key and null are the same, as they are to PEFT's `Optional` fields.

    Args:
        what: how errors name the document.
        strict: refuse a value of another type; else it counts as missing, for keys that mean different things to
            different tuners.
    """

    def __init__(self, document: Mapping[str, Any], what: str, *, strict: bool = True) -> None:
        self._document = document
        self._what = what
        self._strict = strict

    def text(self, key: str) -> str | None:
        return self._read(key, _text, None, "text")

    def text_or_flag(self, key: str) -> str | None:
        def read(value: object) -> str:
            return str(value).lower() if isinstance(value, bool) else _text(value)

        return self._read(key, read, None, "text or a flag")

    def flag(self, key: str) -> bool:
        return self._read(key, _flag, False, "true or false")

    def whole(self, key: str, *, least: int) -> int | None:
        return self._read(key, lambda value: _whole(value, least), None, f"a whole number from {least} to {MAX_WHOLE}")

    def number(self, key: str) -> float | None:
        return self._read(key, _number, None, "a number")

    def names(self, key: str, *, or_one: bool = False) -> tuple[str, ...]:
        """Sorted, each once; with `or_one` a single text counts as a list of it."""

        def read(value: object) -> tuple[str, ...]:
            return _names([value] if or_one and isinstance(value, str) else value)

        return self._read(key, read, (), "a list of texts or one text" if or_one else "a list of texts")

    def names_or_text(self, key: str) -> tuple[str, ...] | str | None:
        def read(value: object) -> tuple[str, ...] | str:
            return _text(value) if isinstance(value, str) else _names(value)

        return self._read(key, read, None, "a list of texts or one text")

    def ranks(self, key: str) -> dict[str, int]:
        def read(value: object) -> dict[str, int]:
            return {name: _whole(item, 1) for name, item in _object(value).items()}

        return self._read(key, read, {}, f"an object of whole numbers from 1 to {MAX_WHOLE}")

    def numbers(self, key: str) -> dict[str, float]:
        def read(value: object) -> dict[str, float]:
            return {name: _number(item) for name, item in _object(value).items()}

        return self._read(key, read, {}, "an object of numbers")

    def places(self, key: str) -> tuple[int, ...] | None:
        def read(value: object) -> tuple[int, ...]:
            items = value if isinstance(value, list) else [value]
            return tuple(sorted({_whole(item, 0) for item in items}))

        return self._read(key, read, None, "a list of whole numbers or one")

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        def read(value: object) -> tuple[tuple[int, int], ...]:
            found = []
            for pair in _list(value):
                start, end = _two(pair)
                found.append((_whole(start, 0), _whole(end, 0)))
            return tuple(found)

        return self._read(key, read, (), "a list of pairs of whole numbers")

    def tokens(self, key: str) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
        def read(value: object) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
            if isinstance(value, dict):
                return {name: tuple(_whole(item, 0) for item in _list(items)) for name, items in value.items()}
            return tuple(_whole(item, 0) for item in _list(value))

        return self._read(key, read, None, "a list of token numbers, or an object of such lists")

    def _read(self, key: str, read: Callable[[Any], T], missing: T, expected: str) -> T:
        value = self._document.get(key)
        if value is None:
            return missing
        try:
            return read(value)
        except _Refused:
            if not self._strict:
                return missing
            found = f"{kind_of(value)}: {value!r}"[:120]
            raise InvalidConfig(f"{self._what}: key '{key}' must be {expected}, found {found}") from None


def _text(value: object) -> str:
    # PostgreSQL's text has no room for NUL.
    if not isinstance(value, str) or "\0" in value:
        raise _Refused
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Refused
    return value


def _whole(value: object, least: int) -> int:
    if type(value) is not int or not least <= value <= MAX_WHOLE:
        raise _Refused
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused
    try:
        return float(value)
    except OverflowError:
        raise _Refused from None


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise _Refused
    return value


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Refused
    return value


def _names(value: object) -> tuple[str, ...]:
    return tuple(sorted({_text(item) for item in _list(value)}))


def _two(value: object) -> tuple[object, object]:
    if not isinstance(value, list) or len(value) != 2:
        raise _Refused
    return value[0], value[1]
