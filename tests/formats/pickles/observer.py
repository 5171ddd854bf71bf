"""Sees what the interpreter does while something is read: a hook of its own auditing, with no part of it replaced."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_events: list[str] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _events is not None and event != "builtins.id":  # identity, which reads nothing but an address
        _events.append(event)


sys.addaudithook(_hook)


@contextmanager
def nothing_runs(folder: Path) -> Iterator[None]:
    """Fails if anything is imported, opened, executed, started or connected, or a file appears in the folder."""
    global _events
    modules, files, environment = set(sys.modules), set(folder.iterdir()), dict(os.environ)
    _events = []
    try:
        yield
    finally:
        seen, _events = _events, None
    assert not seen, seen
    assert set(sys.modules) == modules
    assert set(folder.iterdir()) == files
    assert dict(os.environ) == environment
