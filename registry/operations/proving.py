"""Behaviour probes of versions: made when a live model is pushed, run again when one is loaded. A probe is kept beside
its version, because it depends on the machine that made it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from registry.catalog.descriptions import descriptions_of
from registry.catalog.versions import records, resolve
from registry.core.errors import Corrupt, InvalidInput, NotFound
from registry.core.reference import parse_reference
from registry.formats.source import Source
from registry.operations.context import Context
from registry.operations.reading import blob_bytes

if TYPE_CHECKING:
    from torch import nn

    from registry.formats.probe import Probe
    from registry.formats.proof import Proof

ROLE = "probe"
AUTOMATIC = "auto"


def add_probe(opened: Source, source: Any, wanted: Any, adapter_name: str | None) -> None:
    """Makes a probe of what is pushed, or notes why there is none.

    Args:
        source: what `opened` was read from.
        wanted: `probe=` of `Registry.push`.

    Raises:
        InvalidInput: inputs were given that the source does not take, or that is no live model.
        ModelChanged
    """
    if isinstance(source, Source | str | os.PathLike | Mapping):
        if not isinstance(wanted, bool) and not (isinstance(wanted, str) and wanted == AUTOMATIC):
            raise InvalidInput(f"a {opened.form} computes nothing, so probe= has no use; push the live model instead")
        return
    from registry.formats.live import choose_adapter, find_adapted
    from registry.formats.probing import NoProbe, make_probe

    holder = find_adapted(source) if opened.kind == "adapter" else None
    adapter = None if holder is None else choose_adapter(holder, adapter_name)
    found = make_probe(source, wanted, adapter=adapter)
    if isinstance(found, NoProbe):
        opened.notes += () if found.note is None else (found.note,)
    else:
        opened.described = {**opened.described, ROLE: found.to_bytes()}


def read_version_probe(context: Context, reference: str) -> tuple[str, Probe]:
    """The pinned reference of a version, and its probe.

    Raises:
        NotFound: the version has none; and what `resolve` raises.
        BlobNotFound, DigestMismatch, Corrupt: the store is damaged.
    """
    from registry.formats.probe import MAX_BLOB_BYTES, read_probe

    with context.reading() as connection:
        key = resolve(connection, parse_reference(reference))
        pinned = records(connection, [key.id])[0].reference
        digest = descriptions_of(connection, key.id).get(ROLE)
    if digest is None:
        raise NotFound(
            f"{pinned} has no behaviour probe, so nothing can be proven; push the live model that it came from again, "
            "with inputs for it as probe="
        )
    size = context.store.blobs.size(digest)
    if size > MAX_BLOB_BYTES:
        raise Corrupt(f"blob {digest}, the probe of {pinned}: expected at most {MAX_BLOB_BYTES} bytes, found {size}")
    try:
        return pinned, read_probe(blob_bytes(context.store.blobs, digest), f"the probe of {pinned}")
    except InvalidInput as error:
        raise Corrupt(f"blob {digest}: {error}") from error


def prove(context: Context, reference: str, model: nn.Module) -> Proof:
    """Runs a version's probe on a model; see `Registry.prove`."""
    from registry.formats.proof import prove as prove_probe

    pinned, probe = read_version_probe(context, reference)
    return prove_probe(model, probe, pinned)
