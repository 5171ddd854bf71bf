"""State documents: what a state dict holds beside tensors, as canonical JSON. An optimizer's `param_groups`, a
scheduler's counters and a configuration come back as they were, but that the text keys of a dict are sorted; tensors
stand in the component, under their names here.

| in Python | in the document |
|---|---|
| None, True, text, finite numbers up to 2**53 - 1 | themselves |
| a list | a list |
| a dict with text as keys, none of which begins with `$` | an object |
| any other dict | `{"$dict": [[key, value], ...]}` |
| a tuple, set, frozenset | `{"$tuple": [...]}`, `{"$set": [...]}` (sorted), `{"$frozenset": [...]}` |
| bytes | `{"$bytes": base64}` |
| NaN, Infinity, an integral float, complex | `{"$float": text}`, `{"$complex": [re, im]}` |
| larger integers | `{"$int": hexadecimal text}` |
| a tensor | `{"$tensor": its name in the component}` |
| an instance of a class that is not rebuilt | `{"$opaque": class, "arguments": ..., "state": ...}` |
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Mapping
from typing import Any

from registry.core.canonical_json import MAX_INTEGER, canonical_json, parse_json
from registry.core.errors import InvalidInput, InvalidManifest

MAX_DEPTH = 200
"""Deeper than anything that people train with, and far below Python's own limit."""


class Inert:
    """An instance of a class that nobody rebuilds: its name and what it was made of, as plain data."""

    def __init__(self, name: str, arguments: Any = (), state: Any = None) -> None:
        self.name = name
        self.arguments = arguments
        self.state = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inert) and (self.name, self.arguments, self.state) == (
            other.name,
            other.arguments,
            other.state,
        )

    def __repr__(self) -> str:
        return f"Inert({self.name!r})"


def state_document(tree: Any, *, tensor_name: Callable[[Any], str | None], what: str = "the state") -> bytes:
    """The document of a tree.

    Args:
        tensor_name: the name of a value that is a tensor, None for others. It is asked about every value that is not
            plain, so it may collect them as well.
        what: names the tree in errors.

    Raises:
        InvalidInput: a value that has no form here (says where it is), a cycle, or data nested too deeply.
    """
    return canonical_json(_encode(tree, tensor_name, what, 0), what)


def read_state(document: bytes, tensors: Mapping[str, Any]) -> Any:
    """Reads what `state_document` wrote, with these tensors in their places.

    Raises:
        InvalidManifest: not such a document, or it names a tensor that is not there.
    """
    try:
        tree = parse_json(document)
        found = _decode(tree, tensors, 0)
        if canonical_json(tree, "a state document") != document:
            raise InvalidManifest("a state document is not in canonical form (RFC 8785)")
        return found
    except InvalidManifest:
        raise
    except (ValueError, TypeError, LookupError, RecursionError, binascii.Error) as error:
        raise InvalidManifest(f"not a state document: {type(error).__name__}: {error}"[:200]) from error


def _encode(value: Any, tensor_name: Callable[[Any], str | None], where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise InvalidInput(f"{where}: nested over {MAX_DEPTH} deep; save less of it")

    def inner(item: Any, key: object) -> Any:
        return _encode(item, tensor_name, f"{where}[{key!r}]" if depth < 8 else where, depth + 1)

    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value) if abs(value) <= MAX_INTEGER else {"$int": format(int(value), "x")}
    if isinstance(value, float):
        return _encode_float(float(value))
    if isinstance(value, complex):
        return {"$complex": [_encode_float(value.real), _encode_float(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {str(key): inner(item, key) for key, item in value.items()}
        return {"$dict": [[inner(key, "key"), inner(item, key)] for key, item in value.items()]}
    if isinstance(value, list):
        return [inner(item, place) for place, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [inner(item, place) for place, item in enumerate(value)]}
    if isinstance(value, set | frozenset):
        kind = "$set" if isinstance(value, set) else "$frozenset"
        return {kind: sorted((inner(item, "item") for item in value), key=lambda one: canonical_json(one, where))}
    if isinstance(value, Inert):
        return {
            "$opaque": value.name,
            "arguments": inner(value.arguments, "arguments"),
            "state": inner(value.state, "state"),
        }
    name = tensor_name(value)
    if name is None:
        raise InvalidInput(f"{where}: a {type(value).__name__} is no plain data; leave it out, or save its state")
    return {"$tensor": name}


def _encode_float(value: float) -> Any:
    # An integral float would be written, and read again, as an integer.
    if math.isfinite(value) and not value.is_integer():
        return value
    return {"$float": repr(value)}


def _decode(value: Any, tensors: Mapping[str, Any], depth: int) -> Any:
    if depth > 2 * MAX_DEPTH + 2:
        raise InvalidManifest(f"a state document nested over {MAX_DEPTH} deep")

    def inner(item: Any) -> Any:
        return _decode(item, tensors, depth + 1)

    if isinstance(value, list):
        return [inner(item) for item in value]
    if not isinstance(value, dict):
        return value
    special = [key for key in value if key.startswith("$")]
    if not special:
        return {key: inner(item) for key, item in value.items()}
    kind = special[0]
    content = value[kind]
    if len(value) != (3 if kind == "$opaque" else 1):
        raise InvalidManifest(f"a state document with the members {sorted(value)}"[:200])
    if kind == "$tensor":
        return tensors[content]
    if kind == "$dict":
        return {_hashable(inner(key)): inner(item) for key, item in content}
    if kind == "$tuple":
        return tuple(inner(item) for item in content)
    if kind == "$set":
        return {_hashable(inner(item)) for item in content}
    if kind == "$frozenset":
        return frozenset(_hashable(inner(item)) for item in content)
    if kind == "$bytes":
        return base64.b64decode(content, validate=True)
    if kind == "$int":
        return int(content, 16)
    if kind == "$float":
        return float(content)
    if kind == "$complex":
        return complex(float(inner(content[0])), float(inner(content[1])))
    if kind == "$opaque" and isinstance(content, str):
        return Inert(content, inner(value["arguments"]), inner(value["state"]))
    raise InvalidManifest(f"a state document with the member {kind!r}"[:200])


def _hashable(value: Any) -> Any:
    hash(value)  # TypeError where it cannot be a key
    return value
