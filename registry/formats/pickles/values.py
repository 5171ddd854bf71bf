"""What stands in a tree for things that are no plain data. All of it is inert: names and content, never code."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class OpaqueGlobal:
    """A class, function or constant that a pickle refers to by its name. Nothing is imported for it.

    Two of the same name are equal, so it can be a key.
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Opaque:
    """An instance of a class that is not known, as the data that it would have been made from.

    Its parts may lead back to itself: `walk` them with `into_opaque`, never by recursion.

    Attributes:
        type_name: `module.name` of the class.
        arguments: positional arguments of its `__new__`.
        keywords: keyword arguments of its `__new__`.
        state: what its `__setstate__` or `__dict__` would have got; None where there is none.
        items: elements (a list's) or entries (a dict's) that would have been added; None where there are none.
    """

    type_name: str
    arguments: tuple[object, ...] = field(default=(), repr=False)
    keywords: dict[object, object] = field(default_factory=dict, repr=False)
    state: object = field(default=None, repr=False)
    items: list[object] | dict[object, object] | None = field(default=None, repr=False)


class Ordered(OrderedDict[object, object]):
    """A `collections.OrderedDict` of the file, which may have had attributes.

    Attributes:
        attributes: such as `_metadata` (versions of modules) of what `Module.state_dict` gives; else empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attributes: dict[object, object] = {}


class Unbuilt:
    """Stands for a value whose state is still to come; none is left in what a reader gives back.

    Attributes:
        value: the value, as soon as it is known.
    """

    __slots__ = ("is_built", "kind", "value")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.is_built = False
        self.value: object = None


@dataclass(frozen=True, slots=True)
class ToBuild:
    """What a rebuilding function gives where a BUILD instruction may follow.

    Attributes:
        target: goes onto the stack now.
        build: gets the state, and gives what takes the target's place (or the target itself).
    """

    target: object
    build: Callable[[object], object]
