"""Containers and plain values of Python's own library, rebuilt as plain data: a defaultdict or Counter becomes
a dict, a deque a list, a namespace the dict of its attributes, a path its text."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection
from functools import partial
from typing import TypeVar

from registry.formats.pickles.context import Context, described, parse_integer
from registry.formats.pickles.known import Known, only
from registry.formats.pickles.values import OpaqueGlobal, Ordered, ToBuild

Arguments = tuple[object, ...]
V = TypeVar("V")


def _content(context: Context, arguments: Arguments, function: str) -> Collection[object]:
    """What is copied into a new container, paid for."""
    if not arguments:
        return ()
    if len(arguments) == 1 and isinstance(value := arguments[0], list | tuple | set | frozenset | dict):
        context.budget.spend_items(len(value))
        return value
    raise context.invalid(f"one container for {function}", ", ".join(map(described, arguments[:4])))


def _list(context: Context, arguments: Arguments) -> list[object]:
    return list(_content(context, arguments, "list"))


def _tuple(context: Context, arguments: Arguments) -> tuple[object, ...]:
    return tuple(_content(context, arguments, "tuple"))


def _set(context: Context, arguments: Arguments) -> set[object]:
    return {context.key(value) for value in _content(context, arguments, "set")}


def _frozenset(context: Context, arguments: Arguments) -> frozenset[object]:
    return frozenset([context.key(value) for value in _content(context, arguments, "frozenset")])


def _deque(context: Context, arguments: Arguments) -> list[object]:
    return list(_content(context, arguments[:1], "deque"))


def _fill(context: Context, target: dict[object, object], arguments: Arguments, function: str) -> dict[object, object]:
    content = _content(context, arguments, function)
    if isinstance(content, dict):
        target.update(content)
        return target
    for pair in content:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise context.invalid(f"pairs of key and value for {function}", described(pair))
        target[context.key(pair[0])] = pair[1]
    return target


def _dict(context: Context, arguments: Arguments) -> dict[object, object]:
    return _fill(context, {}, arguments, "dict")


def _default_dict(context: Context, arguments: Arguments) -> dict[object, object]:
    if arguments and arguments[0] is not None and not isinstance(arguments[0], OpaqueGlobal):
        raise context.invalid("the name of a function for defaultdict", described(arguments[0]))
    return _fill(context, {}, arguments[1:], "defaultdict")


def _ordered_dict(context: Context, arguments: Arguments) -> ToBuild:
    target = Ordered()
    _fill(context, target, arguments, "OrderedDict")

    def build(state: object) -> Ordered:
        target.attributes = _attributes(context, state)
        return target

    return ToBuild(target, build)


def _namespace(context: Context, arguments: Arguments) -> ToBuild:
    if arguments:
        raise context.invalid("no argument of a namespace", str(len(arguments)))
    target: dict[object, object] = {}

    def build(state: object) -> dict[object, object]:
        target.update(_attributes(context, state))
        return target

    return ToBuild(target, build)


def _attributes(context: Context, state: object) -> dict[object, object]:
    if not isinstance(state, dict):
        raise context.invalid("a dict of attributes", described(state))
    context.budget.spend_items(len(state))
    return dict(state)


# ------------------------------------------------------------------------------------------- plain values


def _number(kind: type[int] | type[float], context: Context, arguments: Arguments) -> object:
    match arguments:
        case ():
            return kind()
        case (bool() | int() | float() as value,):
            try:
                return kind(value)
            except (ValueError, OverflowError):
                raise context.invalid(f"a value for {kind.__name__}", described(value)) from None
        case (str(text),) if kind is int and len(text) <= 400:
            if (number := parse_integer(text, context.budget.limits.integer_bytes)) is not None:
                return number
        case (str(text),) if kind is float and len(text) <= 400:
            try:
                return float(text)
            except ValueError:
                pass  # refused below, as all that is no number
    raise context.invalid(f"a number for {kind.__name__}", ", ".join(map(described, arguments[:4])))


def _complex(context: Context, arguments: Arguments) -> complex:
    match arguments:
        case (int() | float() as real, int() | float() as imaginary):
            try:
                return complex(real, imaginary)
            except OverflowError:
                pass  # refused below
        case (complex() as value,):
            return value
    raise context.invalid("two numbers for complex", ", ".join(map(described, arguments[:4])))


def _str(context: Context, arguments: Arguments) -> str:
    return only(context, arguments, str, "str") if arguments else ""


def _bytes(context: Context, arguments: Arguments) -> bytes:
    match arguments:
        case ():
            return b""
        case (bytes(value),):
            return value
        case (str(), str()):
            return _encode(context, arguments)
    raise context.invalid("bytes", ", ".join(map(described, arguments[:4])))


def _encode(context: Context, arguments: Arguments) -> bytes:
    match arguments:
        case (str(text), str(encoding)) if encoding in ("latin1", "latin-1", "utf-8", "utf8"):
            context.budget.spend_bytes(2 * len(text))
            try:
                return text.encode(encoding)
            except UnicodeEncodeError:
                raise context.invalid(f"text that {encoding} can write", "another") from None
        case (_, str(encoding)):
            raise context.unsafe(f"_codecs.encode with the encoding {described(encoding)}")
    raise context.invalid("a text and its encoding for _codecs.encode", ", ".join(map(described, arguments[:4])))


def _slice(context: Context, arguments: Arguments) -> slice:
    if len(arguments) != 3 or not all(type(part) in (int, type(None)) for part in arguments):
        raise context.invalid("three whole numbers for slice", ", ".join(map(described, arguments[:4])))
    return slice(*arguments)


def _range(context: Context, arguments: Arguments) -> range:
    match arguments:
        case (int(start), int(stop), int(step)) if step:
            return range(start, stop, step)
    raise context.invalid("three whole numbers for range", ", ".join(map(described, arguments[:4])))


def _path(separator: str, context: Context, arguments: Arguments) -> str:
    parts = []
    for part in arguments:
        if not isinstance(part, str):
            raise context.invalid("the parts of a path", described(part))
        parts.append(part)
    context.budget.spend_bytes(sum(map(len, parts)))
    # The first part may be a root or a drive, which ends with a separator of its own.
    anchor = parts.pop(0) if parts and parts[0].endswith(separator) else ""
    return (anchor + separator.join(parts)) or "."


# ------------------------------------------------------------------------------------------- dates


def _date(context: Context, arguments: Arguments) -> datetime.date:
    fields = _date_fields(context, arguments[:1], 4)
    return _checked(context, lambda: datetime.date(256 * fields[0] + fields[1], fields[2], fields[3]))


def _datetime(context: Context, arguments: Arguments) -> datetime.datetime:
    f = _date_fields(context, arguments[:1], 10)
    zone, micro = _zone(context, arguments[1:]), int.from_bytes(f[7:], "big")
    moment = (256 * f[0] + f[1], f[2] & 127, f[3], f[4], f[5], f[6], micro)
    return _checked(context, lambda: datetime.datetime(*moment, tzinfo=zone, fold=f[2] >> 7))


def _time(context: Context, arguments: Arguments) -> datetime.time:
    f = _date_fields(context, arguments[:1], 6)
    zone, micro = _zone(context, arguments[1:]), int.from_bytes(f[3:], "big")
    return _checked(context, lambda: datetime.time(f[0] & 127, f[1], f[2], micro, tzinfo=zone, fold=f[0] >> 7))


def _timedelta(context: Context, arguments: Arguments) -> datetime.timedelta:
    match arguments:
        case (int(days), int(seconds), int(micro)):
            return _checked(context, lambda: datetime.timedelta(days, seconds, micro))
    raise context.invalid("days, seconds and microseconds", ", ".join(map(described, arguments[:4])))


def _timezone(context: Context, arguments: Arguments) -> datetime.timezone:
    match arguments:
        case (datetime.timedelta() as offset,) | (datetime.timedelta() as offset, str()):
            return _checked(context, lambda: datetime.timezone(offset))
    raise context.invalid("a time zone", ", ".join(map(described, arguments[:4])))


def _date_fields(context: Context, arguments: Arguments, length: int) -> bytes:
    value = only(context, arguments, bytes, "a date")
    if len(value) != length:
        raise context.invalid(f"{length} bytes for a date or time", str(len(value)))
    return value


def _zone(context: Context, arguments: Arguments) -> datetime.tzinfo | None:
    match arguments:
        case ():
            return None
        case (datetime.timezone() as zone,):
            return zone
    raise context.invalid("a time zone", ", ".join(map(described, arguments[:4])))


def _checked(context: Context, make: Callable[[], V]) -> V:
    try:
        return make()
    except (ValueError, OverflowError):
        raise context.invalid("a date or time", "one that there is not") from None


CONTAINERS: dict[tuple[str, str], Known] = {
    ("builtins", "list"): Known(_list, is_class=True),
    ("builtins", "tuple"): Known(_tuple, is_class=True),
    ("builtins", "set"): Known(_set, is_class=True),
    ("builtins", "frozenset"): Known(_frozenset, is_class=True),
    ("builtins", "dict"): Known(_dict, is_class=True),
    ("collections", "OrderedDict"): Known(_ordered_dict, is_class=True),
    ("collections", "defaultdict"): Known(_default_dict, is_class=True),
    ("collections", "Counter"): Known(_dict, is_class=True),
    ("collections", "deque"): Known(_deque, is_class=True),
    ("argparse", "Namespace"): Known(_namespace, is_class=True),
    ("types", "SimpleNamespace"): Known(_namespace, is_class=True),
}

STANDARD: dict[tuple[str, str], Known] = {
    ("builtins", "int"): Known(partial(_number, int), is_class=True),
    ("builtins", "long"): Known(partial(_number, int), is_class=True),
    ("builtins", "float"): Known(partial(_number, float), is_class=True),
    ("builtins", "bool"): Known(partial(_number, bool), is_class=True),
    ("builtins", "complex"): Known(_complex, is_class=True),
    ("builtins", "str"): Known(_str, is_class=True),
    ("builtins", "unicode"): Known(_str, is_class=True),
    ("builtins", "bytes"): Known(_bytes, is_class=True),
    ("builtins", "bytearray"): Known(_bytes, is_class=True),
    ("builtins", "slice"): Known(_slice, is_class=True),
    ("builtins", "range"): Known(_range, is_class=True),
    ("builtins", "xrange"): Known(_range, is_class=True),
    ("types", "NoneType"): Known(),
    ("typing", "Any"): Known(),
    ("_codecs", "encode"): Known(_encode),
    **{("pathlib", f"{pure}PosixPath"): Known(partial(_path, "/"), is_class=True) for pure in ("", "Pure")},
    **{("pathlib", f"{pure}WindowsPath"): Known(partial(_path, "\\"), is_class=True) for pure in ("", "Pure")},
    ("datetime", "date"): Known(_date, is_class=True),
    ("datetime", "datetime"): Known(_datetime, is_class=True),
    ("datetime", "time"): Known(_time, is_class=True),
    ("datetime", "timedelta"): Known(_timedelta, is_class=True),
    ("datetime", "timezone"): Known(_timezone, is_class=True),
}
"""What may be called stands for a class or a function of that name; without a function it is only a name."""
