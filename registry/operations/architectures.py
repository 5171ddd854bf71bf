"""Architectures of versions: recorded when a live model that says how it was built is pushed (a file says it to who
opens it: formats.model_config), and read again by who wants to build one like it. torch is imported only for a push of
something live."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from registry.catalog.descriptions import descriptions_of
from registry.catalog.versions import base_of, records, resolve
from registry.core.architecture import MAX_BYTES, ROLE, Architecture, read_architecture
from registry.core.errors import Corrupt, InvalidInput
from registry.core.reference import parse_reference
from registry.formats.source import Source
from registry.operations.context import Context
from registry.operations.reading import blob_bytes


def add_architecture(opened: Source, source: Any) -> None:
    """Describes what is pushed by its architecture, where it is live and says it.

    Args:
        source: what `opened` was read from.
    """
    if isinstance(source, Source | str | os.PathLike | Mapping):
        return
    from registry.formats.live_architecture import live_architecture

    found, notes = live_architecture(source)
    opened.notes += notes
    if found is not None:
        opened.described = {**opened.described, ROLE: found.to_bytes()}


def architecture(context: Context, reference: str) -> Architecture | None:
    """The architecture of a version; see `Registry.architecture`."""
    with context.reading() as connection:
        one: int | None = resolve(connection, parse_reference(reference)).id
        digest = None
        while one is not None and digest is None:
            digest = descriptions_of(connection, one).get(ROLE)
            described, one = one, base_of(connection, one)
        if digest is None:
            return None
        pinned = records(connection, [described])[0].reference
    size = context.store.blobs.size(digest)
    what = f"the architecture of {pinned}"
    if size > MAX_BYTES:
        raise Corrupt(f"blob {digest}, {what}: expected at most {MAX_BYTES} bytes, found {size}")
    try:
        return read_architecture(blob_bytes(context.store.blobs, digest), what)
    except InvalidInput as error:
        raise Corrupt(f"blob {digest}: {error}") from error
