"""Quick imports. `registry list` spends most of its time on importing SQLAlchemy, and of that a third on modules that
only its asyncio half needs (facts: `benchmarks/cli_startup.py`). Here they are put off until something uses them."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

DEFERRED = ("asyncio", "importlib.metadata")


class Deferred(ModuleType):
    """Stands in for a module while others are imported, and asks the real one for everything that is used of it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    if isinstance(sys.modules.get(name), Deferred):
        del sys.modules[name]
    return importlib.import_module(name)


def _iscoroutine(candidate: object) -> bool:
    # SQLAlchemy takes this one function at its import; anything else that it took would only cost the time again.
    found: Callable[[object], bool] = _real("asyncio").iscoroutine
    return found(candidate)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports within run without the garbage collector, and SQLAlchemy's without `DEFERRED`.

    After the block `sys.modules` holds no stand-in: whoever imports one of these modules then gets the real one.
    """
    if "sqlalchemy" in sys.modules:
        yield
        return
    collecting = gc.isenabled()
    gc.disable()
    for name in DEFERRED:
        if name not in sys.modules:
            _stand_in(name)
    try:
        yield
    finally:
        for name in DEFERRED:
            _stand_down(name)
        gc.freeze()  # what is imported stays; the collector need not look at it again
        if collecting:
            gc.enable()


def _stand_in(name: str) -> None:
    module = Deferred(name)
    if name == "asyncio":
        vars(module)["iscoroutine"] = _iscoroutine
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _stand_down(name: str) -> None:
    if isinstance(sys.modules.get(name), Deferred):
        del sys.modules[name]
    parent, _, child = name.rpartition(".")
    if parent and isinstance(getattr(sys.modules[parent], child, None), Deferred):
        delattr(sys.modules[parent], child)
