"""The source of a model's classes as digests: comments, layout and docstrings do not count, and every Python gives the
same. It shows that two models of one form are not of one code. Only the standard library is imported here, so that the
normaliser runs under any interpreter."""

from __future__ import annotations

import ast
import inspect
import io
import sys
import tokenize
import warnings
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import nn

NO_SOURCE = "no source"
"""Stands for the digest of a class that was made at a prompt, in a notebook or by code."""
NOT_OURS = frozenset(("torch", "peft"))
"""Their classes are told by a version, and stand in every model."""

_OPEN = frozenset(("FSTRING_START", "TSTRING_START"))
_CLOSE = frozenset(("FSTRING_END", "TSTRING_END"))
_NOT_TEXT = frozenset(("COMMENT", "NL", "ENCODING", "ENDMARKER", "TYPE_COMMENT", "TYPE_IGNORE"))
_digests: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def sources_of(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """What the model's code is, as far as it is neither torch's nor PEFT's.

    Returns:
        Qualified name of a class -> sha256 of its normalised source, or `NO_SOURCE`; and package -> version for the
        installed packages that these classes come from. Both sorted by name.
    """
    found: dict[str, str] = {}
    packages: dict[str, str] = {}
    for one in dict.fromkeys(map(type, model.modules())):
        package = one.__module__.partition(".")[0]
        if package in NOT_OURS:
            continue
        found[f"{one.__module__}.{one.__qualname__}"] = _digest_of(one)
        version = _version_of(package)
        if version is not None:
            packages[package] = version
    return dict(sorted(found.items())), dict(sorted(packages.items()))


def _digest_of(one: type) -> str:
    if one not in _digests:
        text = _source_of(one)
        _digests[one] = NO_SOURCE if text is None else sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
    return _digests[one]


def _source_of(one: type) -> str | None:
    module = sys.modules.get(one.__module__)
    if module is None:
        return None
    try:
        return normalised_class(inspect.getsource(module), one.__qualname__)
    except (OSError, TypeError, SyntaxError, ValueError, RecursionError):
        # No file, a built-in, an archive, or a file that is no Python any more: there is nothing to compare.
        return None


@lru_cache(maxsize=64)
def _version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    try:
        return version(package)
    except (PackageNotFoundError, ValueError):
        # It is called otherwise where it is installed, or is none: asking for all costs 0.1 s, once.
        names = packages_distributions().get(package)
        return version(sorted(names)[0]) if names else None


def normalised_class(source: str, qualified_name: str) -> str | None:
    """The normalised source of one class of a module; of all of that name, where there are several.

    Args:
        source: of the module.

    Returns:
        None: the module defines no such class.

    Raises:
        SyntaxError: it is no Python.
    """
    lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    places = _classes(source).get(qualified_name)
    if not places:
        return None
    return "\n".join(normalised("\n".join(lines[begin - 1 : end]) + "\n") for begin, end in places)


@lru_cache(maxsize=32)
def _classes(source: str) -> dict[str, list[tuple[int, int]]]:
    """First and last line of each class, its decorators included."""
    found: dict[str, list[tuple[int, int]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an escape that Python does not know
        waiting: list[tuple[ast.AST, str]] = [(ast.parse(source), "")]
    while waiting:
        node, prefix = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            prefix += f"{node.name}.<locals>."
        elif isinstance(node, ast.ClassDef):
            begin = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            found.setdefault(prefix + node.name, []).append((begin, node.end_lineno or node.lineno))
            prefix += f"{node.name}."
        waiting.extend((child, prefix) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
    for places in found.values():
        places.sort()
    return found


def normalised(source: str) -> str:
    """Source less comments, layout, line breaks within a statement, and texts that stand alone (docstrings): a line a
    statement, its tokens apart by a space, after as many tabs as it is deep.

    Raises:
        SyntaxError: it cannot be cut into tokens.
    """
    found: list[str] = []
    depth = first = 0
    texts: list[str] = []
    try:
        for name, text in _tokens(source):
            if name == "INDENT":
                depth += 1
            elif name == "DEDENT":
                depth -= 1
            elif name == "NEWLINE":
                if texts and not all(map(_is_plain_text, texts)):
                    found.append("\t" * (depth - first) + " ".join(texts))
                texts = []
            else:
                if not texts and not found:
                    first = depth  # the class may be in a block
                texts.append(text)
    except tokenize.TokenError as error:
        raise SyntaxError(str(error)) from error
    return "\n".join(found)


def _tokens(source: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each token. Python 3.12 cuts an f-string into parts: here it is one, letter for letter."""
    lines = source.split("\n")
    nested = 0
    begin = (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token in tokens:
        name = tokenize.tok_name[token.type]
        if name in _OPEN:
            begin = begin if nested else token.start
            nested += 1
        elif name in _CLOSE:
            nested -= 1
            if not nested:
                yield "STRING", _between(lines, begin, token.end)
        elif not nested and name not in _NOT_TEXT:
            yield name, token.string


def _between(lines: list[str], begin: tuple[int, int], end: tuple[int, int]) -> str:
    if begin[0] == end[0]:
        return lines[begin[0] - 1][begin[1] : end[1]]
    return "\n".join([lines[begin[0] - 1][begin[1] :], *lines[begin[0] : end[0] - 1], lines[end[0] - 1][: end[1]]])


def _is_plain_text(token: str) -> bool:
    """Whether a token is a string that does nothing where it stands alone; an f-string may call something."""
    quote = min((place for place in (token.find("'"), token.find('"')) if place >= 0), default=-1)
    prefix = token[:quote].lower() if quote >= 0 else ""
    return quote >= 0 and prefix in ("", "r", "u", "b", "br", "rb")
