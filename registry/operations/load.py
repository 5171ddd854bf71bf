"""Loading: a version's tensors out of the store, or into a live model. Weights move once: blobs are
mapped, checked against their digests, and copied straight into the model's own parameters. A model
that does not fit is refused before anything of it is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.catalog.contents import Contents, StoredComponent, read_contents
from registry.catalog.versions import VersionRecord, records, resolve
from registry.core.adapter_config import AdapterConfig, read_adapter_config
from registry.core.digest import tensor_hasher
from registry.core.errors import DigestMismatch, Incompatible, InvalidInput, NotFound
from registry.core.findings import Finding
from registry.core.reference import parse_reference
from registry.formats.paths import ADAPTER_CONFIG
from registry.operations.context import Context
from registry.operations.reading import BlobReader, file_bytes

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


def load(
    context: Context,
    reference: str,
    model: nn.Module | None = None,
    *,
    component: str | None = None,
    adapter_name: str | None = None,
    strict: bool = True,
) -> Any:
    """Loads a version; see `Registry.load`."""
    loaded = _read(context, reference, component)
    if model is None:
        return loaded.tensors
    if loaded.role == "adapter":
        from registry.operations.load_adapter import load_adapter

        return load_adapter(
            model, loaded.tensors, loaded.config, adapter_name=adapter_name, strict=strict, what=loaded.record.reference
        )
    copy_into(model, dict(model.state_dict()), loaded.tensors, strict=strict, what=loaded.record.reference)
    return model


def _read(context: Context, reference: str, component: str | None) -> _Loaded:
    with context.reading() as connection:
        key = resolve(connection, parse_reference(reference))
        record = records(connection, [key.id])[0]
        contents = read_contents(connection, key.id)
    roles = [component] if component is not None else [r for r in MAIN_COMPONENTS if r in contents.components]
    if not roles or roles[0] not in contents.components:
        known = ", ".join(sorted(contents.components))
        raise NotFound(f"{record.reference} has no component {roles[0] if roles else 'model'}; it has {known}")
    with BlobReader(context.store.blobs) as reader:
        tensors = read_tensors(reader, contents.components[roles[0]])
        config = _config(context, reader, contents)
    return _Loaded(record, config, tensors, roles[0])


def _config(context: Context, reader: BlobReader, contents: Contents) -> AdapterConfig | None:
    for file in contents.files:
        if file.path == ADAPTER_CONFIG:
            data = b"".join(file_bytes(reader, context.store.blobs, file, None))
            return read_adapter_config(data, ADAPTER_CONFIG)
    return None


def read_tensors(reader: BlobReader, component: StoredComponent) -> dict[str, torch.Tensor]:
    """A component's tensors by name, mapped from their blobs and proven against their digests.

    Raises:
        DigestMismatch, BlobNotFound, Corrupt
    """
    from safetensors import safe_open

    from registry.formats.live import tensor_bytes

    opened: dict[str, Any] = {}
    found: dict[str, torch.Tensor] = {}
    for spec, (digest, ordinal) in zip(component.layout, component.places, strict=True):
        if digest not in opened:
            opened[digest] = safe_open(str(reader.path(digest)), framework="pt", device="cpu")
        stored = reader.blob(digest).header.layout.tensors
        if ordinal >= len(stored):
            raise DigestMismatch(f"tensor {spec.name} in blob {digest}", expected=f"ordinal {ordinal}", actual="none")
        found[spec.name] = opened[digest].get_tensor(stored[ordinal].name)

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


def copy_into(
    module: nn.Module,
    targets: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    *,
    strict: bool,
    what: str,
    findings: tuple[Finding, ...] = (),
) -> None:
    """Copies tensors into a module's own, all or nothing, and proves that each took effect.

    Args:
        targets: aliases of the module's parameters and buffers, under the names of `tensors`.
        strict: refuse every difference; otherwise warn, and copy what fits.
        findings: what the caller found already.

    Raises:
        Incompatible: with all differences; the module is unchanged.
    """
    import torch

    found = [*findings, *differences(targets, tensors), *_unwritable(module, targets, tensors)]
    errors = [finding for finding in found if finding.severity == "error"]
    lenient = {"C05", "C06", "C08"}
    if errors and (strict or any(finding.code not in lenient for finding in errors)):
        raise Incompatible(f"{what} does not fit this {type(module).__name__}; nothing was changed", errors)
    for finding in errors:
        warnings.warn(str(finding), stacklevel=4)
    skipped = {finding.subject for finding in errors}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in skipped:
                targets[name].copy_(tensor)
        wrong = [n for n, t in tensors.items() if n not in skipped and not same_values(targets[n], t)]
    if wrong:
        raise Incompatible(
            f"{what} was copied, but {len(wrong)} tensors of the model do not hold its values, {wrong[0]} first; "
            "the model is in no defined state: build it again"
        )


def differences(targets: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> list[Finding]:
    """Every name, shape and kind of number in which a version and a model differ."""
    found = []
    for name in tensors:
        if name not in targets:
            found.append(Finding("C05", "error", name, "the model has no place for this tensor", "", "in the version"))
    for name, target in targets.items():
        tensor = tensors.get(name)
        if tensor is None:
            found.append(Finding("C06", "error", name, "the version lacks this tensor", str(tuple(target.shape))))
        elif tensor.shape != target.shape:
            expected, actual = str(tuple(target.shape)), str(tuple(tensor.shape))
            found.append(Finding("C08", "error", name, "the shapes differ", expected, actual))
        elif tensor.is_floating_point() and not (target.is_floating_point() or target.is_complex()):
            found.append(
                Finding("C21", "error", name, "floating point would be cut", str(target.dtype), str(tensor.dtype))
            )
    return found


def _unwritable(
    module: nn.Module, targets: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> list[Finding]:
    """Tensors that a copy would not reach, and tied ones that cannot hold two values."""
    own = {_place(tensor) for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta}
    found = []
    holders: dict[Any, str] = {}
    for name, tensor in tensors.items():
        target = targets.get(name)
        if target is None or target.shape != tensor.shape or not target.numel():
            continue
        if target.is_meta:
            found.append(
                Finding("C21", "error", name, "the model has no memory for it", "a device", "meta", "to_empty() first")
            )
        elif _place(target) not in own:
            found.append(Finding("C21", "error", name, "the model computes it, so it cannot be set"))
        else:
            key = (_place(target), target.storage_offset(), target.shape, target.stride())
            other = holders.setdefault(key, name)
            if other != name and not same_values(tensors[other], tensor):
                found.append(Finding("C16", "error", name, "the model ties it to another", f"equal to {other}", "not"))
    return found


def _place(tensor: torch.Tensor) -> Any:
    return (tensor.device, tensor.untyped_storage().data_ptr())


def same_values(here: torch.Tensor, there: torch.Tensor) -> bool:
    """Whether `here` holds `there`, cast to its dtype, bit for bit."""
    from registry.formats.live import tensor_bytes

    cast = there.to(here.dtype)
    return tensor_bytes(here) == tensor_bytes(cast)


def refuse_without_config(config: AdapterConfig | None, what: str) -> AdapterConfig:
    """
    Raises:
        InvalidInput
    """
    if config is None:
        raise InvalidInput(
            f"{what} has no configuration, so an adapter cannot be made for a plain model: "
            "wrap the model with get_peft_model first, with the r and lora_alpha that it was trained with"
        )
    return config
