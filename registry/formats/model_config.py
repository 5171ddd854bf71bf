"""What a file says of how its network was built: `model_config`, a dict of `class` and `arguments`, in the tree of a
checkpoint or as JSON in the header of a safetensors file. It comes from outside: it is read as data, within the limits
of an architecture, and what cannot be kept is said and never stops a push."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from registry.core.architecture import MAX_BYTES, ROLE, Architecture
from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.formats.pickles import Opaque, OpaqueGlobal, TensorRef, walk

MODEL_CONFIG = "model_config"
"""Its key, in the tree and in `__metadata__`."""
CLASS, ARGUMENTS = "class", "arguments"
MAX_TEXT = 8 * MAX_BYTES
"""Characters of its JSON: an architecture in escapes has six for a byte."""


def names_a_class(value: object) -> bool:
    """Whether a value under this key is of this form, and no state dict or the arguments alone, as it once was."""
    return isinstance(value, dict) and CLASS in value


def described_by(tree: Mapping[Any, Any]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The architecture that a tree says, as what describes a version.

    Args:
        tree: of a checkpoint, without its state dicts; it may hold anything that a pickle can.

    Returns:
        the document by its role, or nothing; and a note where one was said that cannot be kept.
    """
    if tree.get(MODEL_CONFIG) is None:
        return {}, ()
    try:
        found = _architecture(tree[MODEL_CONFIG])
        return {} if found is None else {ROLE: found.to_bytes()}, ()
    except InvalidInput as error:
        return {}, (f"no architecture is kept of {MODEL_CONFIG}: {error}",)


def described_by_header(metadata: Mapping[str, str]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The same of `__metadata__` of a safetensors file."""
    text = metadata.get(MODEL_CONFIG)
    if text is None:
        return {}, ()
    try:
        if len(text) > MAX_TEXT:
            raise ValueError(f"{len(text)} characters; expected at most {MAX_TEXT}")
        return described_by({MODEL_CONFIG: json.loads(text)})
    except (ValueError, RecursionError) as error:
        return {}, (f"no architecture is kept of {MODEL_CONFIG} in the header, which is no JSON: {shown(str(error))}",)


def model_config(architecture: Architecture) -> dict[str, Any]:
    """What a file says of an architecture."""
    return {CLASS: architecture.class_name, ARGUMENTS: dict(architecture.arguments)}


def header_text(architecture: Architecture) -> str:
    """The same for a header. JSON has no tuples: they become lists. It has NaN and Infinity as Python writes them."""
    return json.dumps(model_config(architecture), sort_keys=True)


def _architecture(value: object) -> Architecture | None:
    """
    Returns:
        None for the arguments alone, whose class nobody knows.

    Raises:
        InvalidInput: neither the one nor the other, or no plain data.
    """
    if not isinstance(value, dict):
        raise InvalidInput(f"it is {_named(value)}; expected a dict of {CLASS} and {ARGUMENTS}")
    if not names_a_class(value):
        return None
    name, arguments = value[CLASS], value.get(ARGUMENTS)
    if not isinstance(name, str):
        raise InvalidInput(f"its {CLASS} is {_named(name)}; expected text")
    if not isinstance(arguments, dict):
        raise InvalidInput(f"its {ARGUMENTS} are {_named(arguments)}; expected a dict of them by name")
    for path, inner in walk(arguments, what=ARGUMENTS):
        if isinstance(inner, Opaque | OpaqueGlobal | TensorRef):
            where = "".join(f"[{shown(repr(key))}]" for key in path)
            raise InvalidInput(f"{ARGUMENTS}{where}: {_named(inner)} is no plain data; give it by its name")
    return Architecture(name, arguments)


def _named(value: object) -> str:
    if isinstance(value, TensorRef):
        return "a tensor"
    if isinstance(value, Opaque):
        return f"an object of {shown(value.type_name)}"
    return shown(str(value)) if isinstance(value, OpaqueGlobal) else f"a {type(value).__name__}"
