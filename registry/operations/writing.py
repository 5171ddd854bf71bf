"""The byte side of a push: hash, look for what is stored already, write the rest, and say where
everything lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from registry.catalog.blobs import NewBlob, StoredTensor, find_tensors, find_together
from registry.core.digest import tensor_hasher
from registry.core.errors import InvalidInput
from registry.core.layout import Layout
from registry.core.manifest import Manifest
from registry.core.placement import FilePlacement, Placement
from registry.core.safetensors_header import build_header
from registry.formats.source import Source, TensorFile
from registry.operations.context import Context
from registry.operations.hashing import FileDigests, FileHasher, hash_file, hash_tensor
from registry.operations.reuse import Plan, plan_reuse
from registry.store.interface import BlobBatch, StoredBlob

STREAM_MIN_BYTES = 16 << 20
"""Files below this are hashed first and written from the page cache; larger new ones are read once."""
PROBES = 4
PROBE_MIN_BYTES = 1 << 20


@dataclass(frozen=True)
class WrittenFile:
    """A tensor file after its first pass.

    Attributes:
        staged: the whole file, where that pass wrote it into the batch already.
    """

    file: TensorFile
    digests: FileDigests
    plan: Plan
    staged: StoredBlob | None


@dataclass(frozen=True)
class StoredVersion:
    """A version's blobs, all of them in the store.

    Attributes:
        blobs: every blob of the placement, for the catalog.
        bytes_new: bytes that the store did not hold before.
    """

    placement: Placement
    blobs: tuple[NewBlob, ...]
    bytes_new: int


def digest_files(
    context: Context, source: Source, batch: BlobBatch, base_tensors: Mapping[str, StoredTensor]
) -> list[WrittenFile]:
    """Reads every tensor file once. A large file of which nothing seems to be stored is written into the
    batch in that same pass; a few tensors are looked up first to guess which it is, and a wrong guess
    costs time only."""
    written = []
    for file in source.tensor_files:
        staged: StoredBlob | None = None
        if file.size >= STREAM_MIN_BYTES and not _seems_stored(context, file, base_tensors):
            hasher = FileHasher(file, whole=False)
            staged = batch.put(hasher.chunks())
            digests = FileDigests(staged.digest, hasher.digests.tensors, hasher.digests.nonfinite)
        else:
            digests = hash_file(file)
        if not file.is_unchanged():
            raise changed(file)
        plan = _plan(context, file, digests, base_tensors)
        if staged is not None and not plan.whole:
            batch.discard(staged)
            staged = None
        written.append(WrittenFile(file, digests, plan, staged))
    return written


def _seems_stored(context: Context, file: TensorFile, base_tensors: Mapping[str, StoredTensor]) -> bool:
    sizes = [(spec.nbytes, ordinal) for ordinal, spec in enumerate(file.layout)]
    large = sorted(pair for pair in sizes if pair[0] >= PROBE_MIN_BYTES)
    ordinals = {ordinal for _, ordinal in (*large[: PROBES // 2], *large[-PROBES // 2 :])}
    digests = [hash_tensor(file, ordinal) for ordinal in sorted(ordinals)]
    if any(digest in base_tensors for digest in digests):
        return True
    with context.reading() as connection:
        return bool(find_tensors(connection, digests))


def _plan(context: Context, file: TensorFile, digests: FileDigests, base_tensors: Mapping[str, StoredTensor]) -> Plan:
    with context.reading() as connection:
        together = find_together(connection, digests.tensors)
    usable: dict[str, bool] = {}

    def present(stored: StoredTensor) -> bool:
        if stored.blob not in usable:
            blobs = context.store.blobs
            # A torn blob is no place to take a tensor from: its bytes are here, and are stored again.
            usable[stored.blob] = blobs.contains(stored.blob) and blobs.size(stored.blob) == stored.blob_size
        return usable[stored.blob]

    own = set(digests.tensors)
    candidates = [
        {digest: stored for digest, stored in offered.items() if digest in own and present(stored)}
        for offered in (base_tensors, *together)
    ]
    return plan_reuse(file.layout, digests.tensors, candidates, file_size=file.size)


def store_version(
    context: Context,
    source: Source,
    manifest: Manifest,
    layouts: Mapping[str, Layout],
    files: Sequence[WrittenFile],
    batch: BlobBatch,
) -> StoredVersion:
    """Writes all of a version that is not stored yet into the batch; the caller commits it."""
    writer = _Writer(context, batch, index_all=manifest.kind != "adapter")
    components: dict[str, tuple[tuple[int, int], ...]] = {}
    placed: dict[str, FilePlacement] = {}
    for written in files:
        entries, placement = writer.tensor_file(written)
        components[written.file.role] = entries
        placed[written.file.path] = placement
    for plain in source.plain_files:
        placed[plain.path] = FilePlacement(writer.bytes_blob(plain.data, "file"), whole=True)
    for layout in layouts.values():
        writer.bytes_blob(layout.document, "layout")
    writer.bytes_blob(manifest.document, "manifest")
    return StoredVersion(
        Placement(tuple(writer.roles), components, placed), tuple(writer.blobs.values()), writer.bytes_new
    )


class _Writer:
    """Collects the blobs of one version while they are written."""

    def __init__(self, context: Context, batch: BlobBatch, *, index_all: bool) -> None:
        self._context = context
        self._batch = batch
        self._index_all = index_all
        self.roles: list[tuple[str, str]] = []
        self.blobs: dict[str, NewBlob] = {}
        self.bytes_new = 0

    def bytes_blob(self, data: bytes, role: str) -> int:
        stored = self._batch.put([data])
        return self._add(stored, role, NewBlob(stored.digest, stored.size))

    def tensor_file(self, written: WrittenFile) -> tuple[tuple[tuple[int, int], ...], FilePlacement]:
        """Stores a tensor file: whole, or its header and the tensors that are new."""
        file, digests, plan = written.file, written.digests, written.plan
        known = self._context.store.blobs.contains(digests.sha256)
        if plan.whole or known:
            if written.staged is not None:
                stored = written.staged
            elif known and self._context.store.blobs.size(digests.sha256) == file.size:
                stored = StoredBlob(digests.sha256, file.size, created=False)
            else:
                stored = self._batch.put(file.chunks())
                if stored.digest != digests.sha256:
                    raise changed(file)
            position = self._tensors_blob(stored, file.layout, digests.tensors)
            return tuple((position, ordinal) for ordinal in range(len(file.layout))), FilePlacement(position, True)
        where: dict[int, tuple[int, int]] = {}
        if plan.new:
            layout = Layout(tuple(file.layout.tensors[ordinal] for ordinal in plan.new))
            stored = self._batch.put(_new_tensors(file, digests, plan, layout))
            position = self._tensors_blob(stored, layout, [digests.tensors[ordinal] for ordinal in plan.new])
            where = {ordinal: (position, place) for place, ordinal in enumerate(plan.new)}
        for ordinal, reused in plan.reused.items():
            where[ordinal] = (self._reused_blob(reused.blob), reused.ordinal)
        for ordinal, first in plan.repeats.items():
            where[ordinal] = where[first]
        header = self.bytes_blob(file.head, "header")
        return tuple(where[ordinal] for ordinal in range(len(file.layout))), FilePlacement(header, False)

    def _tensors_blob(self, stored: StoredBlob, layout: Layout, tensors: Sequence[str]) -> int:
        blob = NewBlob(stored.digest, stored.size, layout, tuple(tensors), self._index_all)
        return self._add(stored, "tensors", blob)

    def _reused_blob(self, digest: str) -> int:
        size = self._context.store.blobs.size(digest)
        return self._add(StoredBlob(digest, size, created=False), "reused", NewBlob(digest, size))

    def _add(self, stored: StoredBlob, role: str, blob: NewBlob) -> int:
        if stored.digest in self.blobs:
            return next(i for i, (digest, _) in enumerate(self.roles) if digest == stored.digest)
        self.blobs[stored.digest] = blob
        self.roles.append((stored.digest, role))
        self.bytes_new += stored.size if stored.created else 0
        return len(self.roles) - 1


def _new_tensors(file: TensorFile, digests: FileDigests, plan: Plan, layout: Layout) -> Iterator[memoryview]:
    """A safetensors file of the new tensors alone, refusing tensors that changed since they were hashed."""
    yield memoryview(build_header(layout))
    for ordinal in plan.new:
        spec = file.layout.tensors[ordinal]
        hasher = tensor_hasher(spec.dtype, spec.shape)
        for chunk in file.tensor(ordinal):
            hasher.update(chunk)
            yield chunk
        if hasher.hexdigest() != digests.tensors[ordinal]:
            raise changed(file)


def changed(file: TensorFile) -> InvalidInput:
    return InvalidInput(f"{file.path} changed while it was pushed; push it when nobody writes it")
