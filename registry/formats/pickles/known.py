"""What an entry of the short list looks like, and the checks of arguments that its functions share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from registry.core.canonical_json import MAX_INTEGER
from registry.formats.pickles.context import Context, described

Rebuild = Callable[[Context, tuple[object, ...]], object]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Known:
    """A global that we know.

    Attributes:
        rebuild: gives the value of a call with these arguments; None: it may be named, not called.
        is_class: whether it may be instantiated as well.
    """

    rebuild: Rebuild | None = None
    is_class: bool = False


def words(text: str) -> frozenset[str]:
    """Names of a list that is easier to read without quotes and commas."""
    return frozenset(text.split())


def only(context: Context, arguments: tuple[object, ...], kind: type[T], function: str) -> T:
    """The one argument, of exactly this type.

    Raises:
        InvalidInput
    """
    if len(arguments) != 1 or type(arguments[0]) is not kind:
        found = ", ".join(map(described, arguments[:4])) or "none"
        raise context.invalid(f"a {kind.__name__} for {function}", found)
    value = arguments[0]
    assert isinstance(value, kind)
    return value


def is_size(value: object) -> bool:
    """A whole number that a safetensors header could hold; True is none."""
    return type(value) is int and isinstance(value, int) and 0 <= value <= MAX_INTEGER
