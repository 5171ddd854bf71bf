"""`registry annotate`."""

from __future__ import annotations

import click

from registry.cli.opening import opened
from registry.cli.options import (
    Command,
    Options,
    annotation_options,
    check_step,
    common_options,
    metadata_values,
    metric_values,
)
from registry.cli.output import emit, emit_json


@click.command(
    name="annotate",
    cls=Command,
    short_help="Add metadata and metrics to a version.",
    examples=["registry annotate walk/perturb:prod --meta approved=yes --metric reward=930"],
)
@click.argument("ref")
@annotation_options
@common_options
@click.pass_obj
def annotate_command(
    options: Options,
    ref: str,
    metadata: dict[str, str],
    metrics: dict[str, str],
    step: int | None,
) -> None:
    """Say more of version REF: metadata and metrics. Earlier values stay in its history."""
    if not metadata and not metrics:
        raise click.UsageError("nothing to say; give --meta K=V or --metric K=V")
    check_step(step, metrics)
    noted, measured = metadata_values(metadata), metric_values(metrics)
    with opened(options) as registry:
        version = registry.annotate(ref, metadata=noted, metrics=measured, step=step)
    if options.json:
        from registry.cli.documents import version_document

        emit_json(version_document(version))
    else:
        count = len(metadata) + len(metrics)
        emit(f"{version.reference}: noted {count} {'value' if count == 1 else 'values'}")
