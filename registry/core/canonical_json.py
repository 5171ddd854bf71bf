"""Canonical JSON (RFC 8785), in which every document stands whose bytes are hashed or compared: layouts, manifests,
journal objects. Writing goes through `rfc8785`; reading is as strict, and gives back what can be written again."""

from __future__ import annotations

import json
import math
from typing import Any

import rfc8785

from registry.core.errors import InvalidInput

MAX_INTEGER = 2**53 - 1
"""Beyond it a JSON number is a float, to us as to every reader that has doubles only."""


def canonical_json(tree: Any, what: str) -> bytes:
    """The canonical bytes of plain data.

    Args:
        what: names the document in errors.

    Raises:
        InvalidInput: NaN, Infinity, an integer beyond `MAX_INTEGER`, half of a surrogate pair, data nested too
            deeply, or something that JSON has no form for.
    """
    try:
        return rfc8785.dumps(tree)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        # A key with half a surrogate pair fails in the sorting, before rfc8785 can name it.
        raise InvalidInput(f"{what} cannot be written as canonical JSON: {error}"[:300]) from error


def parse_json(document: bytes | str) -> Any:
    """Reads JSON such that `canonical_json` writes it again: numbers beyond `MAX_INTEGER` become floats.

    Raises:
        ValueError: not UTF-8, not JSON, a key twice in one object, NaN, Infinity, or a number too large for a float.
        RecursionError: nested too deeply.
    """
    text = document if isinstance(document, str) else document.decode("utf-8")
    return json.loads(
        text, object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_refuse_constant
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _integer(text: str) -> int | float:
    value = int(text) if len(text) <= 17 else None
    return value if value is not None and -MAX_INTEGER <= value <= MAX_INTEGER else _float(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
