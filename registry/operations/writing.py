"""The byte side of a push: hash, look for what is stored already, write the rest, and say where
everything lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.catalog.blobs import NewBlob, StoredTensor, find_tensors, find_together
from registry.core.digest import tensor_hasher
from registry.core.errors import BlobNotFound, InUse, InvalidInput
from registry.core.layout import Layout
from registry.core.placement import FilePlacement, Placement, Splice
from registry.core.safetensors_header import build_header
from registry.formats.source import MadeFile, Source, TensorFile
from registry.operations.context import Context
from registry.operations.hashing import FileDigests, FileHasher, MadeHasher, hash_file, hash_tensor
from registry.operations.reuse import NOTHING_STORED, Plan, plan_reuse
from registry.store.interface import BlobBatch, StoredBlob

if TYPE_CHECKING:
    from registry.operations.describing import ComponentContent, Description

STREAM_MIN_BYTES = 16 << 20
"""Files below this are hashed first and written from the page cache; larger new ones are read once."""
PROBES = 4
PROBE_MIN_BYTES = 1 << 20


@dataclass(frozen=True)
class WrittenFile:
    """A tensor file after its first pass.

    Attributes:
        staged: the whole file, where that pass wrote it into the batch already.
        staged_new: its new tensors as one file, where that pass wrote these.
    """

    file: TensorFile
    digests: FileDigests
    plan: Plan
    staged: StoredBlob | None
    staged_new: StoredBlob | None = None


@dataclass(frozen=True)
class WrittenPlainFile:
    """A file that was written into the batch as it is."""

    path: str
    stored: StoredBlob


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
    context: Context,
    source: Source,
    batch: BlobBatch,
    base_tensors: Mapping[str, StoredTensor],
    *,
    external: bool = False,
) -> list[WrittenFile]:
    """Reads every tensor file once. A large file of which nothing seems to be stored is written into the
    batch in that same pass; a few tensors are looked up first to guess which it is, and a wrong guess
    costs time only. Of an external version nothing is written."""
    written = []
    for file in source.tensor_files:
        if isinstance(file, MadeFile):
            written.append(_write_made(file, batch))
            continue
        staged: StoredBlob | None = None
        streamed = file.size >= STREAM_MIN_BYTES and file.safetensors_head is not None and not external
        if streamed and not _seems_stored(context, file, base_tensors):
            hasher = FileHasher(file, whole=False)
            staged = batch.put(hasher.chunks())
            digests = FileDigests(staged.digest, hasher.digests.tensors, hasher.digests.nonfinite)
        elif external and file.known is not None:
            digests = FileDigests(*file.known)
        else:
            digests = hash_file(file)
        if not file.is_unchanged():
            raise changed(file.path)
        plan = NOTHING_STORED if external else _plan(context, file, digests, base_tensors)
        if staged is not None and not plan.whole:
            batch.discard(staged)
            staged = None
        written.append(WrittenFile(file, digests, plan, staged))
    return written


def _write_made(file: MadeFile, batch: BlobBatch) -> WrittenFile:
    """Writes the tensors that are made into the batch, in the one pass in which they are."""
    new = tuple(ordinal for ordinal in range(len(file.layout)) if ordinal not in file.stored)
    reused = {at: StoredTensor(one.blob, one.ordinal, one.blob_size) for at, one in file.stored.items()}
    hasher = MadeHasher(file, file.head if not reused else build_header(_some(file.layout, new)))
    plan = Plan(reused, {}, new)
    if not new:
        for _ in hasher.chunks():  # it holds what is stored against its digests
            pass
        return WrittenFile(file, hasher.digests, plan, None)
    staged = batch.put(hasher.chunks())
    if not reused:
        return WrittenFile(file, hasher.digests, plan, staged)
    return WrittenFile(file, hasher.digests, plan, None, staged)


def _some(layout: Layout, ordinals: Sequence[int]) -> Layout:
    return Layout(tuple(layout.tensors[ordinal] for ordinal in ordinals))


def write_plain_files(source: Source, batch: BlobBatch) -> list[WrittenPlainFile]:
    """Writes the files that are kept as they are into the batch."""
    written = []
    for file in source.plain_files:
        written.append(WrittenPlainFile(file.path, batch.put(file.chunks())))
        if not file.is_unchanged():
            raise changed(file.path)
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
            # A torn blob is no place to take a tensor from: its bytes are here, and are stored again.
            usable[stored.blob] = _stored_size(context, stored.blob) == stored.blob_size
        return usable[stored.blob]

    own = set(digests.tensors)
    candidates = [
        {digest: stored for digest, stored in offered.items() if digest in own and present(stored)}
        for offered in (base_tensors, *together)
    ]
    return plan_reuse(file.layout, digests.tensors, candidates, file_size=file.size)


def _stored_size(context: Context, digest: str) -> int | None:
    """Bytes of a blob; None where it is not in the store (any more: gc may be at work)."""
    try:
        return context.store.blobs.size(digest)
    except BlobNotFound:
        return None


def store_version(
    context: Context,
    source: Source,
    described: Description,
    files: Sequence[WrittenFile],
    plain_files: Sequence[WrittenPlainFile],
    batch: BlobBatch,
    *,
    external: bool = False,
) -> StoredVersion:
    """Writes all of a version that is not stored yet into the batch; the caller commits it."""
    manifest = described.manifest
    writer = _Writer(context, batch, index_all=manifest.kind != "adapter")
    where = [writer.external_file(written) if external else writer.tensor_file(written) for written in files]
    for written in files:
        if not written.file.is_unchanged():  # a skeleton is not proven by its tensors' digests
            raise changed(written.file.path)
    components = {
        role: tuple(where[number].entries[ordinal] for number, ordinal in content.places)
        for role, content in described.components.items()
    }
    carried = {file.path: file.component for file in manifest.files}
    placed: dict[str, FilePlacement] = {}
    for number, written in enumerate(files):
        skeleton = where[number].skeleton
        if skeleton is None:
            placed[written.file.path] = FilePlacement(where[number].blob, whole=True)
        elif carried[written.file.path] is not None:
            placed[written.file.path] = FilePlacement(skeleton, whole=False)
        else:
            splices = _splices(number, written.file, described.components)
            placed[written.file.path] = FilePlacement(skeleton, whole=False, splices=splices)
    for plain in plain_files:
        placed[plain.path] = FilePlacement(writer.add(plain.stored, "file"), whole=True)
    for data in source.data.values():
        writer.bytes_blob(data, "data")
    for layout in described.layouts.values():
        writer.bytes_blob(layout.document, "layout")
    writer.bytes_blob(manifest.document, "manifest")
    return StoredVersion(
        Placement(tuple(writer.roles), components, placed), tuple(writer.blobs.values()), writer.bytes_new
    )


def _splices(number: int, file: TensorFile, components: Mapping[str, ComponentContent]) -> tuple[Splice, ...]:
    """Where the tensors of a file come into its skeleton, tensors that follow each other taken together."""
    known: dict[int, tuple[str, int]] = {}
    for role in file.entries:
        for position, (its_file, ordinal) in enumerate(components[role].places):
            if its_file == number:
                known.setdefault(ordinal, (role, position))
    found: list[Splice] = []
    for at, ordinal in file.inserts:
        role, position = known[ordinal]
        last = found[-1] if found else None
        if last is not None and (last.at, last.role, last.first + last.length) == (at, role, position):
            found[-1] = Splice(at, role, last.first, last.length + 1)
        else:
            found.append(Splice(at, role, position, 1))
    return tuple(found)


@dataclass(frozen=True)
class _FilePlace:
    """Where one tensor file lies.

    Attributes:
        entries: for each tensor of the file (position of the blob, ordinal there).
        blob: position of the blob that is the file, where there is one.
        skeleton: position of the blob of its skeleton, where there is none.
    """

    entries: tuple[tuple[int, int], ...]
    blob: int = -1
    skeleton: int | None = None


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
        return self.add(self._batch.put([data]), role)

    def external_file(self, written: WrittenFile) -> _FilePlace:
        """Takes note of a file without storing it."""
        file, digests = written.file, written.digests
        if not file.can_be_external:
            form = "no safetensors file" if file.safetensors_head is None else "a checkpoint with a state document"
            raise InvalidInput(
                f"{file.path} is {form}, so it cannot be recorded as external; push it with its bytes, or save its "
                "model as safetensors"
            )
        blob = NewBlob(digests.sha256, file.size, file.layout, digests.tensors, self._index_all, external=True)
        position = self._add(StoredBlob(digests.sha256, file.size, created=False), "external", blob)
        return _FilePlace(tuple((position, ordinal) for ordinal in range(len(file.layout))), blob=position)

    def tensor_file(self, written: WrittenFile) -> _FilePlace:
        """Stores a tensor file: whole, or its skeleton and the tensors that are new."""
        file, digests, plan = written.file, written.digests, written.plan
        if file.safetensors_head is not None:
            known = self._context.store.blobs.contains(digests.sha256)
            if plan.whole or known:
                if written.staged_new is not None:
                    self._batch.discard(written.staged_new)
                position = self._tensors_blob(self.whole_file(written), file.layout, digests.tensors)
                return _FilePlace(tuple((position, ordinal) for ordinal in range(len(file.layout))), blob=position)
        where: dict[int, tuple[int, int]] = {}
        if plan.new:
            layout = _some(file.layout, plan.new)
            stored = written.staged_new or self._batch.put(_new_tensors(file, digests, plan, layout))
            position = self._tensors_blob(stored, layout, [digests.tensors[ordinal] for ordinal in plan.new])
            where = {ordinal: (position, place) for place, ordinal in enumerate(plan.new)}
        for ordinal, reused in plan.reused.items():
            where[ordinal] = (self._reused_blob(reused.blob), reused.ordinal)
        for ordinal, first in plan.repeats.items():
            where[ordinal] = where[first]
        skeleton = self.add(self._batch.put(_skeleton(file)), "header")
        return _FilePlace(tuple(where[ordinal] for ordinal in range(len(file.layout))), skeleton=skeleton)

    def whole_file(self, written: WrittenFile) -> StoredBlob:
        """The file as one blob."""
        file, digests = written.file, written.digests
        if written.staged is not None:
            return written.staged
        if _stored_size(self._context, digests.sha256) == file.size:
            return StoredBlob(digests.sha256, file.size, created=False)
        stored = self._batch.put(file.chunks())
        if stored.digest != digests.sha256:
            raise changed(file.path)
        return stored

    def _tensors_blob(self, stored: StoredBlob, layout: Layout, tensors: Sequence[str]) -> int:
        blob = NewBlob(stored.digest, stored.size, layout, tuple(tensors), self._index_all)
        return self._add(stored, "tensors", blob)

    def _reused_blob(self, digest: str) -> int:
        size = _stored_size(self._context, digest)
        if size is None:  # it was there when the reuse was planned
            raise InUse(f"blob {digest} was deleted during the push; push again")
        return self._add(StoredBlob(digest, size, created=False), "reused", NewBlob(digest, size))

    def add(self, stored: StoredBlob, role: str) -> int:
        """Takes in a blob without tensors; its position in the placement."""
        return self._add(stored, role, NewBlob(stored.digest, stored.size))

    def _add(self, stored: StoredBlob, role: str, blob: NewBlob) -> int:
        if stored.digest in self.blobs:
            return next(i for i, (digest, _) in enumerate(self.roles) if digest == stored.digest)
        self.blobs[stored.digest] = blob
        self.roles.append((stored.digest, role))
        self.bytes_new += stored.size if stored.created else 0
        return len(self.roles) - 1


def store_missing(context: Context, files: Sequence[WrittenFile], missing: Set[str], batch: BlobBatch) -> int:
    """Writes those files whose bytes a version recorded as external and the store lacks.

    Returns:
        Bytes that the store did not hold before.
    """
    writer = _Writer(context, batch, index_all=True)
    stored = [writer.whole_file(written) for written in files if written.digests.sha256 in missing]
    return sum(blob.size for blob in stored if blob.created)


def _skeleton(file: TensorFile) -> Iterator[memoryview]:
    for piece in file.pieces():
        if not isinstance(piece, int):
            yield from file.skeleton(*piece)


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
            raise changed(file.path)


def changed(path: str) -> InvalidInput:
    return InvalidInput(f"{path} changed while it was pushed; push it when nobody writes it")
