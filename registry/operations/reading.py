"""Reading stored versions: rebuilding a file byte for byte, and finding a tensor in its blob."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from registry.catalog.contents import StoredComponent, StoredFile
from registry.core.errors import Corrupt, DigestMismatch, MalformedTensors
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
    """Opens each safetensors blob once and gives the bytes of its tensors; close it after use."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._open: dict[str, OpenBlob] = {}
        self._stack = ExitStack()

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def blob(self, digest: str) -> OpenBlob:
        """
        Raises:
            BlobNotFound, Corrupt
        """
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
        opened.file.seek(opened.header.size + begin)
        left = end - begin
        while left:
            chunk = _read(opened.file, min(left, CHUNK_BYTES), digest)
            if not chunk:
                raise Corrupt(f"blob {digest} is shorter than its header says")
            left -= len(chunk)
            yield chunk


def file_bytes(
    reader: BlobReader, blobs: BlobStore, file: StoredFile, component: StoredComponent | None
) -> Iterator[bytes]:
    """The very bytes of a file as it was pushed, in chunks; the last one comes only after the proof.

    Raises:
        DigestMismatch: what the store holds is not what was pushed.
        BlobNotFound, Corrupt
    """
    proof = sha256()
    last = b""
    for chunk in _unproven(reader, blobs, file, component):
        proof.update(chunk)
        if last:
            yield last
        last = chunk
    if proof.hexdigest() != file.sha256:
        raise DigestMismatch(f"file {file.path}", expected=file.sha256, actual=proof.hexdigest())
    yield last


def _unproven(
    reader: BlobReader, blobs: BlobStore, file: StoredFile, component: StoredComponent | None
) -> Iterator[bytes]:
    with blobs.open(file.blob) as stored:
        while chunk := _read(stored, CHUNK_BYTES, file.blob):
            yield chunk
    if not file.whole:
        if component is None:
            raise Corrupt(f"file {file.path} is stored in parts, and its component is missing")
        for digest, ordinal in component.places:
            yield from reader.tensor(digest, ordinal)


def _read(file: BinaryIO, most: int, digest: str) -> bytes:
    with storage_errors(f"read blob {digest}", writing=False):
        return file.read(most)
