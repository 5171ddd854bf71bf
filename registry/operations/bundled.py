"""What a bundle says, read and proven before anything of it is written anywhere: its table of contents, its events,
each blob and each version. Memory is bounded by documents, not by weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256

from registry.core.bundle import INDEX, BundledVersion, BundleIndex, blob_member, event_member, is_event
from registry.core.digest import pack_digests
from registry.core.errors import Corrupt, DigestMismatch, InvalidInput
from registry.core.event import Event
from registry.core.journal_document import read_event
from registry.core.manifest import Manifest
from registry.core.reference import shown
from registry.formats.bundle import Bundle, BundledBlobs, unexpected
from registry.formats.rebuilt import RebuiltFile, blob_tensors
from registry.formats.source import Source
from registry.operations.hashing import hash_file
from registry.operations.past import HISTORY, past_of
from registry.operations.rebuilding import Rebuilt, history, rebuilt


class BundleContents:
    """A bundle whose table of contents and events agree; its versions are read when they are asked for."""

    def __init__(self, bundle: Bundle) -> None:
        """
        Raises:
            Corrupt, DigestMismatch, InvalidInput
        """
        self._bundle = bundle
        self._blobs = BundledBlobs(bundle)
        self.index = BundleIndex.from_document(bundle.document(INDEX))
        self._place = {one.reference: place for place, one in enumerate(self.index.versions)}
        self._events: dict[str, list[int]] = {}
        for member in filter(is_event, bundle.members):
            _, namespace, name, file = member.split("/")
            event, _ = self._event(namespace, name, int(file.removesuffix(".json")))
            self._events.setdefault(f"{namespace}/{name}@{event.version}", []).append(event.seq)
        if strangers := set(self._events).difference(self._place):
            raise InvalidInput(f"{bundle.what} has events of {min(strangers)}, which it does not list; export it again")

    def version(self, entry: BundledVersion) -> Rebuilt:
        """One version of the bundle.

        Raises:
            Corrupt, DigestMismatch, InvalidInput
        """
        with self._errors_of(entry):
            manifest = Manifest.from_document(self._blobs.document(entry.digest))
            seqs = sorted(self._events.get(entry.reference, ()))
            events = [self._event(entry.namespace, entry.name, seq) for seq in seqs]
            past = past_of(events, manifest, entry.reference)
            if (manifest.kind, past.content) != (entry.kind, entry.content):
                raise Corrupt(f"{INDEX} has another kind or content digest than its manifest and event")
            found = rebuilt(entry.reference, manifest, past, self._blobs, external=entry.external)
            self._check_ancestry(entry, found)
            return found

    def source(self, entry: BundledVersion, found: Rebuilt) -> Source:
        """One version, to be pushed, with its history.

        Raises:
            Corrupt, DigestMismatch, InvalidInput
        """
        with self._errors_of(entry):
            described = {role: self._blobs.document(digest) for role, digest in found.past.described.items()}
            described[HISTORY] = history(described.get(HISTORY, b"[]"), found.past.documents)
        origin = {**found.past.origin, "registry": self.index.registry, "version": entry.reference}
        return found.source(described=described, origin=origin)

    def prove(self) -> list[str]:
        """Holds every byte of the bundle against its digests. What passes can be imported.

        Returns:
            What the user should know.

        Raises:
            DigestMismatch, Corrupt, InvalidInput: it is damaged, or lies.
        """
        expected = {INDEX, *filter(is_event, self._bundle.members)}
        tensors: set[str] = set()
        for entry in self.index.versions:
            found = self.version(entry)
            placed = {digest for digest, role in found.placement.blobs if not entry.external or role != "external"}
            blobs = placed | found.past.all_described
            for digest in blobs:
                self._blobs.size(digest)
            expected.update(map(blob_member, blobs))
            if not entry.external:
                tensors.update(
                    found.placement.blobs[blob][0]
                    for entries in found.placement.components.values()
                    for blob in {blob for blob, _ in entries}
                )
        if strangers := unexpected(self._bundle, expected):
            raise InvalidInput(f"{self._bundle.what}: no version needs {strangers[0]}; take it out, or export again")
        proven = {digest: self._prove_tensors(digest) for digest in sorted(tensors)}
        for member in sorted(expected.difference(map(blob_member, tensors))):
            if member != INDEX and not is_event(member):
                self._prove_blob(member)
        notes: list[str] = []
        for entry in self.index.versions:
            version = self.version(entry)
            with self._errors_of(entry):
                notes += self._prove_version(entry, version, proven)
        return notes

    def _prove_tensors(self, digest: str) -> bytes:
        """Digests of the tensors of a blob, packed."""
        file = blob_tensors(self._blobs, digest)
        found = hash_file(file)
        if found.sha256 != digest:
            raise self._mismatch(digest, found.sha256)
        return pack_digests(found.tensors)

    def _prove_blob(self, member: str) -> None:
        digest, proof = member.rpartition("/")[2], sha256()
        for chunk in self._bundle.read(member, 0, self._bundle.members[member]):
            proof.update(chunk)
        if proof.hexdigest() != digest:
            raise self._mismatch(digest, proof.hexdigest())

    def _mismatch(self, digest: str, actual: str) -> DigestMismatch:
        return DigestMismatch(f"blob of {self._bundle.what}", expected=digest, actual=actual)

    def _prove_version(self, entry: BundledVersion, found: Rebuilt, proven: Mapping[str, bytes]) -> list[str]:
        notes = []
        if found.describe().content_digest != entry.content:
            # No damage: what counts as the same content is worked out by the program, and programs learn.
            notes.append(f"{entry.reference} gets another content digest than where it comes from")
        if HISTORY in found.past.described:
            history(self._blobs.document(found.past.described[HISTORY]), ())
        if entry.external:
            return notes
        for part in found.manifest.components:
            for position, (blob, ordinal) in enumerate(found.placement.components[part.role]):
                packed = proven[found.placement.blobs[blob][0]]
                actual = packed[32 * ordinal : 32 * ordinal + 32].hex()
                if actual != part.tensors[position]:
                    what = f"tensor {position} of the {part.role} of {entry.reference}"
                    raise DigestMismatch(what, expected=part.tensors[position], actual=actual)
        for file in found.files:
            if isinstance(file, RebuiltFile) and not found.placement.files[file.path].whole:
                proof = sha256()
                for chunk in file.chunks():
                    proof.update(chunk)
                if proof.hexdigest() != file.recorded.sha256:
                    what = f"{file.path} of {entry.reference}"
                    raise DigestMismatch(what, expected=file.recorded.sha256, actual=proof.hexdigest())
        return notes

    def _event(self, namespace: str, name: str, seq: int) -> tuple[Event, bytes]:
        member = event_member(namespace, name, seq)
        document = self._bundle.document(member)
        registry, event = read_event(document, f"{self._bundle.what}: {member}")
        if registry != self.index.registry or (event.namespace, event.name, event.seq) != (namespace, name, seq):
            raise Corrupt(f"{self._bundle.what}: {member} is an event of another registry, name or number")
        return event, document

    def _check_ancestry(self, entry: BundledVersion, found: Rebuilt) -> None:
        manifest, past = found.manifest, found.past
        if len(past.parents) != len(manifest.parents) or (past.base is None) != (manifest.base is None):
            raise Corrupt("its event `pushed` names other ancestors than its manifest")
        wanted = [*zip((one.digest for one in manifest.parents), past.parents, strict=True)]
        if manifest.base is not None and past.base is not None:
            wanted.append((manifest.base, past.base))
        for digest, reference in wanted:
            place = self._place.get(reference)
            if place is None or place >= self._place[entry.reference]:
                raise Corrupt(f"its ancestor {shown(reference)} does not stand before it in {INDEX}")
            if self.index.versions[place].digest != digest:
                raise Corrupt(
                    f"its ancestor {reference} has the digest {self.index.versions[place].digest}, not {digest}"
                )

    @contextmanager
    def _errors_of(self, entry: BundledVersion) -> Iterator[None]:
        """Says of which version an error tells; what is said of a digest has its own words."""
        try:
            yield
        except DigestMismatch:
            raise
        except (Corrupt, InvalidInput) as error:
            raise type(error)(f"{self._bundle.what}: {entry.reference}: {error}") from error
