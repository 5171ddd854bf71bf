"""`registry export`."""

from __future__ import annotations

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import emit, emit_json, escaped, human_size, waiting


@click.command(
    name="export",
    cls=Command,
    short_help="Write versions as a bundle for another registry.",
    examples=[
        "registry export walk/perturb:prod --to perturb.tar",
        "registry export walk/perturb@1 walk/perturb@2 --to bundle/ --no-base",
    ],
)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--to", "to", metavar="DEST", required=True, help="A new folder, or a file that ends in .tar.")
@click.option("--no-base", is_flag=True, help="Leave out the tensors of bases: they are recorded, and pushed later.")
@click.option("--force", is_flag=True, help="Replace a .tar file that is there.")
@common_options
@click.pass_obj
def export_command(options: Options, refs: tuple[str, ...], to: str, no_base: bool, force: bool) -> None:
    """Write versions REF to DEST, with all that they came from: bases, parents, metadata, metrics, tags and history.

    `registry import` takes them into another registry. The same versions give the same bytes.
    """
    with opened(options) as registry, waiting(f"exporting {', '.join(refs)}"):
        result = registry.export(*refs, to=to, no_base=no_base, force=force)
    if options.json:
        from registry.cli.documents import export_document

        emit_json(export_document(result))
        return
    count = f"{len(result.versions)} versions" if len(result.versions) != 1 else "1 version"
    emit(f"exported {count} to {escaped(str(result.path))}  ({human_size(result.bytes)})")
    for one in result.versions:
        came = "" if one.asked else "  came along, without its tensors" if one.external else "  came along"
        emit(f"  {one.reference}{came}")
