"""`registry pull`."""

from __future__ import annotations

import click

from registry.cli.opening import opened
from registry.cli.options import FORMATS, Command, Options, common_options
from registry.cli.output import emit, emit_json, escaped, human_size, waiting


@click.command(
    name="pull",
    cls=Command,
    short_help="Write a version's files to a folder or file.",
    examples=[
        "registry pull walk/perturb:prod back/",
        "registry pull walk/perturb@1 peft/ --format peft",
        "registry pull walk/perturb@1 adapter.pth --format pth",
    ],
)
@click.argument("ref")
@click.argument("dest")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="native",
    show_default=True,
    help="native: the very files that were pushed. peft: a folder for PeftModel.from_pretrained. safetensors: one file "
    "with the configuration in its header. pth: one file for torch.load(weights_only=True), as pdp reads it.",
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@common_options
@click.pass_obj
def pull_command(options: Options, ref: str, dest: str, form: str, force: bool) -> None:
    """Write the files of version REF to DEST, proven by their sha256, all or nothing.

    DEST is a folder (made if need be) for a version of several files; a file, or a folder that is there, for a
    version of one.
    """
    with opened(options) as registry, waiting(f"pulling {ref}"):
        result = registry.pull(ref, dest, format=form, force=force)
    if options.json:
        from registry.cli.documents import pull_document

        emit_json(pull_document(result))
    else:
        files = f"{len(result.files)} files" if len(result.files) != 1 else "1 file"
        emit(f"pulled {result.reference} to {escaped(str(result.path))}  ({files}, {human_size(result.bytes)})")
