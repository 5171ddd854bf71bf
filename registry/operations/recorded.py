"""A version as journal and store have it, in the form in which a push hands it to the catalog: the inverse of a push's
writing. Of weights only headers are read; what the tensors' digests are, manifests and placements say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from registry.catalog.blobs import NewBlob
from registry.catalog.insertion import NewVersion
from registry.compat.case import ModelSide
from registry.core.adapter_config import AdapterConfig
from registry.core.adapter_names import Target
from registry.core.content_digest import content_digest
from registry.core.errors import Corrupt
from registry.core.event import Event
from registry.core.layout import Layout, TensorSpec
from registry.core.manifest import File, Manifest
from registry.core.placement import Placement
from registry.core.reference import shown
from registry.core.safetensors_header import build_header
from registry.operations.describing import adapter_of, version_findings
from registry.operations.histories import BROUGHT, Fate, Histories, payload_of
from registry.operations.holdings import Holdings, Newest

_TENSORS = 200
"""Blobs whose tensors are kept in mind: bases, which many versions refer to."""


@dataclass(frozen=True)
class BlobTensors:
    """What lies in a safetensors blob.

    Attributes:
        digests: of its tensors, in the order of its layout.
        whole: bytes of the file that it is, if it is one.
    """

    layout: Layout
    digests: tuple[str, ...]
    whole: int | None = None


class Recorder:
    """Makes `NewVersion` values of `pushed` events.

    Args:
        check_content: work the content digests out again, and hold them against the recorded ones.
    """

    def __init__(self, histories: Histories, holdings: Holdings, *, check_content: bool) -> None:
        self._histories = histories
        self._holdings = holdings
        self._check_content = check_content
        self._tensors: Newest[BlobTensors] = Newest(_TENSORS)

    def manifest(self, event: Event) -> Manifest:
        """The manifest of a `pushed` event.

        Raises:
            Corrupt
        """
        with payload_of(event):
            digest = str(event.payload["manifest"])
        return self._holdings.manifest(digest)

    def new_version(
        self,
        event: Event,
        manifest: Manifest,
        fate: Fate,
        *,
        base_id: int | None,
        parent_ids: tuple[int, ...],
        registered: Mapping[str, bool],
        model: ModelSide | None = None,
    ) -> NewVersion:
        """All that the rows of a version say.

        Args:
            model: the base that it was trained on.
            registered: blobs that have a row, and whether it knows their tensors; nothing more is found out of these.

        Raises:
            Corrupt: names the blob or member that is wrong.
        """
        what = f"{event.namespace}/{event.name}@{event.version}"
        payload = event.payload
        with payload_of(event):
            placement = Placement.from_json(payload["placement"])
            recorded = payload.get("nonfinite")
            nonfinite = {role: tuple(positions) for role, positions in (recorded or {}).items()}
            peft_version = payload["peft_version"]
            moved = None
            if fate.placed_by != event.seq:
                later = self._histories.event(f"{event.namespace}/{event.name}", fate.placed_by)
                moved = Placement.from_json(later.payload["placement"])
        purged = fate.state == "purged"
        layouts = {part.role: self._holdings.layout(part.layout) for part in manifest.components}
        for part in manifest.components:
            if len(part.tensors) != len(layouts[part.role]):
                raise Corrupt(f"{what}: {len(part.tensors)} tensors of the {part.role}, its layout has another number")
            if any(not 0 <= position < len(part.tensors) for position in nonfinite.get(part.role, ())):
                raise Corrupt(f"{what}: nonfinite names a tensor of the {part.role} that is not there")
        _check_placement(placement if moved is None else moved, manifest, what)
        if recorded is None and not purged:  # events of the first program did not say it: only the weights can
            nonfinite = self._nonfinite(manifest, placement if moved is None else moved)
        config = self._holdings.config(manifest, peft_version)
        with payload_of(event):
            adapter = adapter_of(manifest, config, layouts, peft_version=peft_version, model=model)
            targets = () if adapter is None else adapter.targets
            findings = version_findings(adapter, layouts, nonfinite, model=model)
        if self._check_content:
            self._compare_content(manifest, layouts, config, targets, str(payload["content"]), what)
        with payload_of(event):
            new = NewVersion(
                manifest=manifest,
                content_digest=payload["content"],
                layouts=layouts,
                targets=targets,
                placement=placement,
                blobs=(),
                base_id=base_id,
                parents=tuple(
                    (parent.relation, row_id, parent.weight)
                    for parent, row_id in zip(manifest.parents, parent_ids, strict=True)
                ),
                bytes_new=payload["bytes_new"],
                peft_version=peft_version,
                environment=dict(payload["environment"]),
                message=payload["message"],
                findings=findings,
                nonfinite=None if recorded is None else nonfinite,
                origin=payload.get("origin"),
                created_by=event.actor,
                created_at=event.at,
                moved=moved,
                purged=purged,
            )
        blobs = tuple(self._blob(digest, role, new, what, registered) for _, digest, role in new.kept)
        return NewVersion(**{**vars(new), "blobs": blobs})

    def _nonfinite(self, manifest: Manifest, placement: Placement) -> dict[str, tuple[int, ...]]:
        """Positions of tensors with NaN or Inf, by component, from the bytes; what is not there has none."""
        found = {}
        for part in manifest.components:
            positions = []
            for position, (blob, ordinal) in enumerate(placement.components[part.role]):
                if ordinal in self._holdings.nonfinite_ordinals(placement.blobs[blob][0]):
                    positions.append(position)
            if positions:
                found[part.role] = tuple(positions)
        return found

    def _compare_content(
        self,
        manifest: Manifest,
        layouts: Mapping[str, Layout],
        config: AdapterConfig | None,
        targets: Sequence[Target],
        recorded: str,
        what: str,
    ) -> None:
        tensors = {part.role: (layouts[part.role], part.tensors) for part in manifest.components if part.tensors}
        found = content_digest(tensors, config, targets)
        if found != recorded:
            raise Corrupt(f"{what}: expected the content digest {found}, its event has {shown(recorded, 80)}")

    def _blob(self, digest: str, role: str, new: NewVersion, what: str, registered: Mapping[str, bool]) -> NewBlob:
        external = role == "external" and not self._holdings.contains(digest)
        if registered.get(digest) or (digest in registered and role not in BROUGHT):
            return NewBlob(digest, 0, external=external)
        made_of_tensors = role in BROUGHT or role == "reused"
        tensors = self.tensors(digest, new, there=not external) if made_of_tensors else None
        size = None if external else self._holdings.size(digest)
        if size is None:
            size = _size(digest, new, tensors)
        if size is None:
            raise Corrupt(f"{what} needs blob {digest} ({role}), which is missing, and nothing else tells its size")
        if tensors is None:
            return NewBlob(digest, size, external=external)
        return NewBlob(digest, size, tensors.layout, tensors.digests, self._index_all(digest, role, new), external)

    def _index_all(self, digest: str, role: str, new: NewVersion) -> bool:
        """Whether the version that brought a blob first is one of those that index small tensors too."""
        makers = self._histories.makers.get(digest, [])
        alone = not makers or (role in BROUGHT and len(makers) == 1)
        manifest = new.manifest if alone else self._manifest_of(*makers[0])
        return manifest.kind != "adapter"

    def tensors(self, digest: str, new: NewVersion, *, there: bool) -> BlobTensors:
        """What lies in a safetensors blob, from its header and from the versions that brought it.

        Args:
            new: a version that may be one of them, at hand.
            there: whether it should be in the store.

        Raises:
            Corrupt: it cannot be told, or header and manifests contradict each other.
        """
        if (cached := self._tensors.get(digest)) is not None:
            return cached
        found: dict[int, tuple[TensorSpec, str]] = {}
        _gather(found, digest, new.manifest, new.layouts, new.placement if new.moved is None else new.moved)
        header = self._holdings.header(digest) if there else None
        whole = _whole_size(digest, new.manifest)
        for reference, seq in self._histories.makers.get(digest, ()):
            if _complete(found, header):
                break
            manifest = self._manifest_of(reference, seq)
            layouts = {part.role: self._holdings.layout(part.layout) for part in manifest.components}
            with payload_of(self._histories.event(reference, seq)):
                placement = Placement.from_json(self._histories.event(reference, seq).payload["placement"])
            _gather(found, digest, manifest, layouts, placement)
            whole = whole or _whole_size(digest, manifest)
        if not _complete(found, header):
            if header is None:
                raise Corrupt(f"blob {digest} cannot be read, and no version tells all of its tensors")
            return self._tensors.put(digest, BlobTensors(header, self._holdings.hash_tensors(digest)))
        ordered = [found[ordinal] for ordinal in range(len(found))]
        if header is None:
            header = Layout(tuple(spec for spec, _ in ordered))
        for spec, (recorded, _) in zip(header, ordered, strict=True):
            if (spec.dtype, spec.shape) != (recorded.dtype, recorded.shape):
                told = f"expected {recorded.dtype} {list(recorded.shape)}, found {spec.dtype} {list(spec.shape)}"
                raise Corrupt(f"blob {digest}: tensor {shown(spec.name)}: {told}")
        return self._tensors.put(digest, BlobTensors(header, tuple(one for _, one in ordered), whole))

    def _manifest_of(self, reference: str, seq: int) -> Manifest:
        event = self._histories.event(reference, seq)
        if event.kind != "pushed":
            for before in range(seq - 1, 0, -1):
                one = self._histories.event(reference, before)
                if one.kind == "pushed" and one.version == event.version:
                    return self.manifest(one)
        return self.manifest(event)


def _gather(
    found: dict[int, tuple[TensorSpec, str]],
    digest: str,
    manifest: Manifest,
    layouts: Mapping[str, Layout],
    placement: Placement,
) -> None:
    """Adds what a version says of the tensors of a blob, by their ordinals."""
    position = next((at for at, (one, _) in enumerate(placement.blobs) if one == digest), None)
    for part in manifest.components:
        entries = placement.components.get(part.role, ())
        for spec, tensor, (blob, ordinal) in zip(layouts[part.role], part.tensors, entries, strict=True):
            if blob == position:
                _, known = found.setdefault(ordinal, (spec, tensor))
                if known != tensor:
                    raise Corrupt(f"blob {digest}: tensor {ordinal} is {known} to one version and {tensor} to another")


def _complete(found: Mapping[int, object], header: Layout | None) -> bool:
    if header is None:
        return bool(found) and max(found) + 1 == len(found)
    return len(found) == len(header) and all(ordinal in found for ordinal in range(len(header)))


def _size(digest: str, new: NewVersion, tensors: BlobTensors | None) -> int | None:
    """Bytes of a blob that is not there, as far as the version tells."""
    whole = _whole_size(digest, new.manifest)
    if whole is not None:
        return whole
    if tensors is not None and tensors.whole is not None:
        return tensors.whole
    if tensors is not None:  # tensors that lie apart from their file have a header of our making
        return len(build_header(tensors.layout)) + tensors.layout.nbytes
    placement = new.placement if new.moved is None else new.moved
    for file in new.manifest.files:
        placed = placement.files[file.path]
        if not placed.whole and placement.blobs[placed.blob][0] == digest:
            return file.size - _spliced(file, new, placement)
    return None


def _whole_size(digest: str, manifest: Manifest) -> int | None:
    return next((file.size for file in manifest.files if file.sha256 == digest), None)


def _spliced(file: File, new: NewVersion, placement: Placement) -> int:
    placed = placement.files[file.path]
    if placed.splices is None:
        return 0 if file.component is None else new.layouts[file.component].nbytes
    return sum(
        spec.nbytes
        for splice in placed.splices
        for spec in new.layouts[splice.role].tensors[splice.first : splice.first + splice.length]
    )


def _check_placement(placement: Placement, manifest: Manifest, what: str) -> None:
    """
    Raises:
        Corrupt: the placement is not one of this manifest.
    """
    parts = {part.role: part for part in manifest.components}
    blobs = {digest for digest, _ in placement.blobs}
    if placement.components.keys() != parts.keys():
        raise Corrupt(f"{what}: the components of its placement are not those of its manifest")
    if any(len(placement.components[role]) != len(part.tensors) for role, part in parts.items()):
        raise Corrupt(f"{what}: its placement has another number of tensors than its manifest")
    if placement.files.keys() != {file.path for file in manifest.files}:
        raise Corrupt(f"{what}: the files of its placement are not those of its manifest")
    needed = {manifest.digest, *(part.layout for part in parts.values())}
    needed |= {part.data for part in parts.values() if part.data is not None}
    if missing := needed - blobs:
        raise Corrupt(f"{what}: its placement lacks the blob {min(missing)}, which its manifest names")
    for file in manifest.files:
        placed = placement.files[file.path]
        if placed.whole and placement.blobs[placed.blob][0] != file.sha256:
            raise Corrupt(f"{what}: its placement has another blob for the file {shown(file.path)}")
        if placed.splices is None and not placed.whole and file.component is None:
            raise Corrupt(f"{what}: its placement has a header for the file {shown(file.path)}, which is no component")
