"""What an adoption asks: which versions came from which path, which bases there are, and where a content is already."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, and_, select

from registry.catalog.rows import batches
from registry.catalog.tables import artifact, component, version, version_metadata


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A version, as far as an adoption needs it.

    Attributes:
        base: reference of its base.
        metadata: those of the keys that were asked for, as text.
    """

    id: int
    namespace: str
    name: str
    number: int
    digest: str
    kind: str
    state: str
    base: str | None
    metadata: dict[str, str]

    @property
    def artifact(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def reference(self) -> str:
        return f"{self.artifact}@{self.number}"


_base_version = version.alias("base_version")
_base_artifact = artifact.alias("base_artifact")
_COLUMNS = select(
    version.c.id,
    artifact.c.namespace,
    artifact.c.name,
    version.c.number,
    version.c.manifest_digest,
    version.c.kind,
    version.c.state,
    _base_artifact.c.namespace.label("base_namespace"),
    _base_artifact.c.name.label("base_name"),
    _base_version.c.number.label("base_number"),
)
_ROWS = (
    _COLUMNS.join(artifact, artifact.c.id == version.c.artifact_id)
    .outerjoin(_base_version, _base_version.c.id == version.c.base_id)
    .outerjoin(_base_artifact, _base_artifact.c.id == _base_version.c.artifact_id)
)


def names_in(connection: Connection, namespace: str) -> set[str]:
    """All names of a namespace."""
    return set(connection.execute(select(artifact.c.name).where(artifact.c.namespace == namespace)).scalars())


def versions_with(connection: Connection, namespace: str, key: str, others: Collection[str] = ()) -> list[VersionRow]:
    """Versions of a namespace, removed ones too, that have a key of metadata; by age.

    Args:
        others: further keys to read.
    """
    has_key = and_(version_metadata.c.version_id == version.c.id, version_metadata.c.key == key)
    statement = _ROWS.join(version_metadata, has_key).where(artifact.c.namespace == namespace)
    return _rows(connection, statement, (key, *others))


def versions_of_content(connection: Connection, content_digest: str, keys: Collection[str] = ()) -> list[VersionRow]:
    """Versions with this content, under whatever name, removed ones too; the oldest first."""
    return _rows(connection, _ROWS.where(version.c.content_digest == content_digest), keys)


def bases(connection: Connection, keys: Collection[str] = ()) -> list[VersionRow]:
    """Present versions of the kind `base`, the oldest first."""
    return _rows(connection, _ROWS.where(version.c.kind == "base", version.c.state == "present"), keys)


def layouts_of_versions(connection: Connection, version_ids: Collection[int]) -> dict[int, dict[str, int]]:
    """Row ids of the layouts of versions, by component."""
    found: dict[int, dict[str, int]] = {}
    for batch in batches(version_ids):
        rows = connection.execute(
            select(component.c.version_id, component.c.role, component.c.layout_id)
            .where(component.c.version_id.in_(batch))
            .order_by(component.c.version_id, component.c.role)
        )
        for version_id, role, layout_id in rows:
            found.setdefault(version_id, {})[role] = layout_id
    return found


def _rows(connection: Connection, statement: Select[Any], keys: Collection[str]) -> list[VersionRow]:
    rows = connection.execute(statement.order_by(version.c.id)).all()
    said: dict[int, dict[str, str]] = {}
    for batch in batches([row.id for row in rows] if keys else []):
        asked = version_metadata.c.version_id.in_(batch), version_metadata.c.key.in_(list(keys))
        for version_id, key, text in connection.execute(
            select(version_metadata.c.version_id, version_metadata.c.key, version_metadata.c.text_value).where(*asked)
        ):
            said.setdefault(version_id, {})[key] = text
    return [
        VersionRow(
            id=row.id,
            namespace=row.namespace,
            name=row.name,
            number=row.number,
            digest=row.manifest_digest,
            kind=row.kind,
            state=row.state,
            base=None if row.base_number is None else f"{row.base_namespace}/{row.base_name}@{row.base_number}",
            metadata=said.get(row.id, {}),
        )
        for row in rows
    ]
