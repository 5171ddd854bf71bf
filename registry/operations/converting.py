"""Versions in other forms than they were pushed in: a PEFT folder, one safetensors file with its configuration in
the header, and the `.pth` of pdp; the latter two say how the network was built. Tensors are the stored ones, proven by
their digests on the way out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Literal

from registry.catalog.contents import Contents, StoredComponent, StoredFile
from registry.catalog.versions import VersionRecord
from registry.core.adapter_config import AdapterConfig
from registry.core.adapter_names import targets_of
from registry.core.architecture import Architecture
from registry.core.digest import tensor_hasher
from registry.core.errors import DigestMismatch, InvalidInput
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec
from registry.core.safetensors_header import build_header
from registry.core.tensor_names import canonical_name, is_adapter_tensor, split_at_tuner
from registry.formats.guide_config import settings_from_config
from registry.formats.model_config import MODEL_CONFIG, header_text, model_config
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_TENSORS, CONFIG_IN_HEADER
from registry.operations.load import config_of, read_tensors
from registry.operations.reading import BlobReader, file_bytes
from registry.store.interface import BlobStore

PullFormat = Literal["native", "peft", "safetensors", "pth"]
FORMATS: tuple[PullFormat, ...] = ("native", "peft", "safetensors", "pth")
WITH_ARCHITECTURE: tuple[PullFormat, ...] = ("safetensors", "pth")
"""Those that say how the network was built."""
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Output:
    """One file that a pull is going to write.

    Attributes:
        path: relative, with `/`.
        write: writes it, and raises where the store's bytes are not what they must be.
    """

    path: str
    write: Callable[[BinaryIO], None]


@dataclass(frozen=True)
class Stored:
    """One version with all that reading it needs.

    Attributes:
        config: its adapter's configuration, if it has one.
        architecture: of its network, if it is known.
    """

    record: VersionRecord
    contents: Contents
    reader: BlobReader
    blobs: BlobStore
    config: AdapterConfig | None
    architecture: Architecture | None


def outputs(
    blobs: BlobStore,
    reader: BlobReader,
    record: VersionRecord,
    contents: Contents,
    format: PullFormat,
    architecture: Architecture | None = None,
) -> list[Output]:
    """The files of a version in a form.

    Args:
        architecture: of the network; said in the forms of `WITH_ARCHITECTURE`.

    Raises:
        InvalidInput: the version cannot have this form; says why and which it can have.
        DigestMismatch, BlobNotFound, Corrupt
    """
    config = None if format == "native" else config_of(blobs, reader, contents)
    stored = Stored(record, contents, reader, blobs, config, architecture)
    if format == "native":
        return [_as_it_is(stored, file) for file in contents.files]
    if format == "peft":
        return _peft_folder(stored)
    name = f"{record.artifact_name}.{format}"
    return [Output(name, partial(_write_safetensors if format == "safetensors" else _write_pth, stored))]


def _as_it_is(stored: Stored, file: StoredFile) -> Output:
    def write(out: BinaryIO) -> None:
        out.writelines(file_bytes(stored.reader, stored.blobs, file, stored.contents.components))

    return Output(file.path, write)


def _bytes(path: str, data: bytes) -> Output:
    def write(out: BinaryIO) -> None:
        out.write(data)

    return Output(path, write)


def _peft_folder(stored: Stored) -> list[Output]:
    """What `PeftModel.from_pretrained` takes. Files of the version that hold no tensors come along; the configuration
    gets the `peft_version` that a live push captured beside it."""
    if stored.config is None:
        raise InvalidInput(
            f"{stored.record.reference} has no {ADAPTER_CONFIG}, so it makes no PEFT folder; pull it as native"
        )
    tensors = _adapter_tensors(stored)
    files = {file.path: file for file in stored.contents.files}
    made = []
    for file in stored.contents.files:
        if file.path == ADAPTER_TENSORS or (file.whole and file.role is None and file.path != ADAPTER_CONFIG):
            made.append(_as_it_is(stored, file))
    if ADAPTER_TENSORS not in files:
        made.append(Output(ADAPTER_TENSORS, partial(_write_tensors, stored, tensors, {"format": "pt"})))
    document = dict(stored.config.document)
    version = stored.record.peft_version
    if ADAPTER_CONFIG in files and (version is None or document.get("peft_version") is not None):
        made.append(_as_it_is(stored, files[ADAPTER_CONFIG]))
    else:
        given = {} if version is None else {"peft_version": version}
        text = json.dumps({**document, **given}, indent=2, sort_keys=True)
        made.append(_bytes(ADAPTER_CONFIG, text.encode("utf-8")))
    return made


_Place = tuple[TensorSpec, str, tuple[str, int]]
"""A tensor under the name that it gets, its digest, and (blob, ordinal)."""


def _places(component: StoredComponent) -> Iterator[_Place]:
    yield from zip(component.layout, component.tensors, component.places, strict=True)


def _adapter_tensors(stored: Stored) -> list[_Place]:
    """The adapter's tensors under the names that PEFT saves."""
    components = stored.contents.components
    found = (
        list(_places(components["adapter"]))
        if "adapter" in components
        else [place for place in _places(components["model"]) if is_adapter_tensor(place[0].name)]
    )
    named: dict[str, _Place] = {}
    for spec, digest, where in found:
        name = PEFT_PREFIX + canonical_name(spec.name)
        if name in named and named[name][1] != digest:
            raise InvalidInput(
                f"{stored.record.reference} holds several adapters ({spec.name} is one of two {name}); load it instead"
            )
        named[name] = (TensorSpec(name, spec.dtype, spec.shape), digest, where)
    return list(named.values())


def _write_safetensors(stored: Stored, out: BinaryIO) -> None:
    """One file: an adapter as PEFT names it, else the model as it was saved."""
    config = stored.config
    metadata = {"format": "pt"}
    if config is not None:
        document = dict(config.document)
        if stored.record.peft_version is not None:
            document.setdefault("peft_version", stored.record.peft_version)
        metadata[CONFIG_IN_HEADER] = json.dumps(document, ensure_ascii=False)
    if stored.architecture is not None:
        metadata[MODEL_CONFIG] = header_text(stored.architecture)
    if stored.record.kind == "adapter":
        _write_tensors(stored, _adapter_tensors(stored), metadata, out)
    else:
        _write_tensors(stored, list(_places(_model(stored))), metadata, out)


def _model(stored: Stored) -> StoredComponent:
    if "model" not in stored.contents.components:
        known = ", ".join(sorted(stored.contents.components))
        raise InvalidInput(f"{stored.record.reference} has no component model, only {known}; pull it as native")
    return stored.contents.components["model"]


def _write_tensors(stored: Stored, tensors: list[_Place], metadata: Mapping[str, str], out: BinaryIO) -> None:
    # In the order of the safetensors library: by dtype, the widest first, then by name.
    rank = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}
    ordered = sorted(tensors, key=lambda place: (-rank[place[0].dtype], place[0].name))
    out.write(build_header(Layout(tuple(spec for spec, _, _ in ordered)), metadata))
    for spec, digest, (blob, ordinal) in ordered:
        hasher = tensor_hasher(spec.dtype, spec.shape)
        for chunk in stored.reader.tensor(blob, ordinal):
            hasher.update(chunk)
            out.write(chunk)
        if hasher.hexdigest() != digest:
            raise DigestMismatch(f"tensor {spec.name}", expected=digest, actual=hasher.hexdigest())


def _write_pth(stored: Stored, out: BinaryIO) -> None:
    """The `.pth` of pdp: the adapter with its settings, or the whole model; for `torch.load(weights_only=True)`."""
    import torch

    record, components = stored.record, stored.contents.components
    payload: dict[str, Any]
    if record.kind == "adapter":
        if stored.config is None:
            raise InvalidInput(
                f"{record.reference} has no configuration, so a .pth could not say its lora_alpha; pull it as "
                "safetensors"
            )
        targets, _ = targets_of(components["adapter"].layout, stored.config)
        settings = settings_from_config(stored.config, targets, record.reference)
        tensors = _owned(read_tensors(stored.reader, components["adapter"]))
        payload = {**settings, "lora_state_dict": {_live_name(name): tensor for name, tensor in tensors.items()}}
    else:
        component = _model(stored)
        payload = {"model_state_dict": _owned(read_tensors(stored.reader, component))}
        if stored.config is not None:
            targets, _ = targets_of(component.layout, stored.config)
            adapted = [target for target in targets if target.rank]
            payload["lora_config"] = settings_from_config(stored.config, adapted, record.reference)
        else:
            payload["model_type"] = record.kind
    if stored.architecture is not None:
        payload[MODEL_CONFIG] = model_config(stored.architecture)
    try:
        torch.save(payload, out)
    except RuntimeError as error:
        # torch still ends its zip when a write failed, and its complaint about that hides what happened.
        if isinstance(error.__context__, OSError | KeyboardInterrupt):
            raise error.__context__ from None
        raise


def _owned(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Copies out of the mapped blobs: torch.save would write the whole of what a tensor is a view of. Tensors that
    are one stay one."""
    copies: dict[tuple[int, Any, Any], Any] = {}
    owned = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape) if tensor.numel() else (id(tensor), None, None)
        if key not in copies:
            copies[key] = tensor.clone()
        owned[name] = copies[key]
    return owned


def _live_name(name: str) -> str:
    """The name in a model whose adapter is called `default`, as pdp saves it."""
    canonical = canonical_name(name)
    parts = split_at_tuner(canonical)
    if parts is None:
        return PEFT_PREFIX + canonical
    module, tuner, rest = parts
    return f"{PEFT_PREFIX}{module}.{tuner}.default.{rest}" if rest else f"{PEFT_PREFIX}{module}.{tuner}.default"
