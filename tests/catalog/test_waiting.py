from __future__ import annotations

import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from types import FrameType

import pytest
import torch

from registry import Registry


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def test_a_writer_that_waits_for_another_hears_an_interrupt(tmp_path: Path) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        registry.push({"weight": torch.ones(2)}, "walk/base")
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with closing(sqlite3.connect(tmp_path / "registry" / "catalog.sqlite", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                started = time.monotonic()
                with pytest.raises(KeyboardInterrupt):
                    registry.tag("walk/base", "prod")
                assert time.monotonic() - started < 30  # of the 120 s for which it would wait
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert registry.get("walk/base").tags == ()
        assert registry.tag("walk/base", "prod").tags == ("prod",)
