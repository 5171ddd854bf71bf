"""What a run says of itself while it trains: a file of metrics, and a bar in a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdp.files import write_file
from registry.operations.pull import write_errors


class MetricsFile:
    """One JSON object a line. Lines beyond the step at which a run goes on are dropped: they are made again."""

    def __init__(self, path: Path, global_step: int) -> None:
        self._path = path
        self._step = global_step
        self._file: Any = None

    def __enter__(self) -> MetricsFile:
        with write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
                kept = [line for line in lines if _step_of(line) <= self._step] if self._step else []
                text = "".join(f"{line}\n" for line in kept).encode("utf-8")
                write_file(self._path, lambda file: file.write(text))
            self._file = open(self._path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, values: Mapping[str, Any]) -> None:
        plain = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["global_step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return sys.maxsize  # half a line of a run that was killed


@contextmanager
def progress_bar(end: int, begin: int, *, on: bool) -> Iterator[Any]:
    """A function that is told the step and the loss; a bar on standard error where that is a terminal."""
    if not on or not sys.stderr.isatty():
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=end, completed=begin, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.4g}")
