"""What lies behind a version: its components, files and blobs."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from registry.catalog.blobs import read_layout
from registry.catalog.tables import blob, component, finding, layout, version_blob, version_file
from registry.core.digest import unpack_digests
from registry.core.errors import Corrupt
from registry.core.findings import Finding
from registry.core.layout import Layout
from registry.core.placement import unpack_entries


@dataclass(frozen=True)
class StoredComponent:
    """One component with where its tensors lie.

    Attributes:
        tensors: digests in layout order.
        places: (blob digest, ordinal in that blob) in layout order.
    """

    role: str
    layout: Layout
    tensors: tuple[str, ...]
    places: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class StoredFile:
    """One file of a version.

    Attributes:
        blob: the file itself, or the header of a safetensors file.
        whole: which of the two.
    """

    path: str
    sha256: str
    size: int
    role: str | None
    blob: str
    whole: bool


@dataclass(frozen=True)
class Contents:
    """All that a pull or load needs of the catalog."""

    components: dict[str, StoredComponent]
    files: tuple[StoredFile, ...]
    blobs: tuple[tuple[str, str], ...]


def read_contents(connection: Connection, version_id: int) -> Contents:
    """Components, files and blobs of a version, from one snapshot.

    Raises:
        Corrupt: rows that contradict each other.
    """
    blobs = {
        row.position: (row.digest, row.role)
        for row in connection.execute(
            select(version_blob.c.position, version_blob.c.role, blob.c.digest)
            .join(blob, blob.c.id == version_blob.c.blob_id)
            .where(version_blob.c.version_id == version_id)
            .order_by(version_blob.c.position)
        )
    }
    components = {}
    rows = connection.execute(
        select(component.c.role, component.c.layout_id, component.c.digests, component.c.placement, layout.c.digest)
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
        components[row.role] = StoredComponent(row.role, its_layout, tensors, places)
    files = tuple(
        StoredFile(row.path, row.sha256, row.size, row.role, blobs[row.blob_position][0], row.whole)
        for row in connection.execute(
            select(version_file).where(version_file.c.version_id == version_id).order_by(version_file.c.path)
        )
    )
    return Contents(components, files, tuple(blobs.values()))


def findings_of(connection: Connection, version_id: int) -> tuple[Finding, ...]:
    """What the push of a version noticed."""
    rows = connection.execute(select(finding).where(finding.c.version_id == version_id).order_by(finding.c.position))
    return tuple(
        Finding(row.code, row.severity, row.subject, row.message, row.expected, row.found, row.mend) for row in rows
    )
