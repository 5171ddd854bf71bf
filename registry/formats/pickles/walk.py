"""Going through a tree that came from a pickle. It may share parts so often that its expansion has no end, be
deeper than any stack, or contain itself: whoever looks into one uses `walk`, which counts, and never recurses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date, time, timedelta, tzinfo

from registry.core.errors import InvalidInput
from registry.formats.pickles.limits import LIMITS, Limits
from registry.formats.pickles.tensors import TensorRef
from registry.formats.pickles.values import Opaque, OpaqueGlobal, Ordered

Path = tuple[object, ...]

_LEAVES = (
    bool
    | int
    | float
    | complex
    | str
    | bytes
    | slice
    | range
    | date
    | time
    | timedelta
    | tzinfo
    | TensorRef
    | OpaqueGlobal
)


def walk(
    tree: object, *, what: str, limits: Limits = LIMITS, into_opaque: bool = False
) -> Iterator[tuple[Path, object]]:
    """Every value with the way to it, each before what is in it, in the order of the file.

    A part that is shared comes once for every way to it. What is in a set has its position in the way.

    Args:
        what: names the file in errors.
        into_opaque: also what is in `Opaque` values, by the names `arguments`, `keywords`, `state` and `items`.

    Raises:
        InvalidInput: a container contains itself, there are more than `limits.items` values, or more than
            `limits.depth` levels.
    """
    left = limits.items
    yield (), tree
    open_values: list[tuple[Path, object, Iterator[tuple[object, object]]]] = []
    above: set[int] = set()

    def enter(path: Path, value: object) -> None:
        parts = _named_parts(value, into_opaque)
        if parts is None:
            return
        if id(value) in above:
            raise InvalidInput(
                f"{what}: expected a tree, found a {type(value).__name__} that contains itself "
                f"{len(path)} levels down; save plain data without references back to itself"
            )
        if len(open_values) >= limits.depth:
            raise InvalidInput(f"{what}: expected at most {limits.depth} levels, found more; save flatter data")
        above.add(id(value))
        open_values.append((path, value, parts))

    enter((), tree)
    while open_values:
        path, value, parts = open_values[-1]
        part = next(parts, None)
        if part is None:
            open_values.pop()
            above.discard(id(value))
            continue
        left -= 1
        if left < 0:
            raise InvalidInput(
                f"{what}: expected at most {limits.items} values with shared ones counted each time, found more; "
                f"save what is needed of it"
            )
        name, inner = part
        here = (*path, name)
        yield here, inner
        enter(here, inner)


def _named_parts(value: object, into_opaque: bool) -> Iterator[tuple[object, object]] | None:
    """Names and values one level down; None: it is a leaf."""
    if isinstance(value, dict):
        return iter(value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return iter(enumerate(value))
    if isinstance(value, Opaque) and into_opaque:
        return iter([(name, getattr(value, name)) for name in ("arguments", "keywords", "state", "items")])
    return None


def opaque_names(
    tree: object, *, what: str, limits: Limits, is_known: Callable[[OpaqueGlobal], bool]
) -> tuple[str, ...]:
    """Names of all classes and functions in it that are not known, sorted; and a check of the whole tree.

    Each part is looked at once, however often it is shared.

    Raises:
        InvalidInput: deeper than `limits.depth`, or a value is left that was never given its state.
    """
    names: set[str] = set()
    heights: dict[int, int] = {}
    entered: set[int] = set()
    waiting = [tree]
    while waiting:
        value = waiting[-1]
        parts = _parts(value)
        if parts is None:
            waiting.pop()
            if isinstance(value, OpaqueGlobal) and type(value) is OpaqueGlobal and not is_known(value):
                names.add(str(value))
            elif value is not None and not isinstance(value, _LEAVES):
                raise InvalidInput(
                    f"{what}: expected a value that is complete, found one without its state "
                    f"({type(value).__name__}); the file is damaged or was not made by pickle"
                )
            continue
        if id(value) in entered:
            waiting.pop()
            if id(value) not in heights:
                # What leads back to a container above it has no height of its own yet.
                heights[id(value)] = 1 + max((heights.get(id(part), 0) for part in parts), default=0)
                if heights[id(value)] > limits.depth:
                    raise InvalidInput(f"{what}: expected at most {limits.depth} levels, found more; save flatter data")
            continue
        entered.add(id(value))
        if isinstance(value, Opaque):
            names.add(value.type_name)
        waiting.extend(part for part in parts if id(part) not in entered)
    return tuple(sorted(names))


def _parts(value: object) -> list[object] | None:
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
        return [*parts, value.attributes] if isinstance(value, Ordered) and value.attributes else parts
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, Opaque):
        return [value.arguments, value.keywords, value.state, value.items]
    return None
