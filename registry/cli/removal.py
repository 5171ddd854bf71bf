"""`registry rm` and `registry restore`: taking versions away, and bringing them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from registry.cli.opening import opened
from registry.cli.options import Command, Options, common_options
from registry.cli.output import emit, emit_json, message

if TYPE_CHECKING:
    from registry.operations.removal import Removal


@click.command(
    name="rm",
    cls=Command,
    short_help="Remove versions; 'registry restore' brings them back until gc.",
    examples=["registry rm walk/perturb@3", "registry rm walk/perturb@1 walk/perturb@2 -m 'trained on bad data'"],
)
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@click.option("-m", "--why", metavar="WHY", help="Why; kept in the history.")
@common_options
@click.pass_obj
def rm_command(options: Options, refs: tuple[str, ...], why: str | None) -> None:
    """Remove versions, all of them or none.

    Nothing finds them any more, and their numbers are never given again. A version that others came from (as their
    base or a parent) stays as long as they do, and so does one with a protected tag. Other tags stay where they are
    and say that it was removed. The bytes go with 'registry gc', after a grace period.
    """
    with opened(options) as registry:
        removed = registry.remove(*refs, why=why)
    if options.json:
        emit_json([_document(one) for one in removed])
        return
    for one in removed:
        emit(f"removed {one.reference}")
        for tag in one.tags:
            message(f"note: {one.name}:{tag} still points to it; move it with: registry tag REF {tag}")


@click.command(
    name="restore",
    cls=Command,
    short_help="Bring removed versions back.",
    examples=["registry restore walk/perturb@3"],
)
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@click.option("-m", "--why", metavar="WHY", help="Why; kept in the history.")
@common_options
@click.pass_obj
def restore_command(options: Options, refs: tuple[str, ...], why: str | None) -> None:
    """Bring removed versions back under their numbers, all of them or none.

    A REF is namespace/name@3, namespace/name@sha256:ab12 or a tag that still points to the version. After 'registry gc'
    took its bytes, pushing the same thing again brings a version back.
    """
    with opened(options) as registry:
        restored = registry.restore(*refs, why=why)
    if options.json:
        emit_json([_document(one) for one in restored])
        return
    for one in restored:
        emit(f"restored {one.reference}" if one.changed else f"{one.reference} was not removed")


def _document(one: Removal) -> dict[str, Any]:
    return {
        "name": one.name,
        "version": one.version,
        "digest": f"sha256:{one.digest}",
        "tags": list(one.tags),
        "changed": one.changed,
    }
