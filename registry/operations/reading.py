"""Reading stored versions: rebuilding a file byte for byte, and finding a tensor in its blob."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import BinaryIO

from registry.catalog.contents import Contents, StoredComponent, StoredFile
from registry.core.errors import Corrupt, DigestMismatch, MalformedTensors, NotStored
from registry.core.safetensors_header import Header, read_header
from registry.store.files import storage_errors
from registry.store.interface import BlobStore

CHUNK_BYTES = 4 << 20


@dataclass
class OpenBlob:
    """A safetensors blob, open."""

    digest: str
    file: BinaryIO
    header: Header


class BlobReader:
    """Opens each safetensors blob once and gives the bytes of its tensors, to several threads if need be; close it
    after use."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._open: dict[str, OpenBlob] = {}
        self._stack = ExitStack()
        self._lock = RLock()

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def blob(self, digest: str) -> OpenBlob:
        """
        Raises:
            BlobNotFound, Corrupt
        """
        with self._lock:
            if digest not in self._open:
                file = self._stack.enter_context(self._blobs.open(digest))
                try:
                    with storage_errors(f"read blob {digest}", writing=False):
                        header, _ = read_header(file, file_size=self._blobs.size(digest), what=f"blob {digest}")
                except MalformedTensors as error:
                    found = str(error).partition(";")[0]  # its mend is for a file that somebody has elsewhere
                    raise Corrupt(f"{found}; the blob is damaged: put it back from a copy of the store") from error
                self._open[digest] = OpenBlob(digest, file, header)
            return self._open[digest]

    def path(self, digest: str) -> Path:
        return self._blobs.local_path(digest)

    def tensor(self, digest: str, ordinal: int) -> Iterator[bytes]:
        """Bytes of one tensor in chunks."""
        opened = self.blob(digest)
        if ordinal >= len(opened.header.offsets):
            raise Corrupt(f"blob {digest} has {len(opened.header.offsets)} tensors, none with ordinal {ordinal}")
        begin, end = opened.header.offsets[ordinal]
        at, left = opened.header.size + begin, end - begin
        while left:
            with self._lock:  # one position for all who read of this blob
                opened.file.seek(at)
                chunk = _read(opened.file, min(left, CHUNK_BYTES), digest)
            if not chunk:
                raise Corrupt(f"blob {digest} is shorter than its header says")
            at += len(chunk)
            left -= len(chunk)
            yield chunk


def refuse_external(contents: Contents, what: str) -> None:
    """
    Raises:
        NotStored: the version is known without its bytes.
    """
    if contents.external:
        raise NotStored(
            f"{what} is recorded without its bytes ('registry show {what}' says where they are); push it again without "
            "--external to store them"
        )


def file_bytes(
    reader: BlobReader, blobs: BlobStore, file: StoredFile, components: Mapping[str, StoredComponent]
) -> Iterator[bytes]:
    """The very bytes of a file as it was pushed, in chunks; the last one comes only after the proof.

    Raises:
        DigestMismatch: what the store holds is not what was pushed.
        BlobNotFound, Corrupt
    """
    proof = sha256()
    last = b""
    for chunk in _unproven(reader, blobs, file, components):
        proof.update(chunk)
        if last:
            yield last
        last = chunk
    if proof.hexdigest() != file.sha256:
        raise DigestMismatch(f"file {file.path}", expected=file.sha256, actual=proof.hexdigest())
    yield last


def _unproven(
    reader: BlobReader, blobs: BlobStore, file: StoredFile, components: Mapping[str, StoredComponent]
) -> Iterator[bytes]:
    with blobs.open(file.blob) as stored:
        done = 0
        for splice in file.splices or ():
            while done < splice.at:
                chunk = _read(stored, min(CHUNK_BYTES, splice.at - done), file.blob)
                if not chunk:
                    raise Corrupt(f"blob {file.blob} is shorter than the file {file.path} needs")
                done += len(chunk)
                yield chunk
            places = _component(components, splice.role, file).places[splice.first : splice.first + splice.length]
            if len(places) != splice.length:
                raise Corrupt(f"file {file.path} needs tensors that its component {splice.role} has not")
            for digest, ordinal in places:
                yield from reader.tensor(digest, ordinal)
        while chunk := _read(stored, CHUNK_BYTES, file.blob):
            yield chunk
    if not file.whole and file.splices is None:
        for digest, ordinal in _component(components, file.role, file).places:
            yield from reader.tensor(digest, ordinal)


def _component(components: Mapping[str, StoredComponent], role: str | None, file: StoredFile) -> StoredComponent:
    if role is None or role not in components:
        raise Corrupt(f"file {file.path} is stored in parts, and its component is missing")
    return components[role]


def blob_bytes(blobs: BlobStore, digest: str) -> bytes:
    """All bytes of a small blob, proven.

    Raises:
        BlobNotFound, DigestMismatch
    """
    with blobs.open(digest) as file, storage_errors(f"read blob {digest}", writing=False):
        data = file.read()
    if sha256(data).hexdigest() != digest:
        raise DigestMismatch(f"blob {digest}", expected=digest, actual=sha256(data).hexdigest())
    return data


def _read(file: BinaryIO, most: int, digest: str) -> bytes:
    with storage_errors(f"read blob {digest}", writing=False):
        return file.read(most)
