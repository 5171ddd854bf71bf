"""Classes by name: looked up in a table that the code gives, never imported. What is called has its arguments
checked, and a misspelt one is answered with the near one."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from registry.core.errors import InvalidInput
from registry.core.reference import shown


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def look_up(name: str, table: Iterable[type], what: str, error: type[InvalidInput]) -> type:
    """The class of a name, whole or without its module.

    Args:
        what: says where the name stands.

    Raises:
        error: it is not in the table.
    """
    known = {full_name(one): one for one in table}
    short = {one.__qualname__: one for one in table}
    if name in known or name in short:
        return known.get(name) or short[name]
    near = get_close_matches(name, [*known, *short], n=1)
    hint = f"did you mean {near[0]}" if near else f"known are {', '.join(known)}"
    raise error(
        f"{what} names the class {shown(name, 120)}, and classes are looked up, never imported; {hint}; pass another "
        "one as classes=[...]"
    )


def call(kind: type, arguments: Mapping[str, Any], what: str, error: type[InvalidInput]) -> Any:
    """Calls a class.

    Raises:
        error: an argument that it does not have (with the near one), or one that is missing.
        InvalidInput: what the class itself refuses.
    """
    parameters = inspect.signature(kind).parameters
    takes = {name: one for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    takes_any = any(one.kind == one.VAR_KEYWORD for one in parameters.values())
    for name in arguments:
        if name not in takes and not takes_any:
            near = get_close_matches(str(name), takes, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(takes)}"
            raise error(f"{what}: {kind.__name__} has no argument {shown(str(name))}; {hint}")
    missing = [name for name, one in takes.items() if one.default is one.empty and name not in arguments]
    if missing:
        raise error(f"{what}: {kind.__name__} needs {', '.join(missing)} as well")
    try:
        return kind(**arguments)
    except InvalidInput:
        raise
    except (TypeError, ValueError, NotImplementedError, RuntimeError, OverflowError, AttributeError) as refusal:
        raise error(f"{what}: {kind.__name__} does not take these arguments: {shown(str(refusal), 200)}") from refusal
