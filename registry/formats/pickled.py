"""A file of torch.save or pickle as a tensor file: which of its bytes are tensors, and which components they make.
What the file holds comes from `pickles`, as plain data; nothing of it is run."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from registry.core.errors import InvalidInput, MalformedTensors
from registry.core.layout import NOT_IN_A_NAME, Layout, TensorSpec
from registry.core.reference import shown
from registry.core.state_document import MAX_DEPTH, Inert, state_document
from registry.formats.pickles import Opaque, OpaqueGlobal, PickleFile, TensorRef
from registry.formats.source import OpenFile, TensorFile

MAX_VALUES = 2_000_000
"""Plain values in one file's state documents: shared parts are written out each time."""

_Key = tuple[int, int, tuple[int, ...], tuple[int, ...], str]


class PlainData:
    """Makes plain data of trees that come from a file. They may share parts without end, be deep, or hold themselves,
    so all that is made is counted."""

    def __init__(self, what: str, tensor: Callable[[TensorRef], object] = lambda ref: ref) -> None:
        """
        Args:
            what: names the file in errors.
            tensor: gives what stands for a tensor.
        """
        self.what = what
        self._tensor = tensor
        self._values = 0

    def of(self, value: object, above: tuple[int, ...] = ()) -> Any:
        """The value with inert stand-ins for what a state document has no form for.

        Args:
            above: ids of the containers that it stands in.

        Raises:
            InvalidInput: nested too deeply, too much of it, or an object as a key.
        """
        self.count()
        self.check_depth(len(above))
        if id(value) in above:
            return Inert("a reference back to itself")
        inside = (*above, id(value))
        if isinstance(value, dict):
            return {self._key(key): self.of(item, inside) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, inside) for item in value]
        if isinstance(value, tuple):
            return tuple(self.of(item, inside) for item in value)
        if isinstance(value, set | frozenset):
            return type(value)(self._key(item) for item in value)
        if isinstance(value, Opaque):
            state = {"state": value.state, "items": value.items, "keywords": value.keywords}
            kept = {key: item for key, item in state.items() if item not in (None, {})}
            return Inert(value.type_name, self.of(value.arguments, inside), self.of(kept, inside))
        if isinstance(value, Inert):
            return Inert(value.name, self.of(value.arguments, inside), self.of(value.state, inside))
        return self._key(value)

    def check_depth(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise InvalidInput(f"{self.what}: nested over {MAX_DEPTH} deep; save less of it")

    def count(self) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            raise InvalidInput(
                f"{self.what}: over {MAX_VALUES} values, with shared ones counted each time; save what is needed of it"
            )

    def _key(self, value: object) -> object:
        if isinstance(value, TensorRef):
            return self._tensor(value)
        if isinstance(value, tuple):  # a key or in a set: small, and without containers that can be changed
            return tuple(map(self._key, value))
        if isinstance(value, Opaque):
            raise InvalidInput(
                f"{self.what}: expected text or numbers as keys and in sets, found an object of "
                f"{shown(value.type_name)}; save it as a value"
            )
        if isinstance(value, OpaqueGlobal):
            return str(value)
        if isinstance(value, datetime.date | datetime.time | datetime.timedelta | datetime.tzinfo):
            return str(value)
        if isinstance(value, slice | range):
            return repr(value)
        return value


class Components:
    """Collects the components of one file: each tensor of it once, however many names it has."""

    def __init__(self, what: str) -> None:
        """
        Args:
            what: names the file in errors.
        """
        self.what = what
        self._plain = PlainData(what)
        self.tensors: list[TensorRef] = []
        self.labels: list[str] = []
        self.entries: dict[str, tuple[tuple[str, int], ...]] = {}
        self.data: dict[str, bytes] = {}
        self._ordinals: dict[_Key, int] = {}
        self._labelled: set[str] = set()

    def add(self, role: str, tree: object) -> None:
        """Takes in a state dict. A tensor's name is its key, or its keys joined by dots.

        Raises:
            InvalidInput: nested too deeply, or too much of it.
            MalformedTensors: a name that no tensor may have.
        """
        named: dict[str, int] = {}
        names: dict[int, str] = {}
        self._collect(tree, "", named, names, ())
        self.entries[role] = tuple(named.items())
        if not _is_flat(tree):
            self.data[role] = state_document(
                self._plain.of(tree), tensor_name=lambda value: names.get(id(value)), what=f"{self.what}, {role}"
            )

    def layout_of(self, role: str) -> Layout:
        return Layout(tuple(TensorSpec(name, ref.dtype, ref.shape) for name, ref in self.named_tensors(role)))

    def named_tensors(self, role: str) -> Iterator[tuple[str, TensorRef]]:
        for name, ordinal in self.entries[role]:
            yield name, self.tensors[ordinal]

    def _collect(
        self, value: object, path: str, named: dict[str, int], names: dict[int, str], above: tuple[int, ...]
    ) -> None:
        self._plain.count()
        self._plain.check_depth(len(above))
        if id(value) in above:
            return  # the state document says that it leads back to itself
        inside = (*above, id(value))
        if isinstance(value, TensorRef):
            name = self._name(path or "tensor", named)
            named[name] = self._ordinal(value, name)
            names.setdefault(id(value), name)
        elif isinstance(value, dict):
            for key, item in value.items():
                part = key if isinstance(key, str) else str(key)
                self._collect(item, f"{path}.{part}" if path else part, named, names, inside)
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                self._collect(item, f"{path}.{place}" if path else str(place), named, names, inside)
        elif isinstance(value, Opaque):
            # A moving average's or a buffer's object: its attributes are named as if it were their dict.
            for part_of_it in (value.arguments, value.keywords, value.state, value.items):
                self._collect(part_of_it, path, named, names, inside)
        elif isinstance(value, Inert):
            for part_of_it in (value.arguments, value.state):
                self._collect(part_of_it, path, named, names, inside)

    def _name(self, path: str, taken: Mapping[str, int]) -> str:
        if NOT_IN_A_NAME.search(path):
            raise MalformedTensors(
                f"{self.what}: the tensor name {shown(path)} holds a control character; rename it and save again"
            )
        name, again = path, 1
        while name in taken:
            again += 1
            name = f"{path}#{again}"
        return name

    def _ordinal(self, ref: TensorRef, name: str) -> int:
        key = (id(ref.storage), ref.offset, ref.shape, ref.stride, ref.dtype)
        if key not in self._ordinals:
            self._ordinals[key] = len(self.tensors)
            self.tensors.append(ref)
            self.labels.append(self._name(name, dict.fromkeys(self._labelled, 0)) if name in self._labelled else name)
            self._labelled.add(self.labels[-1])
        return self._ordinals[key]


def _is_flat(tree: object) -> bool:
    return isinstance(tree, dict) and all(
        isinstance(key, str) and isinstance(value, TensorRef) for key, value in tree.items()
    )


class PickledFile(TensorFile):
    """A file of torch.save or pickle, open, with the components that were found in it."""

    def __init__(self, path: str, file: BinaryIO, components: Components, *, what: str) -> None:
        self._file = file
        self._open = OpenFile(file, what)
        self._tensors = components.tensors
        self.path = path
        self.size = self._open.size
        self.layout = Layout(
            tuple(
                TensorSpec(label, ref.dtype, ref.shape)
                for label, ref in zip(components.labels, components.tensors, strict=True)
            )
        )
        self.entries = dict(components.entries)
        self.inserts = []
        self._gaps: list[tuple[int, int]] = []
        """(byte of the skeleton, byte of the file) where each stretch of the skeleton begins."""
        self._lay_out()

    def _lay_out(self) -> None:
        spans = [
            (*span, ordinal)
            for ordinal, ref in enumerate(self._tensors)
            if (span := ref.span()) is not None and span[0] < span[1]
        ]
        inserts = []
        in_file = in_skeleton = 0
        for begin, end, ordinal in sorted(spans):
            if begin < in_file:
                continue  # a view into the bytes of another tensor: they are there once
            self._gaps.append((in_skeleton, in_file))
            in_skeleton += begin - in_file
            inserts.append((in_skeleton, ordinal))
            in_file = end
        self._gaps.append((in_skeleton, in_file))
        self.inserts = inserts
        self.skeleton_size = in_skeleton + self.size - in_file

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        yield from self._tensors[ordinal].chunks(self._file)

    def skeleton(self, begin: int, end: int) -> Iterator[memoryview]:
        ends = [first for first, _ in self._gaps[1:]] + [self.skeleton_size]
        for (first, in_file), last in zip(self._gaps, ends, strict=True):
            low, high = max(begin, first), min(end, last)
            if low < high:
                yield from self._open.read(in_file + low - first, in_file + high - first)

    def is_unchanged(self) -> bool:
        return self._open.is_unchanged()


def opaque_note(found: PickleFile) -> tuple[str, ...]:
    """What there is to say of classes that were not rebuilt."""
    if not found.opaque:
        return ()
    named = ", ".join(shown(name) for name in found.opaque[:10])
    more = f" and {len(found.opaque) - 10} more" if len(found.opaque) > 10 else ""
    return (f"classes that are kept as plain data, without their code: {named}{more}",)
