"""Importing a bundle: all of it is proven, then its versions are pushed one after the other, as anyone would push them.
Numbers are given anew; what was said of a version is said again, and its journal comes along as its history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from registry.catalog.blobs import external_of_version
from registry.catalog.versions import VersionKey, resolve
from registry.core.bundle import BundledVersion
from registry.core.errors import InvalidInput, NotFound, TagMoved
from registry.core.reference import Reference, parse_artifact
from registry.formats.bundle import open_bundle
from registry.operations.bundled import BundleContents
from registry.operations.context import Context
from registry.operations.push import push
from registry.operations.push_request import check_request
from registry.operations.tagging import move_tag


@dataclass(frozen=True)
class ImportedVersion:
    """One version of a bundle, and what became of it.

    Attributes:
        source: its reference where it comes from.
        reference: its reference here.
        created: False where the name had this very version already.
        external: its tensors are not in this registry.
        bytes_new: bytes that the store did not hold before.
    """

    source: str
    reference: str
    digest: str
    asked: bool
    created: bool
    external: bool
    bytes_new: int


@dataclass(frozen=True)
class ImportResult:
    """What an import did.

    Attributes:
        registry: id of the registry that the bundle comes from.
        versions: each after its base and its parents.
        tags: `namespace/name:tag` of those that were set.
        notes: what was left as it is, such as tags that are there already.
    """

    registry: str
    versions: tuple[ImportedVersion, ...]
    tags: tuple[str, ...]
    notes: tuple[str, ...]


def import_bundle(context: Context, path: Path, *, name: str | None = None) -> ImportResult:
    """Imports a bundle; see `Registry.import_`."""
    context.require_writable()
    if name is not None:
        parse_artifact(name)
    with open_bundle(path) as bundle:
        contents = BundleContents(bundle)
        renamed = _renaming(contents.index.versions, name)
        notes = contents.prove()
        done: list[ImportedVersion] = []
        here: dict[str, str] = {}
        for entry in contents.index.versions:
            artifact = renamed.get(entry.artifact, entry.artifact)
            imported = _import_version(context, contents, entry, artifact, here)
            here[entry.reference] = imported.reference
            done.append(imported)
    tags, left = _set_tags(context, contents.index.versions, here, contents.index.registry)
    return ImportResult(contents.index.registry, tuple(done), tags, (*notes, *left))


def _renaming(versions: Sequence[BundledVersion], name: str | None) -> dict[str, str]:
    if name is None:
        return {}
    asked = sorted({one.artifact for one in versions if one.asked})
    if len(asked) > 1:
        raise InvalidInput(f"the bundle was made for {', '.join(asked)}; --as can rename one name alone")
    return {asked[0]: name}


def _import_version(
    context: Context, contents: BundleContents, entry: BundledVersion, artifact: str, here: dict[str, str]
) -> ImportedVersion:
    with context.reading() as connection:
        known = _present(connection, artifact, entry.digest)
        missing = known is not None and bool(external_of_version(connection, known.id))
    if known is not None and (not missing or entry.external is not None):
        reference = f"{artifact}@{known.number}"
        return ImportedVersion(entry.reference, reference, entry.digest, entry.asked, False, missing, 0)
    found = contents.version(entry)
    past, parents = found.past, found.manifest.parents
    request = check_request(
        artifact,
        base=None if past.base is None else here[past.base],
        kind=entry.kind,
        message=past.message,
        parents=[(one.relation, here[source], one.weight) for one, source in zip(parents, past.parents, strict=True)],
        external=entry.external is not None,
        force=True,  # it was stored before, and said so then
    )
    result = push(context, contents.source(entry, found), request)
    with context.reading() as connection:
        pushed = _present(connection, artifact, entry.digest)
        missing = pushed is not None and bool(external_of_version(connection, pushed.id))
    return ImportedVersion(
        entry.reference, result.reference, result.digest, entry.asked, result.created, missing, result.bytes_new
    )


def _present(connection: Connection, artifact: str, digest: str) -> VersionKey | None:
    try:
        return resolve(connection, Reference(*parse_artifact(artifact), digest=digest))
    except NotFound:
        return None


def _set_tags(
    context: Context, versions: Sequence[BundledVersion], here: dict[str, str], registry: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sets the tags that are not here yet; one that is stays where it points."""
    made: list[str] = []
    notes: list[str] = []
    for entry in versions:
        reference = here[entry.reference]
        artifact = reference.rpartition("@")[0]
        for tag in entry.tags:
            why = f"imported from {entry.reference} of registry {registry}"
            try:
                _, moved = move_tag(context, reference, tag, why=why, expected=0)
            except TagMoved:
                pointed = _number(context, artifact, tag)
                if f"{artifact}@{pointed}" != reference:
                    notes.append(f"the tag {artifact}:{tag} stays at @{pointed}; in the bundle it is at {reference}")
                continue
            if moved:
                made.append(f"{artifact}:{tag}")
    return tuple(made), tuple(notes)


def _number(context: Context, artifact: str, tag: str) -> int | None:
    with context.reading() as connection:
        try:
            return resolve(connection, Reference(*parse_artifact(artifact), tag=tag)).number
        except NotFound:
            return None
