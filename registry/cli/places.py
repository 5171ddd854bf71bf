"""`registry init` and `registry upgrade`: making a registry, and bringing its database to this program's schema."""

from __future__ import annotations

import os
from pathlib import Path

import click

from registry.cli.opening import not_found
from registry.cli.options import Command, Options, common_options
from registry.cli.output import emit, emit_json, escaped, message
from registry.cli.startup import quick_imports


@click.command(
    name="init",
    cls=Command,
    short_help="Make a registry.",
    examples=["registry init", "registry init postgresql://db.example/models --store /data/models"],
)
@click.argument("path", required=False)
@click.option("--store", metavar="FOLDER", help="Folder of the blobs; needed beside a database server, and only there.")
@common_options
@click.pass_obj
def init_command(options: Options, path: str | None, store: str | None) -> None:
    """Make a registry at PATH: a folder (./.registry by default) or a postgresql:// URL.

    A registry that is there already is left as it is.
    """
    if path is not None and options.registry is not None:
        raise click.UsageError("give the place once: as PATH or with --registry")
    if path == "":
        raise click.UsageError("PATH is empty; leave it out for ./.registry")
    with quick_imports():
        from registry.operations import discover

    place = path or options.registry
    if place is None:
        location = discover.Location(str(discover.working_folder() / discover.FOLDER))
    else:
        location = discover.locate(place)
    context, made = discover.create(location, store=store)
    where = location.url if location.is_path else context.database.what
    context.database.close()
    if options.json:
        emit_json({"registry": where, "id": context.store.registry_id, "created": made})
    else:
        emit(f"{'made the registry' if made else 'there is already a registry:'} {escaped(where)}")
    if place is None and os.environ.get("REGISTRY_URL"):
        message("note: $REGISTRY_URL is set, so commands use the registry that it names, not this one")


@click.command(
    name="upgrade",
    cls=Command,
    short_help="Bring a registry's database to this program's schema.",
    examples=["registry upgrade"],
)
@common_options
@click.pass_obj
def upgrade_command(options: Options) -> None:
    """Bring a registry's database to the schema of this program."""
    with quick_imports():
        from registry.core.errors import RegistryNotFound
        from registry.operations import discover

    location = discover.locate(options.registry)
    try:
        before, after = discover.upgrade_registry(location)
    except RegistryNotFound:
        if not location.default or Path(location.database).exists():
            raise
        raise not_found(location) from None
    if options.json:
        emit_json({"from": before, "to": after})
    elif before == after:
        emit(f"already at {after}")
    else:
        emit(f"upgraded from {before} to {after}")
