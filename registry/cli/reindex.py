"""`registry reindex`: making a catalog again that was lost or damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from registry.cli.opening import not_found
from registry.cli.options import Command, Options, common_options
from registry.cli.output import emit, emit_json, message, waiting
from registry.cli.startup import quick_imports

if TYPE_CHECKING:
    from registry.operations.reindex import Reindexed


@click.command(
    name="reindex",
    cls=Command,
    short_help="Make a lost or damaged catalog again.",
    examples=["registry reindex", "registry reindex --registry postgresql://db.example/models --store blobs/"],
)
@click.option("--store", metavar="FOLDER", help="Folder of the blobs, where a server has lost what said so.")
@click.option("--skip-damaged", is_flag=True, help="Let names end before what is missing or damaged in their journals.")
@common_options
@click.pass_obj
def reindex_command(options: Options, store: str | None, skip_damaged: bool) -> None:
    """Make a registry's catalog again from its journal and manifests, all of it or nothing.

    A catalog that can still be read is emptied and filled in one transaction; a damaged file is kept beside the new
    one. Nothing of the store is changed.
    """
    with quick_imports():
        from registry.core.errors import RegistryNotFound
        from registry.operations.discover import locate
        from registry.operations.reindex import reindex

    location = locate(options.registry)
    try:
        with waiting("making the catalog again"):
            done = reindex(location, store=store, skip_damaged=skip_damaged)
    except RegistryNotFound:
        if location.default:
            raise not_found(location) from None
        raise
    if options.json:
        emit_json(document(done))
        return
    for stop in done.left_out:
        message(f"left out: {stop}")
    if done.unreadable:
        message(f"{len(done.unreadable)} blobs are missing or damaged; 'registry fsck' says who suffers")
    if done.kept_as is not None:
        message(f"note: the damaged catalog is kept as {done.kept_as}")
    emit(f"made the catalog again: {done.names} names, {done.versions} versions, {done.events} events")


def document(done: Reindexed) -> dict[str, Any]:
    """What `registry reindex --json` prints."""
    return {
        "registry": done.registry,
        "names": done.names,
        "versions": done.versions,
        "events": done.events,
        "left_out": [
            {"name": stop.name, "seq": stop.seq, "version": stop.version, "why": stop.why} for stop in done.left_out
        ],
        "unreadable": [{"digest": f"sha256:{digest}", "why": why} for digest, why in done.unreadable],
        "rescued": done.rescued,
        "kept_as": None if done.kept_as is None else str(done.kept_as),
    }
