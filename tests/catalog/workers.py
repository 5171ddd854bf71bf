"""What the processes of `test_concurrency.py` run. A fork server imports this module once, and forks them from it."""

from __future__ import annotations

from multiprocessing.synchronize import Barrier
from pathlib import Path

import registry.catalog.insertion
import registry.formats.paths
import registry.operations.push  # noqa: F401  # these three are loaded in the fork server, not eight times after it
from registry import Registry

_start: Barrier | None = None


def prepare(start: Barrier) -> None:
    """Runs first in each process."""
    global _start
    _start = start


def push_each(url: str, name: str, sources: list[Path], tag: str | None) -> list[int]:
    """Pushes one after the other when all processes are ready; gives the numbers."""
    assert _start is not None
    with Registry.open(url) as registry:
        _start.wait(timeout=60)
        tags = [tag] if tag else []
        return [registry.push(source, name, tags=tags, metadata={"file": source.name}).version for source in sources]
