"""Exporting: versions with all that they came from become a bundle, which another registry can import. Nothing of this
registry changes, and every byte is proven on its way out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from sqlalchemy import Connection

from registry.catalog.blobs import external_of_version
from registry.catalog.journal_rows import events_of
from registry.catalog.lineage import walk
from registry.catalog.versions import VersionRecord, records, resolve
from registry.core.bundle import INDEX, MAX_DOCUMENT, BundledVersion, BundleIndex, blob_member, event_member
from registry.core.errors import Corrupt, DigestMismatch, InvalidInput, NotStored
from registry.core.event import Event
from registry.core.manifest import Manifest
from registry.core.placement import Placement
from registry.core.reference import parse_reference, shown
from registry.formats.bundle_writing import check_destination, writing_bundle
from registry.formats.rebuilt import RebuiltFile
from registry.formats.rebuilt_external import external_placement
from registry.formats.source import OpenFile
from registry.operations.context import Context
from registry.operations.past import Past, past_of
from registry.operations.pull import write_errors
from registry.operations.reading import blob_bytes
from registry.operations.rebuilding import rebuilt
from registry.store.files import storage_errors
from registry.store.interface import BlobStore, Buffer

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class ExportedVersion:
    """One version of a bundle.

    Attributes:
        asked: it was asked for; the others came along.
        external: its tensors are not in the bundle.
    """

    reference: str
    digest: str
    asked: bool
    external: bool


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        versions: each after its base and its parents.
        bytes: of all members.
    """

    path: Path
    versions: tuple[ExportedVersion, ...]
    blobs: int
    bytes: int


@dataclass(frozen=True)
class _Chosen:
    """A version that will be exported, with its events."""

    record: VersionRecord
    asked: bool
    external: bool
    events: tuple[Event, ...]


def export(
    context: Context, references: Sequence[str], destination: Path, *, no_base: bool = False, force: bool = False
) -> ExportResult:
    """Exports versions; see `Registry.export`."""
    if "\0" in str(destination):
        raise InvalidInput(f"destination '{shown(str(destination))}': a path has no NUL in it")
    if not references:
        raise InvalidInput("nothing to export; give a reference")
    with write_errors(destination):
        check_destination(destination, force=force)
    with context.reading() as connection:
        chosen = _choose(connection, references, no_base=no_base)
    blobs = _StoreBlobs(context.store.blobs)
    members: dict[str, bytes | str] = {}
    entries = []
    for one in chosen:
        entry, needed = _entry(context, blobs, one, members)
        entries.append(entry)
        members.update((blob_member(digest), digest) for digest in needed)
    members[INDEX] = BundleIndex(context.store.registry_id, tuple(entries)).document
    with write_errors(destination), writing_bundle(destination, force=force) as writer:
        for name, content in sorted(members.items()):
            if isinstance(content, bytes):
                writer.add(name, len(content), [content])
            else:
                writer.add(name, blobs.size(content), _proven(context.store.blobs, content))
        total = writer.bytes
    versions = tuple(ExportedVersion(one.reference, one.digest, one.asked, one.external is not None) for one in entries)
    return ExportResult(destination, versions, sum(isinstance(one, str) for one in members.values()), total)


def _choose(connection: Connection, references: Sequence[str], *, no_base: bool) -> list[_Chosen]:
    """The versions that were asked for and all that they came from, the oldest first.

    Raises:
        NotFound, InvalidReference
        NotStored: one that was asked for is known without its bytes.
    """
    asked: dict[int, str] = {}
    edges = set()
    for reference in references:
        key = resolve(connection, parse_reference(reference))
        asked.setdefault(key.id, reference)
        edges.update(walk(connection, key.id, up=True))
    ids = sorted({*asked, *(edge.parent_id for edge in edges)})  # a parent is always the older row
    bases = {edge.parent_id for edge in edges if edge.relation == "trained_on"}
    chosen = []
    for record in records(connection, ids):
        not_stored = bool(external_of_version(connection, record.id))
        if not_stored and record.id in asked:
            raise NotStored(
                f"{record.reference} is recorded without its bytes; push it again without --external to store them"
            )
        left_out = no_base and record.id in bases and record.id not in asked and record.kind != "adapter"
        events = tuple(events_of(connection, record.namespace, record.artifact_name, version_id=record.id))
        chosen.append(_Chosen(record, record.id in asked, not_stored or left_out, events))
    return chosen


def _entry(
    context: Context, blobs: _StoreBlobs, chosen: _Chosen, members: dict[str, bytes | str]
) -> tuple[BundledVersion, set[str]]:
    """What `bundle.json` says of a version, and the blobs that the bundle has to hold of it. Its events are added to
    the members.

    Raises:
        Corrupt: what the registry holds cannot be put together to this version.
        InvalidInput: its tensors cannot be left out.
    """
    record = chosen.record
    documents = [_journal_document(context, event) for event in chosen.events]
    for event, document in zip(chosen.events, documents, strict=True):
        members[event_member(event.namespace, event.name, event.seq)] = document
    entry = BundledVersion(
        namespace=record.namespace,
        name=record.artifact_name,
        number=record.number,
        digest=record.digest,
        content=record.content_digest,
        kind=record.kind,
        asked=chosen.asked,
        tags=tuple(sorted(record.tags)),
    )
    try:
        manifest = Manifest.from_document(blobs.document(record.digest))
        past = past_of(list(zip(chosen.events, documents, strict=True)), manifest, record.reference)
        if not chosen.external:
            found = rebuilt(record.reference, manifest, past, blobs)
            found.describe()
            return entry, {digest for digest, _ in found.placement.blobs} | past.all_described
        placement = _placement_without_tensors(record.reference, manifest, past, blobs)
        rebuilt(record.reference, manifest, past, blobs, external=placement).describe()
    except InvalidInput as error:
        raise Corrupt(f"{record.reference} cannot be put together: {error}") from error
    needed = {digest for digest, role in placement.blobs if role != "external"}
    return replace(entry, external=placement), needed | past.all_described


def _placement_without_tensors(reference: str, manifest: Manifest, past: Past, blobs: _StoreBlobs) -> Placement:
    """The placement that a version without its tensors has, or would have.

    Raises:
        NotStored: they are in files of which that cannot be said.
        InvalidInput, Corrupt
    """
    recorded = Placement.from_json(past.placement)
    if any(role == "external" for _, role in recorded.blobs):
        return recorded
    found = rebuilt(reference, manifest, past, blobs)
    files = [file for file in found.files if isinstance(file, RebuiltFile)]
    for file in files:
        if not file.can_be_external:
            form = "no safetensors file" if file.safetensors_head is None else "a checkpoint with a state document"
            raise NotStored(
                f"{file.path} of {reference} is {form}, so its tensors cannot be left out; export without --no-base"
            )
    return external_placement(manifest, found.layouts, files)


def _journal_document(context: Context, event: Event) -> bytes:
    """The document of an event, which the journal may not have yet.

    Raises:
        Corrupt: the journal has another one.
    """
    document = event.document(context.store.registry_id)
    journal, place = context.store.journal, (event.namespace, event.name, event.seq)
    if journal.contains(*place) and journal.read(*place) != document:
        raise Corrupt(f"event {event.seq} of {event.namespace}/{event.name} is another one in the journal")
    return document


class _StoreBlobs:
    """The store's blobs as a version is rebuilt from them."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def size(self, digest: str) -> int:
        return self._blobs.size(digest)

    def read(self, digest: str, begin: int, end: int) -> Iterator[memoryview]:
        with self._blobs.open(digest) as file:
            yield from OpenFile(file, f"blob {digest}").read(begin, end)

    def document(self, digest: str) -> bytes:
        if self._blobs.size(digest) > MAX_DOCUMENT:
            raise InvalidInput(
                f"blob {digest} has over {MAX_DOCUMENT} bytes, the most that a bundle's document may have"
            )
        return blob_bytes(self._blobs, digest)

    def is_unchanged(self, digest: str) -> bool:
        return True


def _proven(blobs: BlobStore, digest: str) -> Iterator[Buffer]:
    """The bytes of a blob; the last of them come only after the proof.

    Raises:
        DigestMismatch, BlobNotFound
    """
    proof, last = sha256(), b""
    with blobs.open(digest) as file:
        while True:
            with storage_errors(f"read blob {digest}", writing=False):
                chunk = file.read(CHUNK_BYTES)
            if not chunk:
                break
            proof.update(chunk)
            yield last
            last = chunk
    if proof.hexdigest() != digest:
        raise DigestMismatch(f"blob {digest}", expected=digest, actual=proof.hexdigest())
    yield last
