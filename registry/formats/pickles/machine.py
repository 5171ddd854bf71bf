"""The pickle machine: reads instructions of protocols 0 to 5 and builds plain data. It imports nothing and
calls nothing of the pickle's choosing; whatever would be called goes through `known_globals`, where functions
of our own stand for a short list of names.

Source of the instructions: Lib/pickletools.py of CPython."""

from __future__ import annotations

import re
from collections.abc import Callable

from registry.formats.pickles.context import Context, described
from registry.formats.pickles.known_globals import call, instantiate
from registry.formats.pickles.operands import Operands
from registry.formats.pickles.sources import Stream
from registry.formats.pickles.values import Opaque, OpaqueGlobal, ToBuild

Handler = Callable[["Machine"], None]

_PART = r"[A-Za-z_][A-Za-z0-9_]*"
_DOTTED = re.compile(rf"{_PART}(?:\.{_PART})*", re.ASCII)


class Machine:
    """Runs one pickle.

    Attributes:
        context: where it stands; shared with the functions that rebuild.
    """

    def __init__(self, stream: Stream, context: Context, persistent: Callable[[object], object] | None) -> None:
        """
        Args:
            stream: stands at the first instruction, and afterwards behind the last.
            persistent: gives the storage that a persistent id names; None: this pickle may have none.
        """
        self.context = context
        self._stream = stream
        self._read = Operands(stream, context)
        self._persistent = persistent
        self._stack: list[object] = []
        self._marked: list[list[object]] = []
        self._below = 0
        self._memo: dict[int, object] = {}
        # By identity, with the target itself, so that no other object gets its id meanwhile.
        self._to_build: dict[int, tuple[ToBuild, list[int]]] = {}

    def run(self) -> object:
        """The value of the pickle.

        Raises:
            InvalidInput, MalformedTensors, UnsupportedTensor, UnsafePickle
        """
        context, stream, budget = self.context, self._stream, self.context.budget
        limit = budget.limits.stack
        while True:
            context.at = stream.position
            code = stream.read(1)[0]
            if code == 0x2E:  # STOP
                break
            handler = _HANDLERS[code]
            if handler is None:
                raise context.invalid("a pickle", f"the unknown instruction {code:#04x}")
            budget.opcodes -= 1
            if budget.opcodes < 0:
                raise budget.over(budget.limits.opcodes, "instructions")
            handler(self)
            if len(self._stack) + self._below > limit:
                raise budget.over(limit, "values waiting")
        value = self._pop()
        if self._marked or self._stack:
            raise context.invalid("a pickle that ends with one value", "more values, or an open mark")
        for fill in context.fillings:
            fill()
        context.fillings.clear()
        return value

    # ------------------------------------------------------------------------------------------- the stack

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if not self._stack:
            raise self.context.invalid("a value on the stack", "none")
        return self._stack.pop()

    def _top(self) -> object:
        if not self._stack:
            raise self.context.invalid("a value on the stack", "none")
        return self._stack[-1]

    def _pop_mark(self) -> list[object]:
        """The values since the last mark."""
        if not self._marked:
            raise self.context.invalid("a mark on the stack", "none")
        values = self._stack
        self._stack = self._marked.pop()
        self._below -= len(self._stack) + 1
        return values

    def _mark(self) -> None:
        self._below += len(self._stack) + 1
        self._marked.append(self._stack)
        self._stack = []

    def _drop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _drop_to_mark(self) -> None:
        self._pop_mark()

    def _duplicate(self) -> None:
        self._push(self._top())

    # ------------------------------------------------------------------------------------------- the memo

    def _put(self, index: int) -> None:
        value = self._top()
        if index not in self._memo:
            self.context.budget.spend_memo()
        self._memo[index] = value
        if (waiting := self._to_build.get(id(value))) is not None:
            waiting[1].append(index)

    def _put_line(self) -> None:
        self._put(self._read.index_line())

    def _memoize(self) -> None:
        self._put(len(self._memo))

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise self.context.invalid("a value in the memo", f"none under {index}")
        self._push(self._memo[index])

    def _get_line(self) -> None:
        self._get(self._read.index_line())

    # ------------------------------------------------------------------------------------------- containers

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise self.context.invalid(f"{count} values on the stack", str(len(self._stack)))
        values = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        self._push(values)

    def _tuple_mark(self) -> None:
        self._push(tuple(self._pop_mark()))

    def _list_mark(self) -> None:
        self._push(list(self._pop_mark()))

    def _dict_mark(self) -> None:
        values = self._pop_mark()
        target: dict[object, object] = {}
        self._set_items(target, values)
        self._push(target)

    def _frozenset(self) -> None:
        self._push(frozenset([self.context.key(value) for value in self._pop_mark()]))

    def _append(self) -> None:
        value = self._pop()
        self._extend(self._top(), [value])

    def _appends(self) -> None:
        values = self._pop_mark()
        self._extend(self._top(), values)

    def _extend(self, target: object, values: list[object]) -> None:
        if isinstance(target, Opaque):
            if target.items is None:
                target.items = []
            target = target.items
        if not isinstance(target, list):
            raise self.context.invalid("a list to add to", described(target))
        target.extend(values)

    def _set_item(self) -> None:
        value = self._pop()
        key = self._pop()
        self._set_items(self._top(), [key, value])

    def _set_items_mark(self) -> None:
        values = self._pop_mark()
        self._set_items(self._top(), values)

    def _set_items(self, target: object, values: list[object]) -> None:
        if isinstance(target, Opaque):
            if target.items is None:
                target.items = {}
            target = target.items
        if not isinstance(target, dict):
            raise self.context.invalid("a dict to add to", described(target))
        if len(values) % 2:
            raise self.context.invalid("keys and values", "a key without a value")
        for index in range(0, len(values), 2):
            target[self.context.key(values[index])] = values[index + 1]

    def _add_items(self) -> None:
        values = self._pop_mark()
        target = self._top()
        if not isinstance(target, set):
            raise self.context.invalid("a set to add to", described(target))
        target.update([self.context.key(value) for value in values])

    # ------------------------------------------------------------------------------------------- globals and calls

    def _global(self, module: object, name: object) -> OpaqueGlobal:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.context.invalid("the name of a global", f"{described(module)} and {described(name)}")
        if len(module) + len(name) > self.context.budget.limits.name_bytes:
            raise self.context.budget.over(self.context.budget.limits.name_bytes, "characters in a global's name")
        if not _DOTTED.fullmatch(module) or not _DOTTED.fullmatch(name):
            # Look-alikes of other alphabets and line breaks are written out.
            shown = f"{module}.{name}".encode("unicode_escape").decode("ascii")
            raise self.context.unsafe(shown, "refers to")
        return OpaqueGlobal(module, name)

    def _read_global(self) -> OpaqueGlobal:
        module = self._read.name()
        return self._global(module, self._read.name())

    def _push_global(self) -> None:
        self._push(self._read_global())

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._push(self._global(module, name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self._push_result(call(self.context, function, self._arguments(function, arguments)))

    def _instance(self) -> None:
        function = self._read_global()
        self._push_result(call(self.context, function, tuple(self._pop_mark())))

    def _object(self) -> None:
        values = self._pop_mark()
        if not values:
            raise self.context.invalid("a class and its arguments", "nothing")
        self._push_result(call(self.context, values[0], tuple(values[1:])))

    def _new(self) -> None:
        arguments, cls = self._pop(), self._pop()
        self._push_result(instantiate(self.context, cls, self._arguments(cls, arguments), {}))

    def _new_with_keywords(self) -> None:
        keywords, arguments, cls = self._pop(), self._pop(), self._pop()
        if type(keywords) is not dict:
            raise self.context.invalid("keyword arguments", described(keywords))
        self.context.budget.spend_items(len(keywords))
        self._push_result(instantiate(self.context, cls, self._arguments(cls, arguments), dict(keywords)))

    def _arguments(self, function: object, arguments: object) -> tuple[object, ...]:
        if not isinstance(arguments, tuple):
            raise self.context.invalid(f"arguments of {described(function)} in a tuple", described(arguments))
        return arguments

    def _push_result(self, value: object) -> None:
        if isinstance(value, ToBuild):
            self._to_build[id(value.target)] = (value, [])
            value = value.target
        self._push(value)

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Opaque):
            target.state = state
            return
        waiting = self._to_build.pop(id(target), None)
        if waiting is None:
            raise self.context.invalid("a value that takes a state", described(target))
        to_build, indices = waiting
        value = to_build.build(state)
        self._stack[-1] = value
        for index in indices:
            if self._memo[index] is target:
                self._memo[index] = value

    def _extension(self, size: int) -> None:
        raise self.context.unsafe(f"the registered extension {self._read.count(size)}")

    def _persistent_line(self) -> None:
        self._push_persistent(self._read.line(self.context.budget.limits.name_bytes))

    def _persistent_id(self) -> None:
        self._push_persistent(self._pop())

    def _push_persistent(self, name: object) -> None:
        if self._persistent is None:
            raise self.context.invalid("a pickle that is complete", f"a persistent id, {described(name)}")
        self._push(self._persistent(name))

    def _protocol(self) -> None:
        if (version := self._read.count(1)) > 5:
            raise self.context.invalid("a pickle of protocol 0 to 5", f"protocol {version}")

    def _frame(self) -> None:
        # A frame only says how much to read at once.
        if (length := self._read.count(8)) > self._stream.left:
            raise self.context.invalid(f"a frame of {length} bytes", f"{self._stream.left} bytes")

    def _buffer(self) -> None:
        raise self.context.invalid("a pickle that is complete", "a buffer that was kept outside it")


def _handlers() -> list[Handler | None]:
    """By instruction byte; STOP is not among them."""
    m = Machine
    table: dict[bytes, Handler] = {
        b"(": m._mark,
        b"0": m._drop,
        b"1": m._drop_to_mark,
        b"2": m._duplicate,
        b"F": lambda s: s._push(s._read.float_line()),
        b"G": lambda s: s._push(s._read.float8()),
        b"I": lambda s: s._push(s._read.int_line()),
        b"J": lambda s: s._push(s._read.int4()),
        b"K": lambda s: s._push(s._read.count(1)),
        b"M": lambda s: s._push(s._read.count(2)),
        b"L": lambda s: s._push(s._read.long_line()),
        b"\x8a": lambda s: s._push(s._read.long(1)),
        b"\x8b": lambda s: s._push(s._read.long(4)),
        b"N": lambda s: s._push(None),
        b"\x88": lambda s: s._push(True),
        b"\x89": lambda s: s._push(False),
        b"S": lambda s: s._push(s._read.quoted_line()),
        b"T": lambda s: s._push(s._read.old_text(4)),
        b"U": lambda s: s._push(s._read.old_text(1)),
        b"V": lambda s: s._push(s._read.raw_unicode_line()),
        b"X": lambda s: s._push(s._read.text(4)),
        b"\x8c": lambda s: s._push(s._read.text(1)),
        b"\x8d": lambda s: s._push(s._read.text(8)),
        b"B": lambda s: s._push(s._read.data(4)),
        b"C": lambda s: s._push(s._read.data(1)),
        b"\x8e": lambda s: s._push(s._read.data(8)),
        b"\x96": lambda s: s._push(s._read.data(8)),
        b"\x97": m._buffer,
        b"\x98": m._buffer,
        b"]": lambda s: s._push([]),
        b"}": lambda s: s._push({}),
        b")": lambda s: s._push(()),
        b"\x8f": lambda s: s._push(set()),
        b"l": m._list_mark,
        b"d": m._dict_mark,
        b"t": m._tuple_mark,
        b"\x85": lambda s: s._tuple(1),
        b"\x86": lambda s: s._tuple(2),
        b"\x87": lambda s: s._tuple(3),
        b"\x91": m._frozenset,
        b"a": m._append,
        b"e": m._appends,
        b"s": m._set_item,
        b"u": m._set_items_mark,
        b"\x90": m._add_items,
        b"p": m._put_line,
        b"q": lambda s: s._put(s._read.count(1)),
        b"r": lambda s: s._put(s._read.count(4)),
        b"\x94": m._memoize,
        b"g": m._get_line,
        b"h": lambda s: s._get(s._read.count(1)),
        b"j": lambda s: s._get(s._read.count(4)),
        b"c": m._push_global,
        b"\x93": m._stack_global,
        b"R": m._reduce,
        b"i": m._instance,
        b"o": m._object,
        b"\x81": m._new,
        b"\x92": m._new_with_keywords,
        b"b": m._build,
        b"\x82": lambda s: s._extension(1),
        b"\x83": lambda s: s._extension(2),
        b"\x84": lambda s: s._extension(4),
        b"P": m._persistent_line,
        b"Q": m._persistent_id,
        b"\x80": m._protocol,
        b"\x95": m._frame,
    }
    return [table.get(bytes([code])) for code in range(256)]


_HANDLERS = _handlers()
