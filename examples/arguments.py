"""What the examples' commands have in common: numbers with a range, and refusals of one line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from registry.core.errors import RegistryError


def number(kind: type[int] | type[float], least: float) -> Callable[[str], Any]:
    """An argument's type: a finite number of this kind, not below the least."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from error
        if not math.isfinite(value) or value < least:
            raise argparse.ArgumentTypeError(f"{text} is not {least:g} or more")
        return value

    return read


@contextmanager
def refusals() -> Iterator[None]:
    """A refusal ends the command with one line and the error's exit code."""
    try:
        yield
    except RegistryError as error:
        print(f"{str(error).replace('force=True', '--force')}", file=sys.stderr)
        sys.exit(error.exit_code)
