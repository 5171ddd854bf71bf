"""`registry push`."""

from __future__ import annotations

from typing import Any

import click

from registry.cli.opening import opened
from registry.cli.options import (
    KINDS,
    Command,
    Options,
    annotation_options,
    attachment_options,
    check_step,
    common_options,
    metadata_values,
    metric_values,
)
from registry.cli.output import YELLOW, emit, emit_json, human_size, message, report_findings, waiting


@click.command(
    name="push",
    cls=Command,
    short_help="Push a folder or a file of tensors as a new version.",
    examples=[
        "registry push base.safetensors walk/base:v1",
        "registry push out/ walk/perturb --base walk/base:v1 --tag prod \\",
        "    --meta robot=a1 --metric reward=912.5 --step 40000 -m 'longer training'",
    ],
)
@click.argument("source")
@click.argument("ref")
@click.option("--base", metavar="REF", help="Version that it was trained on.")
@click.option("--tag", "tags", metavar="T", multiple=True, help="Tag to move to the version. Repeat for more.")
@annotation_options
@click.option(
    "--kind",
    metavar="KIND",
    type=click.Choice(KINDS),
    help=f"{', '.join(KINDS)}. [default: what the tensors' names say]",
)
@click.option("-m", "--message", "text", metavar="TEXT", help="Why; kept with the version.")
@click.option("--continued-from", metavar="REF", help="Version whose training this one continues.")
@click.option(
    "--external",
    is_flag=True,
    help="Record layout, tensor digests and place, store no tensors: for bases of many gigabytes. It can be checked "
    "against, not pulled.",
)
@click.option("--force", is_flag=True, help="Store an adapter that does not fit its base, with its findings.")
@attachment_options(files="tokenizer, README", larger="a larger one is refused")
@common_options
@click.pass_obj
def push_command(
    options: Options,
    /,
    source: str,
    ref: str,
    metadata: dict[str, str],
    metrics: dict[str, str],
    step: int | None,
    text: str | None,
    attachment_limit: int | None,
    **keywords: Any,
) -> None:
    """Push SOURCE as a new version of REF, namespace/name or namespace/name:tag.

    SOURCE is a PEFT folder (adapter_config.json and adapter_model.safetensors or .bin), a folder that transformers or
    diffusers saved a model in, a .safetensors file, or a .pth, .pt, .ckpt or .bin of torch.save, of which nothing is
    run. The very same thing again makes no new version: its tags and metadata are added to the one that is there.
    """
    check_step(step, metrics)
    noted, measured = metadata_values(metadata), metric_values(metrics)
    with opened(options, make_default=True) as registry, waiting(f"pushing {source}"):
        result = registry.push(
            source,
            ref,
            metadata=noted,
            metrics=measured,
            step=step,
            message=text,
            attachment_limit=None if attachment_limit is None else attachment_limit << 20,
            **keywords,
        )
    if options.json:
        from registry.cli.documents import push_document

        emit_json(push_document(result))
    else:
        tags = f"  {', '.join(result.tags)}" if result.tags else ""
        sizes = f"{human_size(result.bytes_total)}; {human_size(result.bytes_new)} added to the store"
        emit(
            f"pushed {result.reference}  {result.kind}{tags}  ({sizes})"
            if result.created
            else f"already there: {result.reference}{tags}"
        )
    if result.same_content_as is not None:
        message(f"note: same content as {result.name}@{result.same_content_as}, in another form", YELLOW)
    report_findings(result.findings, result.notes)
