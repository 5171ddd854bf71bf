"""What a model was built with, as data: the name of its class and the arguments of its constructor. The name is text
for people and for tables that a caller has; nothing here, and nothing that reads it, imports a class by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from registry.core.errors import InvalidInput, InvalidManifest
from registry.core.reference import shown
from registry.core.state_document import read_state, state_document

ROLE = "architecture"
"""The role of its document among what describes a version."""
FORMAT = 1
MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NAME = 512
_MAX_BITS = 64


@dataclass(frozen=True)
class Architecture:
    """Class and constructor arguments of a model, without its adapters.

    Attributes:
        class_name: module and qualified name, like `pdp.modules_v2.TransformerNoiseNet`. Only ever text.
        arguments: by name: None, True, False, integers of at most 64 bits, floats, text, and lists, tuples and dicts
            (with text as keys) of these.
    """

    class_name: str
    arguments: Mapping[str, Any] = field(hash=False)

    def to_bytes(self) -> bytes:
        """Canonical JSON, which `read_architecture` reads; see docs/format.md.

        Raises:
            InvalidInput: an argument that is no such data; names it and says why.
        """
        what = "the architecture"
        _check_name(self.class_name, what)
        arguments = dict(self.arguments)
        _Check().value(arguments, "arguments")
        tree = {"format": FORMAT, "class": self.class_name, "arguments": arguments}
        data = state_document(tree, tensor_name=lambda value: None, what=what)
        if len(data) > MAX_BYTES:
            raise InvalidInput(
                f"{what} has {len(data)} bytes; expected at most {MAX_BYTES}: give data by its name or path"
            )
        return data


def read_architecture(data: bytes, what: str) -> Architecture:
    """Reads what `to_bytes` wrote. Members that are not known are ignored: later programs may add some.

    Args:
        what: names the document in errors.

    Raises:
        InvalidInput: it is none, one of another format, or too large.
    """
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{what} has {len(data)} bytes; expected at most {MAX_BYTES}")
    try:
        tree = read_state(data, {})
    except InvalidManifest as error:
        raise InvalidInput(f"{what} is no architecture: {error}") from error
    if not isinstance(tree, dict) or not {"format", "class", "arguments"} <= tree.keys():
        raise InvalidInput(f"{what} is no architecture: expected format, class and arguments; push the model again")
    if type(tree["format"]) is not int or tree["format"] != FORMAT:
        raise InvalidInput(
            f"{what}: expected format {FORMAT}, found {shown(repr(tree['format']))}; upgrade this program"
        )
    _check_name(tree["class"], what)
    if not isinstance(tree["arguments"], dict):
        raise InvalidInput(f"{what}: the arguments are a {type(tree['arguments']).__name__}; expected them by name")
    _Check().value(tree["arguments"], f"{what}, arguments")
    return Architecture(tree["class"], tree["arguments"])


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise InvalidInput(
            f"{what}: the class is {shown(repr(name))}; expected a name of at most {MAX_NAME} characters"
        )


class _Check:
    """Looks at every argument. What they come to in the document is counted, so that parts that are shared without end
    are refused before they are written out."""

    def __init__(self) -> None:
        self._left = MAX_BYTES

    def value(self, value: object, where: str, depth: int = 0) -> None:
        """
        Raises:
            InvalidInput: it is not what an argument may be.
        """
        if depth > MAX_DEPTH:
            raise InvalidInput(f"{where}: nested over {MAX_DEPTH} deep, or within itself; give flatter data")
        if isinstance(value, Enum):  # one of text or numbers would come back as another value
            raise InvalidInput(f"{where}: a {type(value).__name__} is no plain data; give its value")
        self._count(1 + len(value) if isinstance(value, str) else 1, where)
        if value is None or isinstance(value, bool | float | str):
            return
        if isinstance(value, int):
            if value.bit_length() > _MAX_BITS:
                raise InvalidInput(f"{where}: an integer of {value.bit_length()} bits; expected at most {_MAX_BITS}")
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                self.value(item, f"{where}[{place}]", depth + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise InvalidInput(f"{where}: the key {shown(repr(key))} is no text; name it by one")
                self._count(len(key), where)
                self.value(item, f"{where}[{shown(repr(key))}]", depth + 1)
        else:
            raise InvalidInput(
                f"{where}: a {type(value).__name__} is no plain data; expected None, numbers, text, lists, tuples and "
                "dicts"
            )

    def _count(self, size: int, where: str) -> None:
        self._left -= size
        if self._left < 0:
            raise InvalidInput(
                f"{where}: the architecture is larger than this; expected at most {MAX_BYTES} bytes: give data by its "
                "name or path"
            )
