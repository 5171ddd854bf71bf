"""The blobs of a registry held against what names them: there, of the right size, and, where every byte is to be read,
of the right digests, tensor by tensor and file by file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256

from blake3 import blake3
from sqlalchemy import Connection, select

from registry.catalog.contents import read_contents
from registry.catalog.dump import Dump
from registry.catalog.tables import artifact, version
from registry.core.digest import tensor_hasher, unpack_digests
from registry.core.errors import BlobNotFound, Corrupt, DigestMismatch, InvalidManifest, MalformedTensors
from registry.core.layout import Layout
from registry.core.manifest import Manifest
from registry.core.placement import unpack_entries
from registry.core.reference import shown
from registry.core.safetensors_header import Header, read_header
from registry.operations.problems import COPY, Kind, Problem
from registry.operations.reading import BlobReader, blob_bytes, file_bytes
from registry.store.files import storage_errors
from registry.store.interface import BlobStore

CHUNK_BYTES = 4 << 20
_NAMED = 3


@dataclass(frozen=True)
class Wanted:
    """What a blob must be.

    Attributes:
        state: `present` or `external`.
        roles: in which versions need it.
        layout: digest of its layout, for a blob of tensors.
        tensors: digests in the order of that layout.
    """

    digest: str
    size: int
    state: str
    roles: frozenset[str]
    layout: str | None
    tensors: tuple[str, ...]


def wanted_blobs(dumped: Dump, holders: Mapping[str, Iterable[str]]) -> Iterator[Wanted]:
    """The blobs that some version needs, as a catalog has them."""
    roles: dict[str, set[str]] = {}
    for row in dumped["version_blob"].values():
        roles.setdefault(row["blob_id"], set()).add(row["role"])
    for (digest,), row in sorted(dumped["blob"].items()):
        if digest not in holders or row["state"] == "deleting":
            continue
        packed = dumped["blob_tensors"].get((digest,), {"digests": b""})["digests"]
        tensors = unpack_digests(packed) if len(packed) % 32 == 0 else ()
        found = frozenset(roles.get(digest, ("described",)))
        yield Wanted(digest, row["size"], row["state"], found, row["layout_id"], tensors)


class BlobCheck:
    """Looks at blobs, each once.

    Attributes:
        damaged: those whose bytes are not to be believed, or that are missing.
        sizes: bytes that those should have.
        seen: all that were looked at.
        bytes_read: of blobs that were read whole.
    """

    def __init__(self, blobs: BlobStore, holders: Mapping[str, Iterable[str]], *, deep: bool) -> None:
        self._blobs = blobs
        self._holders = holders
        self._deep = deep
        self.damaged: set[str] = set()
        self.missing: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.seen: set[str] = set()
        self.bytes_read = 0
        self.tensors: dict[str, tuple[str, ...]] = {}

    def problems(self, wanted: Iterable[Wanted]) -> Iterator[Problem]:
        for one in wanted:
            if one.digest in self.seen:
                continue
            self.seen.add(one.digest)
            try:
                problem = self._problem(one)
            except BlobNotFound:
                problem = self._missing(one)
            except Corrupt as error:  # something else than a file
                problem = self._bad(one, "a file of its bytes", str(error).partition(";")[0])
            if problem is not None:
                self.damaged.add(one.digest)
                self.sizes[one.digest] = one.size
                yield problem

    def _problem(self, one: Wanted) -> Problem | None:
        if one.state == "external" and not self._blobs.contains(one.digest):
            return None
        size = self._blobs.size(one.digest)
        if self._deep:
            return self._read(one, size)
        if size != one.size and not self._is_itself(one.digest):
            return self._bad(one, f"{one.size} bytes", f"{size} bytes")
        if one.roles & {"manifest", "layout"}:
            return self._document(one)
        if one.layout is not None and not self._says(one, size) and not self._is_itself(one.digest):
            return self._bad(one, "its header", "another header")
        return None

    def _is_itself(self, digest: str) -> bool:
        """Whether its bytes have its digest; then what is said of it elsewhere is wrong."""
        self.bytes_read += self._blobs.size(digest)
        try:
            self._blobs.verify(digest)
        except DigestMismatch:
            return False
        return True

    def _document(self, one: Wanted) -> Problem | None:
        try:
            document = blob_bytes(self._blobs, one.digest)
            self.bytes_read += len(document)
            _ = Manifest.from_document(document) if "manifest" in one.roles else Layout.from_document(document)
        except DigestMismatch as error:
            return self._bad(one, "bytes of this digest", f"digest {error.actual}")
        except InvalidManifest as error:
            return self._bad(one, "a document of its kind", str(error))
        return None

    def _says(self, one: Wanted, size: int) -> bool:
        header = self._header(one.digest, size)
        return header is not None and header.layout.digest == one.layout

    def _header(self, digest: str, size: int) -> Header | None:
        try:
            with self._blobs.open(digest) as file, storage_errors(f"read blob {digest}", writing=False):
                return read_header(file, file_size=size, what=f"blob {digest}")[0]
        except MalformedTensors:
            return None

    def _read(self, one: Wanted, size: int) -> Problem | None:
        """Reads a blob once: its own digest, and those of its tensors."""
        header = self._header(one.digest, size) if one.layout is not None else None
        whole = sha256()
        tensors: list[str] = []
        with self._blobs.open(one.digest) as file, storage_errors(f"read blob {one.digest}", writing=False):
            pieces: list[tuple[int, blake3 | None]] = [(size, None)]
            if header is not None:
                pieces = [(header.size, None)]
                for spec, (begin, end) in zip(header.layout, header.offsets, strict=True):
                    pieces.append((end - begin, tensor_hasher(spec.dtype, spec.shape)))
            for length, hasher in pieces:
                left = length
                while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                    left -= len(chunk)
                    whole.update(chunk)
                    self.bytes_read += len(chunk)
                    if hasher is not None:
                        hasher.update(chunk)
                if hasher is not None:
                    tensors.append(str(hasher.hexdigest()))
        if whole.hexdigest() == one.digest:
            self.tensors[one.digest] = tuple(tensors)
            return self._document(one) if one.roles & {"manifest", "layout"} else None
        if size != one.size:
            return self._bad(one, f"{one.size} bytes", f"{size} bytes")
        found = f"digest {whole.hexdigest()}"
        if header is not None and header.layout.digest == one.layout and len(one.tensors) == len(tensors):
            names = [
                spec.name for spec, was, now in zip(header.layout, one.tensors, tensors, strict=True) if was != now
            ]
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                found += f"; other bytes in {', '.join(shown(name) for name in names[:_NAMED])}{more}"
        return self._bad(one, "bytes of this digest", found)

    def _missing(self, one: Wanted) -> Problem:
        self.missing.add(one.digest)
        return self._bad(one, f"{one.size} bytes", "no such blob")

    def _bad(self, one: Wanted, expected: str, found: str) -> Problem:
        kinds: tuple[Kind, ...] = ("manifest", "layout")
        kind: Kind = next((kind for kind in kinds if kind in one.roles), "blob")
        versions = tuple(sorted(self._holders.get(one.digest, ())))
        return Problem(kind, one.digest, expected, found, versions, f"{COPY}: blobs/sha256/{one.digest[:2]}")


def tensor_problems(dumped: Dump, read: Mapping[str, tuple[str, ...]]) -> Iterator[Problem]:
    """Tensors that are other ones than the manifests say.

    Args:
        dumped: of a catalog that was made of manifests and journal.
        read: digests of the tensors of each blob, worked out from its bytes.
    """
    blobs = {key: row["blob_id"] for key, row in dumped["version_blob"].items()}
    names: dict[str, dict[int, str]] = {}
    for (layout, position), row in dumped["layout_tensor"].items():
        names.setdefault(layout, {})[position] = row["name"]
    for (reference, role), row in sorted(dumped["component"].items()):
        entries = unpack_entries(row["placement"])
        for place, (digest, (position, ordinal)) in enumerate(
            zip(unpack_digests(row["digests"]), entries, strict=True)
        ):
            there = read.get(blobs[reference, position])
            if there is not None and (ordinal >= len(there) or there[ordinal] != digest):
                found = there[ordinal] if ordinal < len(there) else "no tensor"
                subject = (
                    f"{shown(names.get(row['layout_id'], {}).get(place, str(place)))} of the {role} of {reference}"
                )
                mend = "push the artifact again under another name"
                yield Problem("tensor", subject, f"digest {digest}", found, (reference,), mend)


def file_problems(connection: Connection, store: BlobStore, suffering: Iterable[str]) -> Iterator[Problem]:
    """Files that do not come back as they were pushed; those of whole blobs are proven by the blobs' own digests.

    Args:
        connection: to a catalog that was made of manifests and journal.
        suffering: versions of which it is known that they do not.
    """
    known = set(suffering)
    rows = connection.execute(
        select(version.c.id, artifact.c.namespace, artifact.c.name, version.c.number)
        .join(artifact, artifact.c.id == version.c.artifact_id)
        .where(version.c.state != "purged")
        .order_by(artifact.c.namespace, artifact.c.name, version.c.number)
    ).all()
    for row in rows:
        reference = f"{row.namespace}/{row.name}@{row.number}"
        if reference in known:
            continue
        contents = read_contents(connection, row.id)
        for file in () if contents.external else contents.files:
            if file.whole:
                continue
            with BlobReader(store) as reader:
                try:
                    for _ in file_bytes(reader, store, file, contents.components):
                        pass
                except (Corrupt, BlobNotFound) as error:
                    found = f"digest {error.actual}" if isinstance(error, DigestMismatch) else str(error)
                    subject = f"{shown(file.path)} of {reference}"
                    mend = "push the artifact again under another name"
                    yield Problem("file", subject, f"digest {file.sha256}", found, (reference,), mend)
