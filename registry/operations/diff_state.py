"""The state documents of two components against each other: learning rates, counters, configurations, whatever a
checkpoint holds beside tensors, value by value under the path where it stands."""

from __future__ import annotations

from typing import Any

from registry.core.canonical_json import parse_json
from registry.core.errors import Corrupt
from registry.core.event import number_to_json
from registry.operations.diff_components import changes
from registry.operations.difference import ValueDifference
from registry.operations.reading import blob_bytes
from registry.store.interface import BlobStore

_MARKED = ("$dict", "$tuple", "$set", "$frozenset")


def state_differences(blobs: BlobStore, a: str | None, b: str | None) -> tuple[ValueDifference, ...]:
    """What differs between two documents, by path; nothing where they are one.

    Args:
        a: digest of the first; None: that component holds tensors alone.

    Raises:
        BlobNotFound, Corrupt
    """
    if a == b:
        return ()
    values = [{} if digest is None else _values(blobs, digest) for digest in (a, b)]
    return tuple(ValueDifference(*one) for one in changes(*values))


def _values(blobs: BlobStore, digest: str) -> dict[str, object]:
    """Plain values by path; tensors are left to the component, whose names they have."""
    found: dict[str, object] = {}
    try:
        left: list[tuple[str, Any]] = [("", parse_json(blob_bytes(blobs, digest)))]
        while left:
            path, value = left.pop()
            parts = _parts(value)
            if parts is not None:
                left += [(f"{path}.{key}" if path else str(key), item) for key, item in reversed(parts)]
            elif not (isinstance(value, dict) and "$tensor" in value):
                found[path or "value"] = _shown(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise Corrupt(f"blob {digest} is no state document: {error}"[:200]) from error
    return found


def _parts(value: Any) -> list[tuple[object, Any]] | None:
    """What is in a container, by key; None for a plain value. One that is empty is a value itself."""
    marked = next((mark for mark in _MARKED if isinstance(value, dict) and mark in value), None)
    if marked == "$dict":
        return [(_shown(key), item) for key, item in value["$dict"]] or None
    if marked is not None:
        value = value[marked]
    if isinstance(value, list):
        return list(enumerate(value)) or None
    if isinstance(value, dict) and not any(key.startswith("$") for key in value):
        return list(value.items()) or None
    return None


def _shown(value: Any) -> object:
    """A value as a person would write it."""
    for mark in ("$float", "$int"):
        if isinstance(value, dict) and mark in value:
            return number_to_json(float(value[mark])) if mark == "$float" else int(value[mark], 16)
    if isinstance(value, dict) and "$opaque" in value:
        return f"an instance of {value['$opaque']}"
    return value
