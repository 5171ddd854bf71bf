"""Versions: finding the one that a reference names, and reading them as records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Connection, and_, func, literal, select

from registry.catalog.names import name_id
from registry.catalog.rows import batches
from registry.catalog.tables import artifact, event, finding, lora_config, tag, version
from registry.core.errors import InvalidReference, NotFound, TagNotFound, VersionNotFound
from registry.core.reference import Reference


class VersionKey(NamedTuple):
    """A version's row id and number, with its digest."""

    id: int
    artifact_id: int
    number: int
    digest: str


@dataclass(frozen=True)
class VersionRecord:
    """A version as the catalog knows it, without its tensors.

    Attributes:
        digest: of the manifest, hex.
        base: `namespace/name@number` of the base version, if one was declared.
        target_modules: as configured: sorted names, or one regular expression.
        peft_version: that wrote the adapter; None: unknown.
        size: bytes of its files.
        bytes_new: bytes that its push added to the store.
        findings: how many findings of severity error and warning its push recorded.
    """

    id: int
    namespace: str
    artifact_name: str
    number: int
    digest: str
    content_digest: str
    kind: str
    tags: tuple[str, ...]
    base: str | None
    base_digest: str | None
    base_model: str | None
    peft_type: str | None
    r: int | None
    lora_alpha: float | None
    lora_dropout: float | None
    use_rslora: bool | None
    use_dora: bool | None
    target_modules: tuple[str, ...] | str | None
    peft_version: str | None
    torch_version: str | None
    python_version: str | None
    git_commit: str | None
    git_dirty: bool | None
    layout_id: int | None
    size: int
    bytes_new: int
    message: str | None
    created_by: str
    created_at: datetime
    findings: int

    @property
    def name(self) -> str:
        return f"{self.namespace}/{self.artifact_name}"

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.number}"


def version_by_digest(connection: Connection, artifact_id: int, digest: str) -> VersionKey | None:
    """The version of a name that has this manifest, also a removed one."""
    row = connection.execute(
        select(version.c.id, version.c.artifact_id, version.c.number, version.c.manifest_digest).where(
            version.c.artifact_id == artifact_id, version.c.manifest_digest == digest
        )
    ).one_or_none()
    return None if row is None else VersionKey(*row)


def kind_of_version(connection: Connection, version_id: int) -> str:
    kind: str = connection.execute(select(version.c.kind).where(version.c.id == version_id)).scalar_one()
    return kind


def base_of(connection: Connection, version_id: int) -> int | None:
    """Row id of the base that a version was trained on; None: none was declared."""
    found: int | None = connection.execute(select(version.c.base_id).where(version.c.id == version_id)).scalar_one()
    return found


def same_content(connection: Connection, artifact_id: int, content_digest: str, below: int) -> int | None:
    """Number of the oldest version of a name with this content and a number below the given one."""
    return connection.execute(
        select(func.min(version.c.number)).where(
            version.c.artifact_id == artifact_id,
            version.c.content_digest == content_digest,
            version.c.number < below,
            version.c.state == "present",
        )
    ).scalar()


_KEYS = select(version.c.id, version.c.artifact_id, version.c.number, version.c.manifest_digest).join(
    artifact, artifact.c.id == version.c.artifact_id
)


def resolve(connection: Connection, reference: Reference, *, removed: bool = False) -> VersionKey:
    """The version that a reference names.

    Args:
        removed: also one that is not present; only for those who bring it back.

    Raises:
        ArtifactNotFound, VersionNotFound, TagNotFound: each says what there is.
        InvalidReference: a digest prefix that fits several versions.
    """
    found = _fitting(connection, reference, removed=removed)
    if not found:
        raise _not_found(connection, reference)
    if len(found) > 1:
        numbers = ", ".join(f"@{key.number}" for key in reversed(found))
        raise InvalidReference(f"{reference} is ambiguous: it fits {numbers}; give more digits")
    return found[0]


def _fitting(connection: Connection, reference: Reference, *, removed: bool) -> list[VersionKey]:
    """The version that a reference names; of a digest prefix some of those that it fits, newest first."""
    statement = _KEYS.where(artifact.c.namespace == reference.namespace, artifact.c.name == reference.name)
    if not removed:
        statement = statement.where(version.c.state == "present")
    if reference.tag is not None and reference.moment is not None:
        statement = statement.where(version.c.id == _tag_at(connection, reference))
    elif reference.tag is not None:
        of_tag = and_(tag.c.artifact_id == artifact.c.id, tag.c.version_id == version.c.id)
        statement = statement.join(tag, of_tag).where(tag.c.name == reference.tag)
    elif reference.digest is not None:
        low, high = reference.digest.ljust(64, "0"), reference.digest.ljust(64, "f")
        statement = statement.where(version.c.manifest_digest.between(low, high))
    elif reference.number is not None:
        # Of its own type: a number that the column cannot hold is one that is not there.
        statement = statement.where(version.c.number == literal(reference.number, BigInteger))
    elif reference.moment is not None:
        statement = statement.where(version.c.created_at <= reference.moment)
    several = reference.digest is not None
    rows = connection.execute(statement.order_by(version.c.number.desc()).limit(5 if several else 1))
    return [VersionKey(*row) for row in rows]


def _tag_at(connection: Connection, reference: Reference) -> int | None:
    """Row id of the version that a tag pointed to at a time."""
    row = connection.execute(
        select(event.c.kind, event.c.version_id)
        .where(
            event.c.artifact_id == name_id(connection, reference.namespace, reference.name),
            event.c.tag == reference.tag,
            event.c.kind.in_(("tag_moved", "tag_deleted")),
            event.c.at <= reference.moment,
        )
        .order_by(event.c.seq.desc())
        .limit(1)
    ).one_or_none()
    return row.version_id if row is not None and row.kind == "tag_moved" else None


def gone(reference: str, state: str, *, pointer: str | None = None) -> VersionNotFound:
    """The error about a version that is removed or purged.

    Args:
        reference: `namespace/name@number`.
        pointer: the tag by which it was asked for.
    """
    subject = reference if pointer is None else f"{pointer} points to {reference}, which"
    if state == "purged":
        return VersionNotFound(f"{subject} was removed, and gc took its bytes; push it again")
    return VersionNotFound(f"{subject} was removed; to bring it back: registry restore {reference}")


def _not_found(connection: Connection, reference: Reference) -> NotFound:
    artifact_id = name_id(connection, reference.namespace, reference.name)
    if reference.tag is None:
        hidden = _fitting(connection, reference, removed=True)
        if hidden and (reference.number is not None or reference.digest is not None):
            return _gone(connection, reference, hidden[0].id)
        if hidden and reference.moment is None:
            return VersionNotFound(f"{reference}: every version of it was removed; 'registry restore' takes a number")
        if reference.digest is not None:
            return VersionNotFound(f"{reference}: no version of {reference.artifact} has this digest")
        highest = connection.execute(select(artifact.c.last_number).where(artifact.c.id == artifact_id)).scalar()
        return VersionNotFound(f"{reference}: no such version; the highest number of {reference.artifact} is {highest}")
    if reference.moment is not None:
        of_tag = event.c.artifact_id == artifact_id, event.c.tag == reference.tag
        pointed = _tag_at(connection, reference)
        if pointed is None and connection.execute(select(event.c.seq).where(*of_tag).limit(1)).first():
            return TagNotFound(f"{reference}: the tag was not set then; 'registry tag --history' has its moves")
    else:
        pointed = connection.execute(
            select(tag.c.version_id).where(tag.c.artifact_id == artifact_id, tag.c.name == reference.tag)
        ).scalar()
    if pointed is not None:
        return _gone(connection, reference, pointed, pointer=str(reference))
    tags = connection.execute(
        select(tag.c.name).where(tag.c.artifact_id == artifact_id).order_by(tag.c.name).limit(20)
    ).scalars()
    known = ", ".join([*tags, "latest"])
    return TagNotFound(f"{reference}: no such tag; {reference.artifact} has {known}")


def _gone(
    connection: Connection, reference: Reference, version_id: int, *, pointer: str | None = None
) -> VersionNotFound:
    row = connection.execute(select(version.c.number, version.c.state).where(version.c.id == version_id)).one()
    return gone(f"{reference.artifact}@{row.number}", row.state, pointer=pointer)


_base_version = version.alias("base_version")
_base_artifact = artifact.alias("base_artifact")
_RECORDS = (
    select(
        version,
        artifact.c.namespace,
        artifact.c.name.label("artifact_name"),
        lora_config.c.peft_type,
        lora_config.c.r,
        lora_config.c.lora_alpha,
        lora_config.c.lora_dropout,
        lora_config.c.use_rslora,
        lora_config.c.use_dora,
        lora_config.c.base_model,
        lora_config.c.document,
        _base_artifact.c.namespace.label("base_namespace"),
        _base_artifact.c.name.label("base_name"),
        _base_version.c.number.label("base_number"),
        _base_version.c.manifest_digest.label("base_digest"),
    )
    .join(artifact, artifact.c.id == version.c.artifact_id)
    .outerjoin(lora_config, lora_config.c.id == version.c.lora_config_id)
    .outerjoin(_base_version, _base_version.c.id == version.c.base_id)
    .outerjoin(_base_artifact, _base_artifact.c.id == _base_version.c.artifact_id)
)


def records(connection: Connection, ids: Sequence[int]) -> list[VersionRecord]:
    """The versions with these row ids, in their order."""
    found: dict[int, VersionRecord] = {}
    for batch in batches(ids):
        tags = tags_of(connection, batch)
        counts = {
            row.version_id: row.n
            for row in connection.execute(
                select(finding.c.version_id, func.count().label("n"))
                .where(finding.c.version_id.in_(batch), finding.c.severity != "info")
                .group_by(finding.c.version_id)
            )
        }
        for row in connection.execute(_RECORDS.where(version.c.id.in_(batch))):
            found[row.id] = _record(row, tags.get(row.id, ()), counts.get(row.id, 0))
    return [found[identifier] for identifier in ids if identifier in found]


def tags_of(connection: Connection, version_ids: Iterable[int]) -> dict[int, tuple[str, ...]]:
    """Tags by version, sorted."""
    found: dict[int, tuple[str, ...]] = {}
    for batch in batches(version_ids):
        rows = connection.execute(
            select(tag.c.version_id, tag.c.name).where(tag.c.version_id.in_(batch)).order_by(tag.c.name)
        )
        for version_id, name in rows:
            found[version_id] = (*found.get(version_id, ()), name)
    return found


def _record(row: Any, tags: tuple[str, ...], findings: int) -> VersionRecord:
    targets: Any = json.loads(row.document).get("target_modules") if row.document else None
    base = None if row.base_number is None else f"{row.base_namespace}/{row.base_name}@{row.base_number}"
    return VersionRecord(
        id=row.id,
        namespace=row.namespace,
        artifact_name=row.artifact_name,
        number=row.number,
        digest=row.manifest_digest,
        content_digest=row.content_digest,
        kind=row.kind,
        tags=tags,
        base=base,
        base_digest=row.base_digest,
        base_model=row.base_model,
        peft_type=row.peft_type,
        r=row.r,
        lora_alpha=row.lora_alpha,
        lora_dropout=row.lora_dropout,
        use_rslora=row.use_rslora,
        use_dora=row.use_dora,
        target_modules=tuple(sorted(map(str, targets))) if isinstance(targets, list) else targets,
        peft_version=row.peft_version,
        torch_version=row.torch_version,
        python_version=row.python_version,
        git_commit=row.git_commit,
        git_dirty=row.git_dirty,
        layout_id=row.layout_id,
        size=row.size,
        bytes_new=row.bytes_new,
        message=row.message,
        created_by=row.created_by,
        created_at=row.created_at,
        findings=findings,
    )
