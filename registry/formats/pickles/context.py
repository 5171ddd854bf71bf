"""What a function that rebuilds values of one pickle may know: where it stands, what is left of the limits,
and how to refuse. It has no way to call anything by name."""

from __future__ import annotations

import re
from collections.abc import Callable

from registry.core.errors import InvalidInput, MalformedTensors, UnsafePickle, UnsupportedTensor
from registry.core.reference import shown
from registry.formats.pickles.limits import Budget
from registry.formats.pickles.values import OpaqueGlobal

SAVE_AGAIN = "save it again as safetensors, or as plain data and tensors that torch.load(weights_only=True) reads"
DAMAGED = "the file is damaged: copy or download it again, or save it again"

_SMALL = 2**60
_MOST_IN_A_KEY = 64


class Context:
    """One pickle that is being read.

    Attributes:
        what: names the file in errors.
        budget: shared with every pickle inside it.
        at: byte in the file of the instruction that runs.
        nested: how many pickles lie around this one.
        read_bytes: reads a pickle or torch file that is nested in this one, and gives its tree.
        fillings: what happens when the pickle has ended, in this order.
    """

    def __init__(self, what: str, budget: Budget, nested: int, read_bytes: Callable[[bytes, Context], object]) -> None:
        self.what = what
        self.budget = budget
        self.at = 0
        self.nested = nested
        self.read_bytes = read_bytes
        self.fillings: list[Callable[[], None]] = []

    def invalid(self, expected: str, found: str, mend: str = DAMAGED) -> InvalidInput:
        """The file is no pickle that can be read."""
        return InvalidInput(f"{self.what}: expected {expected}, found {found} at byte {self.at}; {mend}")

    def malformed(self, expected: str, found: str) -> MalformedTensors:
        """A tensor that does not fit its storage, or is no tensor at all."""
        return MalformedTensors(f"{self.what}: expected {expected}, found {found} at byte {self.at}; {DAMAGED}")

    def unsupported(self, found: str, mend: str) -> UnsupportedTensor:
        """A tensor that is fine, but that safetensors cannot hold."""
        return UnsupportedTensor(f"{self.what}: {found} at byte {self.at}; {mend}")

    def unsafe(self, name: str, how: str = "calls") -> UnsafePickle:
        """Something would be called that is not on the short list."""
        return UnsafePickle(
            f"{self.what}: the pickle {how} {name} at byte {self.at}, which is not on the short list of known "
            f"functions; nothing was run; {SAVE_AGAIN}"
        )

    def key(self, value: object) -> object:
        """A value that may be a key: its hash is cheap, and looks at nothing that comes from outside.

        Raises:
            InvalidInput: it is a container, or there are too many of a kind that makes a dict slow.
        """
        kind = type(value)
        if kind is str or kind is bytes or kind is bool or value is None:
            return value
        if kind is int:
            assert isinstance(value, int)
            if not -_SMALL < value < _SMALL:
                self.budget.spend_odd_key()
            return value
        if kind in (float, OpaqueGlobal):
            return value
        self.budget.spend_odd_key()
        waiting, seen = [value], 0
        while waiting:
            part = waiting.pop()
            seen += 1
            if isinstance(part, tuple | frozenset) and len(part) <= _MOST_IN_A_KEY and seen <= _MOST_IN_A_KEY:
                waiting.extend(part)
            elif isinstance(part, tuple | frozenset) or part.__hash__ is None:
                raise self.invalid("a key that is text or a number", f"a {type(part).__name__}")
        return value


def described(value: object) -> str:
    """A value from a pickle in a few words, whatever it is."""
    if isinstance(value, OpaqueGlobal):
        return shown(str(value))
    if isinstance(value, str):
        return f"the text '{shown(value)}'"
    if isinstance(value, bool | float) or value is None:
        return str(value)
    if isinstance(value, int):
        return str(value) if -_SMALL < value < _SMALL else f"an integer of {value.bit_length()} bits"
    if isinstance(value, tuple | list | dict | set | frozenset | bytes):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


_INTEGER = re.compile(r"[-+]?[0-9]{1,1200}", re.ASCII)


def parse_integer(text: str, limit_bytes: int) -> int | None:
    """A decimal integer of at most so many bytes; None: it is none."""
    if not _INTEGER.fullmatch(text) or len(text) > 1 + limit_bytes * 2.4:
        return None
    return int(text)
