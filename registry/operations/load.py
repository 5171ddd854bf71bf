"""Loading: a version's tensors out of the store, or into a live model. Weights move once: blobs are
mapped, checked against their digests, and copied straight into the model's own parameters. A model
that does not fit is refused before anything of it is changed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.catalog.contents import Contents, StoredComponent, read_contents
from registry.catalog.versions import VersionRecord, records, resolve
from registry.core.adapter_config import AdapterConfig, read_adapter_config
from registry.core.digest import tensor_hasher
from registry.core.errors import Corrupt, DigestMismatch, InvalidInput, NotFound, UnsupportedTensor
from registry.core.layout import Layout
from registry.core.reference import parse_reference, shown
from registry.core.state_document import read_state
from registry.formats.paths import ADAPTER_CONFIG
from registry.operations.context import Context
from registry.operations.reading import BlobReader, blob_bytes, file_bytes, refuse_external
from registry.store.interface import BlobStore

if TYPE_CHECKING:
    import torch
    from torch import nn

MAIN_COMPONENTS = ("adapter", "model")


@dataclass(frozen=True)
class _Loaded:
    record: VersionRecord
    config: AdapterConfig | None
    tensors: dict[str, torch.Tensor]
    role: str
    layout: Layout
    state: bytes | None


def load(
    context: Context,
    reference: str,
    model: nn.Module | None = None,
    *,
    component: str | None = None,
    adapter_name: str | None = None,
    strict: bool = True,
    prove: bool = False,
    check: bool = True,
) -> Any:
    """Loads a version; see `Registry.load`.

    Args:
        check: hold an adapter against the model by the rules of `registry.compat` first.
    """
    if prove:
        return _load_and_prove(context, reference, model, component, adapter_name, strict)
    loaded = _read(context, reference, component)
    if model is None:
        tensors = _unshared(loaded.tensors)
        return tensors if loaded.state is None else read_state(loaded.state, tensors)
    if loaded.role == "adapter":
        from registry.operations.load_adapter import load_adapter
        from registry.operations.load_check import findings_first

        found = findings_first(context, loaded.record, model, adapter_name=adapter_name) if check else ()
        return load_adapter(
            model,
            loaded.tensors,
            loaded.config,
            adapter_name=adapter_name,
            strict=strict,
            what=loaded.record.reference,
            findings=found,
        )
    from registry.operations.copying import copy_into

    findings = []
    if loaded.config is not None and loaded.role == "model":
        from registry.operations.load_adapter import checkpoint_findings

        findings = checkpoint_findings(model, loaded.config, loaded.layout)
    what = loaded.record.reference
    copy_into(model, model.state_dict(), loaded.tensors, strict=strict, what=what, findings=findings)
    return model


def _load_and_prove(
    context: Context,
    reference: str,
    model: nn.Module | None,
    component: str | None,
    adapter_name: str | None,
    strict: bool,
) -> nn.Module:
    if model is None:
        raise InvalidInput("prove=True runs a model; give one to load into")
    if component is not None and component not in MAIN_COMPONENTS:
        raise InvalidInput(f"a probe is of a version's own function, not of its component {shown(component)}")
    from registry.formats.live import find_adapted
    from registry.formats.proof import prove
    from registry.formats.quiet_run import refuse_unrunnable
    from registry.formats.tuner_layers import refuse_inactive
    from registry.operations.proving import read_version_probe

    # All that can be refused is refused before the model is changed.
    pinned, probe = read_version_probe(context, reference)
    refuse_unrunnable(model)
    holder = find_adapted(model)
    if holder is not None and adapter_name is not None:
        refuse_inactive(holder, adapter_name)
    loaded: nn.Module = load(context, pinned, model, component=component, adapter_name=adapter_name, strict=strict)
    prove(loaded, probe, pinned).require(f"{pinned} was loaded")
    return loaded


def _read(context: Context, reference: str, component: str | None) -> _Loaded:
    with context.reading() as connection:
        key = resolve(connection, parse_reference(reference))
        record = records(connection, [key.id])[0]
        contents = read_contents(connection, key.id)
    refuse_external(contents, record.reference)
    roles = [component] if component is not None else [r for r in MAIN_COMPONENTS if r in contents.components]
    if not roles or roles[0] not in contents.components:
        known = ", ".join(sorted(contents.components))
        raise NotFound(f"{record.reference} has no component {roles[0] if roles else 'model'}; it has {known}")
    with BlobReader(context.store.blobs) as reader:
        tensors = read_tensors(reader, contents.components[roles[0]])
        config = config_of(context.store.blobs, reader, contents)
        document = contents.components[roles[0]].data
        state = None if document is None else blob_bytes(context.store.blobs, document)
        layout = contents.components[roles[0]].layout
    return _Loaded(record, config, tensors, roles[0], layout, state)


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of each tensor that lies where an earlier one does: who changes one must not change two."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        again = tensor.numel() > 0 and tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        found[name] = tensor.clone() if again else tensor
    return found


def config_of(blobs: BlobStore, reader: BlobReader, contents: Contents) -> AdapterConfig | None:
    """An adapter's configuration: from its file, else from the catalog; None where it came without one.

    Raises:
        DigestMismatch, BlobNotFound, Corrupt
    """
    for file in contents.files:
        if file.path == ADAPTER_CONFIG:
            data = b"".join(file_bytes(reader, blobs, file, {}))
            return read_adapter_config(data, ADAPTER_CONFIG)
    return None if contents.config is None else read_adapter_config(contents.config.encode(), "the configuration")


def read_tensors(reader: BlobReader, component: StoredComponent) -> dict[str, torch.Tensor]:
    """A component's tensors by name, mapped from their blobs and proven against their digests.

    Raises:
        DigestMismatch, BlobNotFound, Corrupt
        UnsupportedTensor: a dtype that safetensors has and torch has not.
    """
    from safetensors import SafetensorError, safe_open

    from registry.formats.live import tensor_bytes

    opened: dict[str, Any] = {}
    found: dict[str, torch.Tensor] = {}
    for spec, (digest, ordinal) in zip(component.layout, component.places, strict=True):
        stored = reader.blob(digest).header.layout.tensors
        there = stored[ordinal] if ordinal < len(stored) else None
        if there is None or (there.dtype, there.shape) != (spec.dtype, spec.shape):
            raise Corrupt(f"blob {digest}: expected {spec.dtype} {list(spec.shape)} at {ordinal}, found {there}")
        if digest not in opened:
            opened[digest] = safe_open(str(reader.path(digest)), framework="pt", device="cpu")
        try:
            found[spec.name] = opened[digest].get_tensor(there.name)
        except SafetensorError as error:
            raise UnsupportedTensor(
                f"{spec.name}: torch has no {spec.dtype} of shape {list(spec.shape)} ({error}); pull the file instead"
            ) from error

    def proof(index: int) -> str:
        spec = component.layout.tensors[index]
        hasher = tensor_hasher(spec.dtype, spec.shape)
        hasher.update(tensor_bytes(found[spec.name]))
        return str(hasher.hexdigest())

    with ThreadPoolExecutor(max_workers=2) as pool:
        for spec, expected, actual in zip(
            component.layout, component.tensors, pool.map(proof, range(len(component.layout))), strict=True
        ):
            if actual != expected:
                raise DigestMismatch(f"tensor {spec.name}", expected=expected, actual=actual)
    return found
