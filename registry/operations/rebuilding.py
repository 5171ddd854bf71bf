"""A stored version as a source again, from whatever holds its blobs, and the proof on paper that a push of it would
make the same version. An export proves so that what it writes can be imported; an import, before it writes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from registry.core.adapter_config import AdapterConfig, adapter_config, canonical_config, read_adapter_config
from registry.core.bundle import check_runs
from registry.core.canonical_json import canonical_json, parse_json
from registry.core.errors import Corrupt, DigestMismatch, InvalidConfig, InvalidInput, InvalidManifest
from registry.core.layout import Layout
from registry.core.manifest import Manifest
from registry.core.placement import Placement
from registry.core.state_document import read_state
from registry.formats.paths import ADAPTER_CONFIG
from registry.formats.rebuilt import BlobFile, Blobs, RebuiltFile, rebuilt_files
from registry.formats.rebuilt_external import ExternalFile, external_files
from registry.formats.source import Source
from registry.operations.describing import Description, describe
from registry.operations.hashing import FileDigests
from registry.operations.past import HISTORY, Past
from registry.operations.reuse import NOTHING_STORED
from registry.operations.writing import WrittenFile, WrittenPlainFile
from registry.store.interface import StoredBlob


class Documents(Blobs, Protocol):
    """Blobs of which small ones can be read as a whole."""

    def document(self, digest: str) -> bytes:
        """All bytes of a small blob, proven."""
        ...


@dataclass(frozen=True)
class Rebuilt:
    """A version, read from its blobs.

    Attributes:
        files: those with tensors. Headers were read, and nothing else of them.
        plain: the others.
        data: state documents by component.
    """

    reference: str
    manifest: Manifest
    layouts: Mapping[str, Layout]
    placement: Placement
    past: Past
    files: Sequence[RebuiltFile | ExternalFile]
    plain: Sequence[BlobFile]
    config: AdapterConfig | None
    data: Mapping[str, bytes]

    def source(
        self, *, described: Mapping[str, bytes] | None = None, origin: Mapping[str, str] | None = None
    ) -> Source:
        """Something that can be pushed."""
        return Source(
            form=f"version {self.reference}",
            kind=self.manifest.kind,
            tensor_files=tuple(self.files),
            plain_files=tuple(self.plain),
            config=self.config,
            peft_version=self.past.peft_version,
            data=self.data,
            described=described or {},
            origin=origin,
            digest=self.manifest.digest,
            environment=self.past.environment,
            said=self.past.said,
            recipe=self.manifest.recipe,
        )

    def describe(self) -> Description:
        """What a push of it would make, if its tensors are what the manifest says.

        Raises:
            DigestMismatch: not the version that it was.
            InvalidInput
        """
        files = [WrittenFile(file, FileDigests(*file.recorded), NOTHING_STORED, None) for file in self.files]
        plain = [WrittenPlainFile(one.path, StoredBlob(one.digest, one.size, created=False)) for one in self.plain]
        manifest = self.manifest
        found = describe(self.source(), manifest.kind, files, plain, base=manifest.base, parents=manifest.parents)
        if found.manifest.digest != manifest.digest:
            what = f"{self.reference}, put together again"
            raise DigestMismatch(what, expected=manifest.digest, actual=found.manifest.digest)
        return found


def rebuilt(
    reference: str, manifest: Manifest, past: Past, blobs: Documents, *, external: Placement | None = None
) -> Rebuilt:
    """Reads a version: documents, small files and headers.

    Args:
        external: placement of a version whose tensors are not there.

    Raises:
        Corrupt, DigestMismatch, InvalidInput: what is there is no such version.
    """
    layouts = {part.role: Layout.from_document(blobs.document(part.layout)) for part in manifest.components}
    placement = _placement(past.placement, manifest) if external is None else external
    files: Sequence[RebuiltFile | ExternalFile]
    if external is None:
        files, plain = rebuilt_files(manifest, layouts, placement, blobs)
    else:
        files, plain = external_files(manifest, layouts, placement, blobs, past.nonfinite)
    data = {
        part.role: _state(blobs.document(part.data), part.role, layouts[part.role])
        for part in manifest.components
        if part.data is not None
    }
    config = _config(manifest, plain, blobs)
    return Rebuilt(reference, manifest, layouts, placement, past, files, plain, config, data)


def history(earlier: bytes, documents: Sequence[bytes]) -> bytes:
    """The journal documents of a version as one: a canonical JSON list, after those that it came with itself.

    Raises:
        Corrupt: `earlier` is no such list.
    """
    try:
        before = parse_json(earlier)
        if not isinstance(before, list) or canonical_json(before, HISTORY) != earlier:
            raise ValueError("expected a list in canonical form")
    except (InvalidInput, ValueError, RecursionError) as error:
        raise Corrupt(f"the {HISTORY} of a version cannot be read: {error}"[:300]) from error
    # Canonical documents next to each other are a canonical list.
    return b"[" + b",".join((*([earlier[1:-1]] if before else []), *documents)) + b"]"


def _placement(tree: Any, manifest: Manifest) -> Placement:
    try:
        check_runs([tree], sum(len(part.tensors) for part in manifest.components))
    except (InvalidInput, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidManifest(f"not a placement: {type(error).__name__}: {error}"[:200]) from error
    return Placement.from_json(tree)


def _state(document: bytes, role: str, layout: Layout) -> bytes:
    read_state(document, layout.by_name)
    if canonical_json(parse_json(document), role) != document:
        raise InvalidManifest(f"the state document of the {role} is not in canonical form (RFC 8785)")
    return document


def _config(manifest: Manifest, plain: Sequence[BlobFile], blobs: Documents) -> AdapterConfig | None:
    """The adapter's configuration: as its file has it, if that is what the manifest means."""
    if manifest.config is None:
        return None
    file = next((one for one in plain if one.path == ADAPTER_CONFIG), None)
    if file is not None:
        try:
            found = read_adapter_config(blobs.document(file.digest), ADAPTER_CONFIG)
        except InvalidConfig:
            found = None  # another file of that name
        if found is not None and canonical_config(found) == manifest.config:
            return found
    return adapter_config(dict(manifest.config))
