"""Pushing: an artifact becomes a version. Bytes before rows: blobs are made durable, then one
transaction makes the version and its events, then the journal objects are written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Connection

from registry.catalog import annotation_rows, blobs, insertion, removal, tags
from registry.catalog.descriptions import add_descriptions, descriptions_of
from registry.catalog.forms import register_form, set_form
from registry.catalog.names import LockedName, name_id
from registry.catalog.versions import VersionKey, kind_of_version, resolve, same_content, tags_of, version_by_digest
from registry.compat.case import ModelSide
from registry.compat.compatibility import in_order
from registry.core.annotations import read_metadata
from registry.core.digest import sha256_hex
from registry.core.errors import (
    ArtifactNotFound,
    Contended,
    DigestMismatch,
    Incompatible,
    InUse,
    InvalidInput,
    NotFound,
)
from registry.core.event import Event
from registry.core.findings import Finding
from registry.core.manifest import Parent
from registry.core.model_form import ROLE as MODULES
from registry.core.reference import parse_reference
from registry.formats.origin import origin_of
from registry.formats.source import Said, Source
from registry.operations.architectures import add_architecture
from registry.operations.checking import live_base_findings
from registry.operations.context import Context, actor, now
from registry.operations.deleting import finish_deleting
from registry.operations.describing import Description, describe
from registry.operations.environment import capture
from registry.operations.forms import add_form, add_rounded
from registry.operations.model_forms import ROLES, VersionForm, version_form
from registry.operations.opening import Opening, open_source
from registry.operations.proving import add_probe
from registry.operations.push_request import Request
from registry.operations.sides import Sides
from registry.operations.writing import (
    StoredVersion,
    changed,
    digest_files,
    store_missing,
    store_version,
    write_plain_files,
)

ATTEMPTS = 3


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        name: `namespace/name`.
        version: its number.
        digest: of the manifest, hex.
        created: False where the name had this very version already.
        tags: all tags that now point to it.
        bytes_total: bytes of the files that were pushed.
        bytes_new: bytes that the store did not hold before, manifest included.
        same_content_as: the oldest version of the name with equal content in another form, if one.
        findings: what the push noticed about the artifact.
        notes: what was left out or is not known.
    """

    name: str
    version: int
    digest: str
    kind: str
    created: bool
    tags: tuple[str, ...]
    bytes_total: int
    bytes_new: int
    same_content_as: int | None = None
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


def push(
    context: Context,
    source: object,
    request: Request,
    how: Opening | None = None,
    *,
    before_storing: Callable[[Description], None] | None = None,
) -> PushResult:
    """Pushes a source; see `Registry.push`.

    Args:
        before_storing: called when it is known what the version is, before anything is stored, and once more under the
            lock of the name where it is not there yet; what it raises ends the push.
    """
    context.require_writable()
    how = how or Opening()
    with open_source(source, kind=request.kind, how=how) as opened:
        kind = request.kind or opened.kind
        if request.external and kind == "adapter":
            raise InvalidInput(f"the {opened.form} is an adapter; only bases and checkpoints are recorded as external")
        if request.external and opened.origin is None and isinstance(source, str | os.PathLike):
            opened.origin = origin_of(Path(source))
        _set_role(opened, kind)
        add_architecture(opened, source)
        add_form(opened, source)
        add_rounded(opened, kind)
        add_probe(opened, source, how.probe, how.adapter_name)
        environment = opened.environment or capture().to_json()
        live = None if isinstance(source, Source | str | os.PathLike | Mapping) else source
        for attempt in range(ATTEMPTS):
            try:
                result, events = _push_once(context, opened, kind, request, environment, before_storing, live)
            except (InUse, Contended) as error:
                if attempt == ATTEMPTS - 1:
                    raise
                if isinstance(error, InUse):
                    # gc was deleting a blob that this push needs: once it is gone it can be stored again.
                    finish_deleting(context)
            else:
                context.journal(events)
                return replace(result, notes=(*opened.notes, *result.notes))
    raise AssertionError("unreachable")


def _set_role(source: Source, kind: str) -> None:
    if kind == "adapter" and source.kind == "base":
        raise InvalidInput(f"the {source.form} holds no adapter tensors, so it is no adapter; leave --kind out")
    if kind != "adapter" and source.kind == "adapter" and source.config is not None:
        raise InvalidInput(f"the {source.form} is an adapter; it cannot be pushed as {kind}")
    if kind == "base" and source.kind == "checkpoint" and source.data:
        raise InvalidInput(f"the {source.form} holds training state; push it as a checkpoint")
    for file in source.tensor_files:
        if kind == "adapter" and "adapter" not in file.entries:
            file.rename_component("model", "adapter")
        elif kind != "adapter" and "model" not in file.entries:
            file.rename_component("adapter", "model")


@dataclass(frozen=True)
class _Ancestry:
    """Parents that a push declared, resolved."""

    base: VersionKey | None
    parents: tuple[tuple[Parent, VersionKey], ...]
    model: ModelSide | None
    base_tensors: Mapping[str, blobs.StoredTensor]


@dataclass(frozen=True)
class _Known:
    """What the catalog has of a version before its push ends.

    Attributes:
        state: `present`, `removed` or `purged`.
        external: blobs that are recorded without their bytes.
        described: digests of blobs that events name, by role.
    """

    state: str
    external: frozenset[str]
    described: Mapping[str, str]


def _push_once(
    context: Context,
    source: Source,
    kind: str,
    request: Request,
    environment: Mapping[str, object],
    before_storing: Callable[[Description], None] | None,
    live: object | None,
) -> tuple[PushResult, list[Event]]:
    with context.reading() as connection:
        ancestry = _ancestry(context, connection, request)
    stored: StoredVersion | None = None
    bytes_added = 0
    filled: frozenset[str] = frozenset()
    descriptions: dict[str, blobs.NewBlob] = {}
    notes: list[str] = []
    with context.store.blobs.batch() as batch:
        files = digest_files(context, source, batch, ancestry.base_tensors, external=request.external)
        plain_files = write_plain_files(source, batch)
        base = None if ancestry.base is None else ancestry.base.digest
        parents = [parent for parent, _ in ancestry.parents]
        described = describe(source, kind, files, plain_files, base=base, parents=parents, model=ancestry.model)
        if live is not None and kind == "adapter" and ancestry.model is not None and described.adapter is not None:
            beside = live_base_findings(live, described.adapter, ancestry.model)
            described = replace(described, findings=in_order([*described.findings, *beside]))
        if source.digest not in (None, described.manifest.digest):
            what = f"the {source.form} as a version of {request.namespace}/{request.name}"
            raise DigestMismatch(what, expected=str(source.digest), actual=described.manifest.digest)
        if before_storing is not None:
            before_storing(described)
        known = _known(context, request, described.manifest.digest)
        if known is None and ancestry.model is not None and not request.force:
            _refuse_misfit(described, source, ancestry.model.reference)
        if known is None or known.state == "purged":
            stored = store_version(context, source, described, files, plain_files, batch, external=request.external)
        elif known.external and not request.external:
            filled = known.external
            bytes_added = store_missing(context, files, filled, batch)
        if not source.is_unchanged():
            raise changed(f"the {source.form}")
        found = dict(source.described)
        for role, find_out in source.described_later.items():
            if known is None or role not in known.described:
                later = find_out()
                notes += later.notes
                if later.data is not None:
                    found[role] = later.data
        for role, data in found.items():
            there = None if known is None else known.described.get(role)
            if there is None:
                put = batch.put([data])
                descriptions[role] = blobs.NewBlob(put.digest, put.size)
                bytes_added += put.size if put.created else 0
            elif there != sha256_hex(data):
                notes.append(f"the version keeps the {role} that it has; that of this push is another")
        form: VersionForm | None = None
        deciding = {role: found[role] for role in ROLES if role in descriptions}
        if known is None or (deciding and MODULES not in known.described):
            form = version_form(kind, described.layouts, deciding)
        if stored is not None:
            stored = replace(stored, bytes_new=stored.bytes_new + bytes_added)
        if stored is not None or filled or descriptions:  # else the batch is dropped as it is
            batch.commit()
    with context.writing() as connection:
        name = context.lock(connection, request.namespace, request.name, create=True)
        version = version_by_digest(connection, name.id, described.manifest.digest)
        created = version is None
        back: Event | None = None
        if version is None:
            if before_storing is not None:
                before_storing(described)
            if stored is None:
                raise InUse(f"{request.namespace}/{request.name} changed during the push; push again")
            new = _new_version(source, described, stored, ancestry, request, environment)
            version = insertion.insert_version(name, replace(new, beside=tuple(descriptions.values())))
        elif stored is not None:
            new = _new_version(source, described, stored, ancestry, request, environment)
            back = insertion.put_back(name, version, replace(new, beside=tuple(descriptions.values())))
        elif removal.states(connection, [version.id])[version.id] == "purged":
            raise InUse(f"{request.namespace}/{request.name} changed during the push; push again")
        else:
            back = removal.restore(name, version, actor=actor(), at=now(), why=insertion.PUSHED_AGAIN)
        if back is not None:
            notes.append("it had been removed, and is back")
        if stored is not None:
            bytes_added = stored.bytes_new
            _require_blobs(context, stored.blobs)
        if filled:
            blobs.mark_present(connection, filled)
            _require_files(context, filled)
        if form is not None and not created:  # before anything for which those who have it as their base may wait
            removal.lock_versions(connection, [version.id])
        for role in descriptions_of(connection, version.id):  # another push may have been faster
            descriptions.pop(role, None)
        add_descriptions(name, version, descriptions, actor=actor(), at=now())
        _require_blobs(context, descriptions.values())
        if form is not None:
            _set_form(connection, version, form)
        if created:
            _say_again(name, version, source.said)
        _annotate(name, version, request, source.metadata if created else {}, created=created)
        name.save()
        result = PushResult(
            name=f"{request.namespace}/{request.name}",
            version=version.number,
            digest=version.digest,
            kind=kind,
            created=created,
            tags=tags_of(connection, [version.id]).get(version.id, ()),
            bytes_total=sum(file.size for file in described.manifest.files),
            bytes_new=bytes_added,
            same_content_as=same_content(connection, name.id, described.content_digest, version.number),
            findings=described.findings,
            notes=tuple(notes),
        )
    return result, name.appended


def _refuse_misfit(described: Description, source: Source, base: str) -> None:
    """
    Raises:
        Incompatible: an adapter that does not fit the base that it is said to be of.
    """
    errors = [one for one in described.findings if one.severity == "error"]
    if errors and described.adapter is not None:
        raise Incompatible(
            f"the {source.form} does not fit its base {base}; nothing was stored (force stores it with its findings)",
            errors,
        )


def _ancestry(context: Context, connection: Connection, request: Request) -> _Ancestry:
    base = None if request.base is None else _parent(connection, request.base, "base")
    if base is not None and kind_of_version(connection, base.id) == "adapter":
        raise InvalidInput(f"base {request.base} is an adapter; name the model that this one was trained on")
    parents: dict[tuple[str, str], tuple[Parent, VersionKey]] = {}
    for relation, reference, weight in request.parents:
        key = _parent(connection, reference, relation)
        if base is not None and (relation, key.digest) == ("trained_on", base.digest):
            continue  # the base says so
        parent = Parent(relation, key.digest, weight)
        known, _ = parents.setdefault((relation, key.digest), (parent, key))
        if known != parent:
            raise InvalidInput(
                f"{relation} {reference} is given twice, with the weights {known.weight} and {weight}; add them up"
            )
    base_tensors = {} if base is None else blobs.tensors_of_version(connection, base.id)
    model = None if base is None else Sides(context, connection).model_or_none(base.id)
    return _Ancestry(base, tuple(parents.values()), model, base_tensors)


def _parent(connection: Connection, reference: str, role: str) -> VersionKey:
    try:
        return resolve(connection, parse_reference(reference))
    except NotFound as error:
        raise type(error)(f"{role} {reference} is not in this registry ({error}); push it first") from error


def _known(context: Context, request: Request, digest: str) -> _Known | None:
    """What is known of this very version under the name; None where the name has it not.

    Raises:
        TagProtected: its bytes are to be stored, and a tag that should move to it is protected; told before any is.
    """
    with context.reading() as connection:
        try:
            identifier = name_id(connection, request.namespace, request.name)
        except ArtifactNotFound:
            return None
        known = version_by_digest(connection, identifier, digest)
        state = None if known is None else removal.states(connection, [known.id])[known.id]
        if state in (None, "purged"):
            tags.refuse_protected(connection, identifier, f"{request.namespace}/{request.name}", request.tags)
        if known is None or state is None:
            return None
        external = blobs.external_of_version(connection, known.id)
        return _Known(state, frozenset(external), descriptions_of(connection, known.id))


def _new_version(
    source: Source,
    described: Description,
    stored: StoredVersion,
    ancestry: _Ancestry,
    request: Request,
    environment: Mapping[str, object],
) -> insertion.NewVersion:
    return insertion.NewVersion(
        manifest=described.manifest,
        content_digest=described.content_digest,
        layouts=described.layouts,
        targets=described.targets,
        placement=stored.placement,
        blobs=stored.blobs,
        base_id=None if ancestry.base is None else ancestry.base.id,
        parents=tuple((parent.relation, key.id, parent.weight) for parent, key in ancestry.parents),
        bytes_new=stored.bytes_new,
        peft_version=source.peft_version,
        environment=environment,
        message=request.message,
        findings=described.findings,
        nonfinite=described.nonfinite,
        origin=source.origin,
        created_by=actor(),
        created_at=now(),
    )


def _set_form(connection: Connection, version: VersionKey, form: VersionForm) -> None:
    described = descriptions_of(connection, version.id)
    if all(described.get(role) == digest for role, digest in form.follows_from.items()):
        set_form(connection, version.id, register_form(connection, form.form))


def _require_blobs(context: Context, stored: Iterable[blobs.NewBlob]) -> None:
    """After their rows stand: gc cannot mark these blobs any more, so what is there now stays.

    Raises:
        InUse
    """
    _require_files(context, (blob.digest for blob in stored if not blob.external))


def _require_files(context: Context, digests: Iterable[str]) -> None:
    for digest in digests:
        if not context.store.blobs.contains(digest):
            raise InUse(f"blob {digest} was deleted during the push; push again")


def _say_again(name: LockedName, version: VersionKey, said: Sequence[Said]) -> None:
    by, at = actor(), now()
    for one in said:
        annotation_rows.set_metadata(name, version, one.metadata, actor=by, at=at)
        annotation_rows.set_metrics(name, version, one.metrics, step=one.step, actor=by, at=at)
        if one.note is not None:
            name.append("note", {"text": one.note}, actor=by, at=at, version=(version.id, version.number))


def _annotate(
    name: LockedName, version: VersionKey, request: Request, of_source: Mapping[str, object], *, created: bool
) -> None:
    by, at = actor(), now()
    if request.message and not created:
        name.append("note", {"text": request.message}, actor=by, at=at, version=(version.id, version.number))
    metadata = {**read_metadata(of_source), **request.metadata}
    annotation_rows.set_metadata(name, version, metadata, actor=by, at=at)
    annotation_rows.set_metrics(name, version, request.metrics, step=request.step, actor=by, at=at)
    for tag in request.tags:
        tags.move(name, tag, version, actor=by, at=at, why=request.message)
