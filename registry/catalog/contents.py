"""What lies behind a version: its components, files and blobs."""

from __future__ import annotations

import json
from dataclasses import dataclass

from sqlalchemy import Connection, select

from registry.catalog.blobs import read_layout
from registry.catalog.tables import (
    blob,
    component,
    finding,
    layout,
    lora_config,
    version,
    version_blob,
    version_file,
)
from registry.core.digest import unpack_digests
from registry.core.errors import Corrupt
from registry.core.findings import Finding
from registry.core.layout import Layout
from registry.core.placement import Splice, splices_from_json, unpack_entries


@dataclass(frozen=True)
class StoredComponent:
    """One component with where its tensors lie.

    Attributes:
        tensors: digests in layout order.
        places: (blob digest, ordinal in that blob) in layout order.
        data: digest of its state document, if it has one.
    """

    role: str
    layout: Layout
    tensors: tuple[str, ...]
    places: tuple[tuple[str, int], ...]
    data: str | None = None


@dataclass(frozen=True)
class StoredFile:
    """One file of a version.

    Attributes:
        blob: the file itself, or its skeleton: the file less its tensors.
        whole: which of the two.
        splices: the tensors that come into the skeleton; None where it is the header of a safetensors file that is
            exactly the component `role`.
    """

    path: str
    sha256: str
    size: int
    role: str | None
    blob: str
    whole: bool
    splices: tuple[Splice, ...] | None = None


@dataclass(frozen=True)
class Contents:
    """All that a pull or load needs of the catalog.

    Attributes:
        blobs: (digest, role in the placement).
        external: those of them whose bytes are not in the store.
        config: the adapter's configuration as JSON, in the manifest's spelling.
    """

    components: dict[str, StoredComponent]
    files: tuple[StoredFile, ...]
    blobs: tuple[tuple[str, str], ...]
    external: frozenset[str] = frozenset()
    config: str | None = None


def read_contents(connection: Connection, version_id: int) -> Contents:
    """Components, files and blobs of a version, from one snapshot.

    Raises:
        Corrupt: rows that contradict each other.
    """
    rows = connection.execute(
        select(version_blob.c.position, version_blob.c.role, blob.c.digest, blob.c.state)
        .join(blob, blob.c.id == version_blob.c.blob_id)
        .where(version_blob.c.version_id == version_id)
        .order_by(version_blob.c.position)
    ).all()
    blobs = {row.position: (row.digest, row.role) for row in rows}
    external = frozenset(row.digest for row in rows if row.state == "external")
    components = {}
    rows = connection.execute(
        select(component, layout.c.digest)
        .join(layout, layout.c.id == component.c.layout_id)
        .where(component.c.version_id == version_id)
    ).all()
    for row in rows:
        its_layout = read_layout(connection, row.layout_id)
        tensors = unpack_digests(bytes(row.digests))
        entries = unpack_entries(bytes(row.placement))
        if its_layout.digest != row.digest or len(tensors) != len(its_layout) or len(entries) != len(its_layout):
            raise Corrupt(f"component {row.role} of version row {version_id} does not agree with its layout")
        if any(position not in blobs for position, _ in entries):
            raise Corrupt(f"component {row.role} of version row {version_id} names a blob that the version has not")
        places = tuple((blobs[position][0], ordinal) for position, ordinal in entries)
        if row.data_position is not None and row.data_position not in blobs:
            raise Corrupt(f"component {row.role} of version row {version_id} names a document that the version has not")
        data = None if row.data_position is None else blobs[row.data_position][0]
        components[row.role] = StoredComponent(row.role, its_layout, tensors, places, data)
    files = tuple(
        StoredFile(
            row.path, row.sha256, row.size, row.role, blobs[row.blob_position][0], row.whole, _splices(row.splices)
        )
        for row in connection.execute(
            select(version_file).where(version_file.c.version_id == version_id).order_by(version_file.c.path)
        )
    )
    config = connection.execute(
        select(lora_config.c.document)
        .join(version, version.c.lora_config_id == lora_config.c.id)
        .where(version.c.id == version_id)
    ).scalar()
    return Contents(components, files, tuple(blobs.values()), external, config)


def _splices(text: str | None) -> tuple[Splice, ...] | None:
    try:
        return None if text is None else splices_from_json(json.loads(text))
    except (ValueError, TypeError) as error:
        raise Corrupt(f"splices of a file cannot be read: {error}"[:200]) from error


def findings_of(connection: Connection, version_id: int) -> tuple[Finding, ...]:
    """What the push of a version noticed."""
    rows = connection.execute(select(finding).where(finding.c.version_id == version_id).order_by(finding.c.position))
    return tuple(
        Finding(row.code, row.severity, row.subject, row.message, row.expected, row.found, row.mend) for row in rows
    )
