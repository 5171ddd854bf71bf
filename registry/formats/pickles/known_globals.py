"""The short list: names that a pickle may call, and the functions of ours that stand for them. What is not
on it is only ever a name. Two questions are answered here: what a call gives, and what becomes of a class
that is instantiated."""

from __future__ import annotations

import re

from registry.formats.pickles.context import Context, described
from registry.formats.pickles.known import Known, words
from registry.formats.pickles.known_containers import CONTAINERS, STANDARD
from registry.formats.pickles.known_numpy import NUMPY
from registry.formats.pickles.known_omegaconf import OMEGACONF
from registry.formats.pickles.known_torch import TORCH
from registry.formats.pickles.values import Opaque, OpaqueGlobal

# Python 2's names of modules, old and new places of one thing.
_MODULES = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "dill.dill": "dill._dill",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
    "pathlib._local": "pathlib",
    "torch.tensor": "torch._tensor",
}

_CLASS = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_]*\.)*_*[A-Z][A-Za-z0-9_]*", re.ASCII)

NEVER_DATA = words(
    """
    _io _posixsubprocess _thread ast asyncio atexit bdb builtins cffi cloudpickle code codecs codeop copyreg cProfile
    ctypes dill doctest fileinput ftplib functools gc glob http imaplib imp importlib inspect io itertools joblib
    linecache logging marshal mmap multiprocessing nt ntpath operator os pdb pickle pip pipes pkgutil platform posix
    posixpath poplib profile pty pydoc pydoc_data runpy sched select setuptools shelve shutil signal site smtplib
    socket socketserver sqlite3 ssl subprocess sys sysconfig tarfile tempfile threading timeit trace traceback types
    urllib venv warnings webbrowser xmlrpc zipfile zipimport
    """
)
"""Modules whose classes do things, and are no data in any checkpoint. An instance would be as inert as any other here;
but a file that holds one was made to attack those who read it otherwise."""


def known(name: OpaqueGlobal) -> Known | None:
    """What stands for this global; None: it is not on the list."""
    return _KNOWN.get((_MODULES.get(name.module, name.module), name.name))


def call(context: Context, function: object, arguments: tuple[object, ...]) -> object:
    """The value of a call (REDUCE, INST, OBJ) by our own function for that name.

    Raises:
        UnsafePickle: it is not on the short list.
    """
    if not isinstance(function, OpaqueGlobal):
        raise context.unsafe(f"a value that it made itself ({described(function)})")
    entry = known(function)
    if entry is not None and entry.rebuild is not None:
        return entry.rebuild(context, arguments)
    raise context.unsafe(described(function))


def instantiate(context: Context, cls: object, arguments: tuple[object, ...], keywords: dict[object, object]) -> object:
    """An instance of a class (NEWOBJ): of a known one what stands for it, else inert data.

    Raises:
        UnsafePickle: it is no class, or one that is never data.
    """
    if isinstance(cls, OpaqueGlobal) and (entry := known(cls)) is not None:
        if entry.rebuild is None or not entry.is_class or keywords:
            raise context.unsafe(described(cls), "makes an instance of")
        return entry.rebuild(context, arguments)
    _check_class(context, cls)
    return Opaque(str(cls), arguments, keywords)


def _check_class(context: Context, cls: object) -> None:
    if not isinstance(cls, OpaqueGlobal):
        raise context.unsafe(f"a value that it made itself ({described(cls)})", "makes an instance of")
    if not _CLASS.fullmatch(cls.name) or cls.module.partition(".")[0] in NEVER_DATA or cls.module == "__builtin__":
        raise context.unsafe(described(cls), "makes an instance of")


_BASES = words("object list dict set tuple str unicode bytes int long float")


def _reconstructor(context: Context, arguments: tuple[object, ...]) -> Opaque:
    if len(arguments) != 3:
        raise context.invalid("three arguments of copyreg._reconstructor", str(len(arguments)))
    cls, base, content = arguments
    if not isinstance(base, OpaqueGlobal) or known(base) is None or base.name not in _BASES:
        raise context.unsafe(f"copyreg._reconstructor with the base {described(base)}")
    if isinstance(cls, OpaqueGlobal) and known(cls) is not None and cls != base:
        raise context.unsafe(described(cls), "makes an instance of")
    if cls != base:
        _check_class(context, cls)
    made = Opaque(str(cls))
    if isinstance(content, list | dict):
        context.budget.spend_items(len(content))
        made.items = content.copy() if type(content) in (list, dict) else dict(content)
    elif content is not None:
        made.arguments = (content,)
    return made


def _object(context: Context, arguments: tuple[object, ...]) -> Opaque:
    if arguments:
        raise context.invalid("no argument of object", str(len(arguments)))
    return Opaque("builtins.object")


_LOADED_TYPES = words("bool bytearray bytes complex dict float frozenset int list range set slice str tuple")


def _load_type(context: Context, arguments: tuple[object, ...]) -> OpaqueGlobal:
    """How dill names a type of Python itself."""
    match arguments:
        case (str(name),) if name in _LOADED_TYPES:
            return OpaqueGlobal("builtins", name)
        case ("NoneType",):
            return OpaqueGlobal("types", "NoneType")
        case (str() as name,):
            raise context.unsafe(f"dill._dill._load_type of {described(name)}")
    raise context.invalid("the name of a type", "another argument of dill._dill._load_type")


_KNOWN: dict[tuple[str, str], Known] = {
    **CONTAINERS,
    **STANDARD,
    **NUMPY,
    **OMEGACONF,
    **TORCH,
    ("builtins", "object"): Known(_object, is_class=True),
    ("copyreg", "_reconstructor"): Known(_reconstructor),
    ("dill._dill", "_load_type"): Known(_load_type),
}
