"""`registry import`."""

from __future__ import annotations

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import YELLOW, emit, emit_json, escaped, human_size, message, waiting


@click.command(
    name="import",
    cls=Command,
    short_help="Take in the versions of a bundle.",
    examples=["registry import perturb.tar", "registry import perturb.tar --as ada/walker"],
)
@click.argument("bundle")
@click.option("--as", "name", metavar="NAME", help="namespace/name for the versions that were asked for.")
@common_options
@click.pass_obj
def import_command(options: Options, bundle: str, name: str | None) -> None:
    """Take in the versions of BUNDLE, a folder or .tar file that `registry export` wrote.

    All of it is proven before anything is written. Versions get new numbers, unless their name has the very same ones;
    tags that are not there yet are set. The same import again completes one that was cut off, and changes nothing else.
    """
    with opened(options, make_default=True) as registry, waiting(f"importing {bundle}"):
        result = registry.import_(bundle, name=name)
    if options.json:
        from registry.cli.documents import import_document

        emit_json(import_document(result))
    else:
        new = sum(one.created for one in result.versions)
        size = human_size(sum(one.bytes_new for one in result.versions))
        count = f"{len(result.versions)} versions" if len(result.versions) != 1 else "1 version"
        emit(f"imported {count} from {escaped(bundle)}, {new} new  ({size} added to the store)")
        for one in result.versions:
            there = "" if one.created else "  already there"
            emit(f"  {one.source} -> {one.reference}{there}{'  without its tensors' if one.external else ''}")
        if result.tags:
            emit(f"  tags: {', '.join(result.tags)}")
    for note in result.notes:
        message(f"note: {note}", YELLOW)
