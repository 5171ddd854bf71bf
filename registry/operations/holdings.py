"""What a store says of its own blobs, without a catalog: sizes, proven manifests and layouts, headers. A blob that is
missing or damaged is told apart from one that says something else; nothing is changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Generic, TypeVar

from registry.core.adapter_config import MAX_BYTES, AdapterConfig, adapter_config, canonical_config, read_adapter_config
from registry.core.digest import tensor_hasher
from registry.core.errors import BlobNotFound, Corrupt, InvalidConfig, InvalidManifest, MalformedTensors
from registry.core.layout import Layout
from registry.core.manifest import Manifest
from registry.core.safetensors_header import read_header
from registry.operations.hashing import nonfinite_test
from registry.operations.reading import BlobReader, blob_bytes
from registry.store.files import storage_errors
from registry.store.interface import Store

ADAPTER_CONFIG = "adapter_config.json"
_LAYOUTS = 1000

T = TypeVar("T")


class Newest(Generic[T]):
    """The values that were asked for last, up to a number of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, key: str) -> T | None:
        found = self._values.get(key)
        if found is not None:
            self._values.move_to_end(key)
        return found

    def put(self, key: str, value: T) -> T:
        self._values[key] = value
        if len(self._values) > self._most:
            self._values.popitem(last=False)
        return value


class Holdings:
    """Reads blobs of one store.

    Args:
        damaged: blobs whose bytes are not to be believed, beside those that are missing.
        sizes: of such blobs, where somebody else knows them.

    Attributes:
        unreadable: why, by digest, for blobs that were asked for and not found, or found to be no safetensors file.
    """

    def __init__(
        self, store: Store, *, damaged: Collection[str] = frozenset(), sizes: Mapping[str, int] | None = None
    ) -> None:
        self.store = store
        self.unreadable: dict[str, str] = {}
        self._damaged = damaged
        self._sizes = sizes or {}
        self._layouts: Newest[Layout] = Newest(_LAYOUTS)
        self._nonfinite: dict[str, frozenset[int]] = {}

    def contains(self, digest: str) -> bool:
        return self.store.blobs.contains(digest)

    def size(self, digest: str) -> int | None:
        """Bytes of a blob; None where it is missing or damaged and nobody knows."""
        if digest not in self._damaged:
            try:
                return self.store.blobs.size(digest)
            except (BlobNotFound, Corrupt) as error:
                self.unreadable.setdefault(digest, str(error))
        return self._sizes.get(digest)

    def manifest(self, digest: str) -> Manifest:
        """
        Raises:
            Corrupt: it is missing, damaged, or no manifest.
        """
        try:
            return Manifest.from_document(blob_bytes(self.store.blobs, digest))
        except (BlobNotFound, InvalidManifest) as error:
            raise Corrupt(f"manifest {digest}: {error}") from error

    def layout(self, digest: str) -> Layout:
        """
        Raises:
            Corrupt: it is missing, damaged, or no layout.
        """
        found = self._layouts.get(digest)
        if found is None:
            try:
                found = self._layouts.put(digest, Layout.from_document(blob_bytes(self.store.blobs, digest)))
            except (BlobNotFound, InvalidManifest) as error:
                raise Corrupt(f"layout {digest}: {error}") from error
        return found

    def header(self, digest: str) -> Layout | None:
        """The tensors of a safetensors blob, of which only the header is read; None where they cannot be told."""
        if digest in self._damaged:
            return None
        try:
            with (
                self.store.blobs.open(digest) as file,
                storage_errors(f"read the header of blob {digest}", writing=False),
            ):
                header, _ = read_header(file, file_size=self.store.blobs.size(digest), what=f"blob {digest}")
        except (BlobNotFound, Corrupt, MalformedTensors) as error:
            self.unreadable.setdefault(digest, str(error))
            return None
        return header.layout

    def hash_tensors(self, digest: str) -> tuple[str, ...]:
        """Digests of all tensors of a safetensors blob, by reading it.

        Raises:
            BlobNotFound, Corrupt
        """
        with BlobReader(self.store.blobs) as reader:
            found = []
            for ordinal, spec in enumerate(reader.blob(digest).header.layout):
                hasher = tensor_hasher(spec.dtype, spec.shape)
                for chunk in reader.tensor(digest, ordinal):
                    hasher.update(chunk)
                found.append(str(hasher.hexdigest()))
        return tuple(found)

    def nonfinite_ordinals(self, digest: str) -> frozenset[int]:
        """Which tensors of a safetensors blob hold NaN or Inf, by reading it once; none of a blob that cannot be read,
        which is told by its digest."""
        known = self._nonfinite.get(digest)
        if known is None:
            found = set()
            try:
                with BlobReader(self.store.blobs) as reader:
                    for ordinal, spec in enumerate(reader.blob(digest).header.layout):
                        suspicious = nonfinite_test(spec.dtype)
                        if suspicious is not None and any(
                            suspicious(memoryview(chunk)) for chunk in reader.tensor(digest, ordinal)
                        ):
                            found.add(ordinal)
            except (BlobNotFound, Corrupt):
                found.clear()
            known = self._nonfinite[digest] = frozenset(found)
        return known

    def config(self, manifest: Manifest, peft_version: str | None) -> AdapterConfig | None:
        """The adapter's configuration: as it was pushed where its file is there, else in the manifest's spelling, which
        has not the order of its patterns and of what wrote it only the version."""
        if manifest.config is None:
            return None
        for file in manifest.files:
            if file.path.rpartition("/")[2] == ADAPTER_CONFIG and file.size <= MAX_BYTES:
                try:
                    config = read_adapter_config(blob_bytes(self.store.blobs, file.sha256), file.path)
                except (BlobNotFound, Corrupt, InvalidConfig):
                    continue  # damage is found and named by its digest; here the manifest says the same
                if canonical_config(config) == manifest.config:
                    return config
        known = {} if peft_version is None else {"peft_version": peft_version}
        return adapter_config({**manifest.config, **known}, "the configuration in the manifest")
