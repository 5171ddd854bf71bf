"""What the commands share: `--registry` and `--json` (before or after the command's name), `K=V` values, and a command
class whose help ends with examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from registry.core.annotations import MetadataValue

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
KINDS = ("adapter", "base", "checkpoint")
FORMATS = ("native", "peft", "safetensors", "pth")


@dataclass
class Options:
    """What was said for every command.

    Attributes:
        registry: a folder or URL; None: where `registry` looks by itself.
        json: print one JSON document.
    """

    registry: str | None = None
    json: bool = False


class Command(click.Command):
    """A command with examples at the end of its help; a test runs each of them."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", CONTEXT_SETTINGS)
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        write_examples(formatter, self.examples)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    with formatter.section("Example" if len(examples) == 1 else "Examples"):
        for line in examples:
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def common_options(function: F) -> F:
    """Adds `--registry` and `--json`; the one nearer to the end of the command line wins."""
    registry = click.option(
        "--registry",
        metavar="URL",
        expose_value=False,
        callback=_set_registry,
        help="Folder or postgresql:// URL of the registry.",
    )
    as_json = click.option(
        "--json", is_flag=True, expose_value=False, callback=_set_json, help="Print one JSON document."
    )
    return registry(as_json(function))


def _set_registry(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    options = ctx.ensure_object(Options)
    if value == "":
        raise click.BadParameter("it is empty; leave it out for the default", ctx, parameter)
    if value is not None:
        options.registry = value


def _set_json(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    options = ctx.ensure_object(Options)
    options.json = options.json or value


def _pairs(ctx: click.Context, parameter: click.Parameter, values: Iterable[str]) -> dict[str, str]:
    """`K=V` values by key, each split at its first `=`."""
    found: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"expected K=V, found {value!r}", ctx, parameter)
        if key in found:
            raise click.BadParameter(f"{key!r} is given twice", ctx, parameter)
        found[key] = text
    return found


def metadata_values(pairs: Mapping[str, str]) -> dict[str, str | MetadataValue]:
    """`--meta` options as the facade takes them: numbers where they look like numbers, else text."""
    from registry.core.annotations import parse_metadata_text

    return {key: parse_metadata_text(text) for key, text in pairs.items()}


def metric_values(pairs: Mapping[str, str]) -> dict[str, float]:
    """`--metric` options as the facade takes them.

    Raises:
        InvalidInput: a value that is no number.
    """
    from registry.core.annotations import parse_metric_text

    return {key: parse_metric_text(text, key) for key, text in pairs.items()}


def check_step(step: int | None, metrics: Mapping[str, str]) -> None:
    """Refuses a step that would be said of nothing."""
    if step is not None and not metrics:
        raise click.UsageError("--step is the training step of --metric values; give one")


def attachment_options(*, files: str, larger: str) -> Callable[[F], F]:
    """Adds `--attachments/--no-attachments` and `--attachment-limit`.

    Args:
        files: examples of such files.
        larger: what happens to one over the limit.
    """

    def decorate(function: F) -> F:
        keep = click.option(
            "--attachments/--no-attachments",
            default=True,
            help=f"Keep a folder's other files ({files}). [default: on]",
        )
        limit = click.option(
            "--attachment-limit",
            metavar="MIB",
            type=click.IntRange(min=0),
            help=f"Largest of these files, in MiB; {larger}. [default: 256]",
        )
        return keep(limit(function))

    return decorate


def annotation_options(function: F) -> F:
    """Adds `--meta`, `--metric` and `--step`."""
    meta = click.option(
        "--meta",
        "metadata",
        multiple=True,
        metavar="K=V",
        callback=_pairs,
        help="Text or a number to find it by. Repeat for more.",
    )
    metric = click.option(
        "--metric",
        "metrics",
        multiple=True,
        metavar="K=V",
        callback=_pairs,
        help="A measured number; nan and inf are kept. Repeat for more.",
    )
    step = click.option("--step", metavar="N", type=int, help="Training step of the metrics.")
    return meta(metric(step(function)))
