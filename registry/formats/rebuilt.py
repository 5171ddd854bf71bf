"""The files of a version as a source again, put together from blobs as its placement says: what a bundle holds can be
pushed like anything else. Whose blobs they are (a store's, a bundle's) is the caller's matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import groupby, pairwise
from typing import Protocol

from registry.core.errors import Corrupt, InvalidManifest, MalformedTensors
from registry.core.layout import Layout, TensorSpec
from registry.core.manifest import File, Manifest
from registry.core.placement import Placement, Splice
from registry.core.safetensors_header import MAX_HEADER_BYTES, Header, header_length, parse_header
from registry.formats.source import KnownDigests, PlainFile, TensorFile


class Blobs(Protocol):
    """Blobs to read from, by digest. A digest that is not there is an error of our tree."""

    def size(self, digest: str) -> int: ...

    def read(self, digest: str, begin: int, end: int) -> Iterator[memoryview]:
        """A part of a blob, in chunks that stay valid until the next one is asked for."""
        ...

    def is_unchanged(self, digest: str) -> bool: ...


@dataclass(frozen=True)
class Piece:
    """Where the bytes of a tensor lie: a part of a blob."""

    blob: str
    begin: int
    end: int


class RebuiltFile(TensorFile):
    """A tensor file whose skeleton and tensors lie in blobs.

    Attributes:
        recorded: its digests as the manifest has them, empty for tensors that no component has; what is NaN or Inf is
            not said.
    """

    def __init__(
        self,
        file: File,
        blobs: Blobs,
        *,
        layout: Layout,
        entries: Mapping[str, Sequence[tuple[str, int]]],
        inserts: Sequence[tuple[int, int]],
        skeleton: Piece,
        pieces: Sequence[Piece],
        digests: Sequence[str],
        head: bytes | None,
    ) -> None:
        self.path = file.path
        self.size = file.size
        self.layout = layout
        self.entries = {role: tuple(named) for role, named in entries.items()}
        self.inserts = inserts
        self.skeleton_size = skeleton.end - skeleton.begin
        self.recorded = KnownDigests(file.sha256, tuple(digests), ())
        self._blobs = blobs
        self._skeleton = skeleton
        self._pieces = pieces
        self._head = head

    @property
    def safetensors_head(self) -> bytes | None:
        return self._head

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        piece = self._pieces[ordinal]
        return self._blobs.read(piece.blob, piece.begin, piece.end)

    def skeleton(self, begin: int, end: int) -> Iterator[memoryview]:
        return self._blobs.read(self._skeleton.blob, begin, end)

    def is_unchanged(self) -> bool:
        return all(map(self._blobs.is_unchanged, {self._skeleton.blob, *(piece.blob for piece in self._pieces)}))


class BlobFile(PlainFile):
    """A file that is a blob."""

    def __init__(self, path: str, digest: str, size: int, blobs: Blobs) -> None:
        """
        Raises:
            Corrupt: the blob has another size.
        """
        self.path = path
        self.digest = digest
        self.size = size
        self._blobs = blobs
        if blobs.size(digest) != size:
            raise Corrupt(f"blob {digest}: expected {size} bytes, the file {path}, found {blobs.size(digest)}")

    def chunks(self) -> Iterator[bytes | memoryview]:
        return self._blobs.read(self.digest, 0, self.size)

    def is_unchanged(self) -> bool:
        return self._blobs.is_unchanged(self.digest)


def blob_header(blobs: Blobs, digest: str) -> tuple[Header, bytes]:
    """Header of a blob that holds tensors, and the bytes that it was read from.

    Raises:
        Corrupt: it is no safetensors file.
    """
    size, what = blobs.size(digest), f"blob {digest}"
    try:
        length = header_length(_bytes(blobs, digest, 0, min(8, size)), file_size=size, what=what)
        head = _bytes(blobs, digest, 0, length)
        return parse_header(head, file_size=size, what=what), head
    except MalformedTensors as error:
        raise Corrupt(f"{str(error).partition(';')[0]}; a version says that it holds tensors") from error


def blob_tensors(blobs: Blobs, digest: str) -> RebuiltFile:
    """A blob of tensors as a file of its own, to be hashed."""
    header, head = blob_header(blobs, digest)
    return _safetensors(File(digest, digest, blobs.size(digest)), blobs, digest, header, head, {}, ())


def rebuilt_files(
    manifest: Manifest, layouts: Mapping[str, Layout], placement: Placement, blobs: Blobs
) -> tuple[list[RebuiltFile], list[BlobFile]]:
    """The tensor files and the other files of a version whose bytes are there, in an order that gives its components.

    Only headers are read.

    Raises:
        Corrupt, InvalidManifest: manifest, layouts, placement and blobs contradict each other.
    """
    check_placement(manifest, layouts, placement)
    return _Rebuilding(manifest, layouts, placement, blobs).files()


def check_placement(manifest: Manifest, layouts: Mapping[str, Layout], placement: Placement) -> None:
    """
    Raises:
        InvalidManifest: a placement that is not of this manifest.
    """
    lengths = {part.role: len(part.tensors) for part in manifest.components}
    if {role: len(entries) for role, entries in placement.components.items()} != lengths or any(
        len(layouts[role]) != length for role, length in lengths.items()
    ):
        raise InvalidManifest("a placement, or a layout, has other components than the manifest, or other tensors")
    if set(placement.files) != {file.path for file in manifest.files}:
        raise InvalidManifest("a placement has other files than the manifest")
    spliced = sum(one.length for file in placement.files.values() for one in file.splices or ())
    if spliced > sum(lengths.values()):
        raise InvalidManifest(f"a placement splices {spliced} tensors, and the version has {sum(lengths.values())}")
    listed = {digest for digest, _ in placement.blobs}
    needed = {manifest.digest, *(part.layout for part in manifest.components)}
    needed.update(part.data for part in manifest.components if part.data is not None)
    if not needed <= listed:
        raise InvalidManifest(f"a placement leaves out the blob {min(needed - listed)}")


class _Rebuilding:
    """One version on its way to files."""

    def __init__(self, manifest: Manifest, layouts: Mapping[str, Layout], placement: Placement, blobs: Blobs) -> None:
        self._manifest = manifest
        self._layouts = layouts
        self._placement = placement
        self._blobs = blobs
        self._headers: dict[str, tuple[Header, bytes]] = {}
        self._heads: dict[str, tuple[Header, bytes] | None] = {}
        self._tensors = {part.role: part.tensors for part in manifest.components}
        self._files = {file.path: file for file in manifest.files}
        self._owners = self._find_owners()
        self._owned: dict[str, list[tuple[str, int]]] = {}
        for role, owners in self._owners.items():
            for position, path in enumerate(owners):
                self._owned.setdefault(path or "", []).append((role, position))

    def files(self) -> tuple[list[RebuiltFile], list[BlobFile]]:
        owning = set(self._owned)
        owning.update(path for path, placed in self._placement.files.items() if not placed.whole)
        ordered = [self._file(path) for path in in_order(self._owners, sorted(owning))]
        plain = [
            BlobFile(file.path, self._digest(self._placement.files[file.path].blob), file.size, self._blobs)
            for file in self._manifest.files
            if file.path not in owning
        ]
        return ordered, plain

    def _digest(self, blob: int) -> str:
        return self._placement.blobs[blob][0]

    def _splices(self, path: str) -> tuple[Splice, ...] | None:
        """What comes into a skeleton; None for a file that is a blob."""
        placed = self._placement.files[path]
        if placed.whole or placed.splices is not None:
            return placed.splices
        role = self._files[path].component
        if role is None:
            raise InvalidManifest(f"{path} is a header, and no component of which")
        count = len(self._placement.components[role])
        return (Splice(self._blobs.size(self._digest(placed.blob)), role, 0, count),) if count else ()

    def _find_owners(self) -> dict[str, list[str | None]]:
        """For each tensor of each component the file that it is taken to be of. A file that is a blob shows it by the
        place of its tensors, another one by what comes into it. What has no such place (a second name of a tensor, one
        that does not stand in the file as its plain bytes) is of the file that the tensor before it is of."""
        owners: dict[str, list[str | None]] = {
            role: [None] * len(entries) for role, entries in self._placement.components.items()
        }
        whole: dict[str, list[File]] = {}
        mixed = headed = ""
        for file in self._manifest.files:
            splices = self._splices(file.path)
            if splices is None:
                whole.setdefault(self._digest(self._placement.files[file.path].blob), []).append(file)
                continue
            mixed = mixed or ("" if self._head(file.path) else file.path)
            headed = headed or ("" if file.component else file.path)  # a safetensors file of several components
            for splice in splices:
                for position in range(splice.first, splice.first + splice.length):
                    owners[splice.role][position] = owners[splice.role][position] or file.path
        for role, found in owners.items():
            for position, (blob, _) in enumerate(self._placement.components[role]):
                if found[position] is None:
                    fitting = [one for one in whole.get(self._digest(blob), ()) if one.component in (role, None)]
                    fitting.sort(key=lambda one: one.component is None)
                    found[position] = fitting[0].path if fitting else None
            near = next((path for path in found if path is not None and self._may_hold_more(path)), mixed)
            for position, path in enumerate(found):
                near = path if path is not None and self._may_hold_more(path) else near
                if path is None:
                    if not near and not headed:
                        raise InvalidManifest(f"the tensor {position} of the {role} is in no file")
                    found[position] = near or headed
        return owners

    def _may_hold_more(self, path: str) -> bool:
        return not self._placement.files[path].whole and self._head(path) is None

    def _head(self, path: str) -> tuple[Header, bytes] | None:
        """Header of a safetensors file of which the header alone is one blob."""
        if path not in self._heads:
            self._heads[path] = self._read_head(path)
        return self._heads[path]

    def _read_head(self, path: str) -> tuple[Header, bytes] | None:
        splices, size = self._splices(path), self._blobs.size(self._digest(self._placement.files[path].blob))
        digest = self._digest(self._placement.files[path].blob)
        if splices is None or not 8 <= size <= MAX_HEADER_BYTES + 8 or any(splice.at != size for splice in splices):
            return None
        head = _bytes(self._blobs, digest, 0, size)
        try:
            return parse_header(head, file_size=self._files[path].size, what=path), head
        except MalformedTensors:  # bytes of another format; the whole file is proven by its digest
            return None

    def _file(self, path: str) -> RebuiltFile:
        file, placed = self._files[path], self._placement.files[path]
        digest = self._digest(placed.blob)
        if placed.whole:
            if digest != file.sha256:
                raise InvalidManifest(f"{path} is placed as the blob {digest}, and is {file.sha256}")
            if self._blobs.size(digest) != file.size:
                raise InvalidManifest(f"{path} has {self._blobs.size(digest)} bytes, expected {file.size}")
            header, head = self._header(digest)
            entries: dict[str, list[tuple[str, int]]] = {}
            digests = [""] * len(header.layout)
            for role, position in self._owned[path]:
                _, ordinal = self._placement.components[role][position]
                self._piece(role, position)
                entries.setdefault(role, []).append((self._layouts[role].tensors[position].name, ordinal))
                digests[ordinal] = self._tensors[role][position]
            return _safetensors(file, self._blobs, digest, header, head, entries, digests)
        return self._spliced(file, digest, self._splices(path) or ())

    def _spliced(self, file: File, skeleton: str, splices: Sequence[Splice]) -> RebuiltFile:
        ordinals: dict[tuple[str, int], int] = {}
        by_place: dict[tuple[int, int], int] = {}
        tensors: list[tuple[str, int]] = []

        def ordinal_of(role: str, position: int, place: tuple[int, int] | None) -> int:
            known = ordinals.get((role, position), None if place is None else by_place.get(place))
            if known is None:
                known = len(tensors)
                tensors.append((role, position))
                by_place.setdefault(self._placement.components[role][position], known)
            ordinals[role, position] = known
            return known

        inserts = [
            (splice.at, ordinal_of(splice.role, position, None))
            for splice in splices
            for position in range(splice.first, splice.first + splice.length)
        ]
        entries: dict[str, list[tuple[str, int]]] = {}
        for role, position in self._owned.get(file.path, ()):
            place = self._placement.components[role][position]
            named = (self._layouts[role].tensors[position].name, ordinal_of(role, position, place))
            entries.setdefault(role, []).append(named)
        found = self._head(file.path)
        layout = self._spliced_layout(tensors) if found is None else found[0].layout
        pieces = [self._piece(role, position) for role, position in tensors]
        size = self._blobs.size(skeleton)
        if (
            len(layout) != len(tensors)
            or size + sum(pieces[at].end - pieces[at].begin for _, at in inserts) != file.size
            or any(at > size for at, _ in inserts)
        ):
            raise InvalidManifest(f"the parts of {file.path} are not {file.size} bytes, or other tensors than it has")
        return RebuiltFile(
            file,
            self._blobs,
            layout=layout,
            entries=entries,
            inserts=inserts,
            skeleton=Piece(skeleton, 0, size),
            pieces=pieces,
            digests=[self._tensors[role][position] for role, position in tensors],
            head=None if found is None else found[1],
        )

    def _spliced_layout(self, tensors: Sequence[tuple[str, int]]) -> Layout:
        """Under names that are unique within the file: a role has no `/`."""
        specs = [(role, self._layouts[role].tensors[position]) for role, position in tensors]
        return Layout(tuple(TensorSpec(f"{role}/{spec.name}", spec.dtype, spec.shape) for role, spec in specs))

    def _header(self, digest: str) -> tuple[Header, bytes]:
        if digest not in self._headers:
            self._headers[digest] = blob_header(self._blobs, digest)
        return self._headers[digest]

    def _piece(self, role: str, position: int) -> Piece:
        blob, ordinal = self._placement.components[role][position]
        digest, spec = self._digest(blob), self._layouts[role].tensors[position]
        header, _ = self._header(digest)
        if ordinal >= len(header.layout):
            raise Corrupt(f"blob {digest} has {len(header.layout)} tensors, none with ordinal {ordinal}")
        there = header.layout.tensors[ordinal]
        if (there.dtype, there.shape) != (spec.dtype, spec.shape):
            raise Corrupt(
                f"tensor {position} of the {role}: expected {spec.dtype}{list(spec.shape)}, found "
                f"{there.dtype}{list(there.shape)} in blob {digest}"
            )
        begin, end = header.offsets[ordinal]
        return Piece(digest, header.size + begin, header.size + end)


def _safetensors(
    file: File,
    blobs: Blobs,
    digest: str,
    header: Header,
    head: bytes,
    entries: Mapping[str, Sequence[tuple[str, int]]],
    digests: Sequence[str],
) -> RebuiltFile:
    return RebuiltFile(
        file,
        blobs,
        layout=header.layout,
        entries=entries,
        inserts=[(len(head), ordinal) for ordinal in range(len(header.layout))],
        skeleton=Piece(digest, 0, len(head)),
        pieces=[Piece(digest, header.size + begin, header.size + end) for begin, end in header.offsets],
        digests=digests,
        head=head,
    )


def in_order(owners: Mapping[str, Sequence[str | None]], paths: Iterable[str]) -> list[str]:
    """Files in an order in which their tensors, one file after the other, are those of every component."""
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(paths, ()))
    for role, found in owners.items():
        if None in found:
            raise InvalidManifest(f"a tensor of the {role} is in no file")
        blocks = [path for path, _ in groupby(path for path in found if path is not None)]
        for before, after in pairwise(blocks):
            sorter.add(after, before)
    try:
        return list(sorter.static_order())
    except CycleError as error:
        raise InvalidManifest("the files of a version hold its tensors in no order") from error


def _bytes(blobs: Blobs, digest: str, begin: int, end: int) -> bytes:
    return b"".join(map(bytes, blobs.read(digest, begin, end)))
