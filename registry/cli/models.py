"""`--model module:Class --kwargs JSON`: a model that the user names, built without weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def model_options(function: F) -> F:
    """Adds `--model` and `--kwargs`."""
    model = click.option(
        "--model", metavar="MODULE:CLASS", help="Class to hold it against, imported from here; built without weights."
    )
    kwargs = click.option(
        "--kwargs", metavar="FILE|JSON", help="Arguments of its constructor, or fields of its configuration."
    )
    return model(kwargs(function))


def build_model(path: str | None, kwargs: str | None, other: str | None) -> Any:
    """The model on the meta device; None where no `--model` was given.

    Args:
        other: what else was given to hold against.

    Raises:
        InvalidInput: it cannot be imported or built.
    """
    if path is None:
        if kwargs is not None:
            raise click.UsageError("--kwargs are the arguments of --model; give one")
        return None
    if other is not None:
        raise click.UsageError("give one of a base and --model")
    from registry.formats.model_code import build_on_meta, read_kwargs

    # What the module prints must not get into the document on standard output.
    with redirect_stdout(sys.stderr):
        return build_on_meta(path, {} if kwargs is None else read_kwargs(kwargs))
