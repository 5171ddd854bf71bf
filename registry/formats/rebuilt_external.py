"""Versions that are known without their tensors: their files as a source, and the placement that says of each tensor in
which file it lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from registry.core.errors import InvalidManifest
from registry.core.layout import Layout, TensorSpec
from registry.core.manifest import File, Manifest
from registry.core.placement import FilePlacement, Placement
from registry.formats.rebuilt import BlobFile, Blobs, RebuiltFile, check_placement, in_order
from registry.formats.source import KnownDigests, TensorFile


class ExternalFile(TensorFile):
    """A safetensors file that is known without its bytes. Nobody asks for them: its digests are known."""

    def __init__(
        self, file: File, layout: Layout, entries: Mapping[str, Sequence[tuple[str, int]]], known: KnownDigests
    ) -> None:
        self.path = file.path
        self.size = file.size
        self.layout = layout
        self.entries = {role: tuple(named) for role, named in entries.items()}
        self.inserts = ()
        self.skeleton_size = 0
        self.known = self.recorded = known

    @property
    def safetensors_head(self) -> bytes | None:
        return b""

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        raise RuntimeError(f"{self.path} is known without its bytes")

    def skeleton(self, begin: int, end: int) -> Iterator[memoryview]:
        raise RuntimeError(f"{self.path} is known without its bytes")


def external_files(
    manifest: Manifest,
    layouts: Mapping[str, Layout],
    placement: Placement,
    blobs: Blobs,
    nonfinite: Mapping[str, Sequence[int]],
) -> tuple[list[ExternalFile], list[BlobFile]]:
    """The same of a version whose tensors are not there: each tensor file is a blob of the role `external`.

    Args:
        nonfinite: positions of tensors with NaN or Inf, by component.

    Raises:
        Corrupt, InvalidManifest
    """
    check_placement(manifest, layouts, placement)
    found: list[ExternalFile] = []
    plain: list[BlobFile] = []
    paths: dict[str, str] = {}
    for file in manifest.files:
        placed = placement.files[file.path]
        digest, role = placement.blobs[placed.blob]
        if digest != file.sha256 or not placed.whole:
            raise InvalidManifest(f"{file.path} of an external version is no blob of its own")
        if role == "external" and digest not in paths:
            paths[digest] = file.path
        else:
            plain.append(BlobFile(file.path, digest, file.size, blobs))
    owners = {
        role: [paths.get(placement.blobs[blob][0]) for blob, _ in entries]
        for role, entries in placement.components.items()
    }
    files = {file.path: file for file in manifest.files}
    order = in_order(owners, paths.values())
    specs_of: dict[str, dict[int, tuple[TensorSpec, str]]] = {path: {} for path in order}
    entries_of: dict[str, dict[str, list[tuple[str, int]]]] = {path: {} for path in order}
    bad_of: dict[str, set[int]] = {path: set() for path in order}
    for part in manifest.components:
        suspicious = set(nonfinite.get(part.role, ()))
        for position, (_, ordinal) in enumerate(placement.components[part.role]):
            path = owners[part.role][position] or ""
            spec = layouts[part.role].tensors[position]
            specs_of[path].setdefault(ordinal, (spec, part.tensors[position]))
            entries_of[path].setdefault(part.role, []).append((spec.name, ordinal))
            if position in suspicious:
                bad_of[path].add(ordinal)
    for path in order:
        specs = specs_of[path]
        if sorted(specs) != list(range(len(specs))):
            raise InvalidManifest(f"{path} of an external version has tensors that no component names")
        ordered = [specs[ordinal] for ordinal in range(len(specs))]
        known = KnownDigests(files[path].sha256, tuple(digest for _, digest in ordered), tuple(sorted(bad_of[path])))
        layout = Layout(tuple(spec for spec, _ in ordered))
        if files[path].size < 8 + layout.nbytes:
            raise InvalidManifest(f"{path} has {files[path].size} bytes, too few for its tensors")
        found.append(ExternalFile(files[path], layout, entries_of[path], known))
    return found, plain


def external_placement(manifest: Manifest, layouts: Mapping[str, Layout], files: Sequence[RebuiltFile]) -> Placement:
    """The placement of a version as if it had been pushed without its bytes.

    Raises:
        InvalidManifest: one of its tensor files is no safetensors file.
    """
    blobs: dict[str, str] = {}
    components: dict[str, dict[str, tuple[int, int]]] = {part.role: {} for part in manifest.components}
    for file in files:
        if not file.can_be_external:
            raise InvalidManifest(f"{file.path} is no safetensors file of a model alone, so it cannot be left out")
        blobs.setdefault(file.recorded.sha256, "external")
        position = list(blobs).index(file.recorded.sha256)
        for role, entries in file.entries.items():
            components[role].update({name: (position, ordinal) for name, ordinal in entries})
    for other in manifest.files:
        blobs.setdefault(other.sha256, "file")
    for part in manifest.components:
        if part.data is not None:
            blobs.setdefault(part.data, "data")
    for part in manifest.components:
        blobs.setdefault(part.layout, "layout")
    blobs.setdefault(manifest.digest, "manifest")
    positions = {digest: position for position, digest in enumerate(blobs)}
    return Placement(
        tuple(blobs.items()),
        {role: tuple(named[spec.name] for spec in layouts[role]) for role, named in components.items()},
        {file.path: FilePlacement(positions[file.sha256], whole=True) for file in manifest.files},
    )
