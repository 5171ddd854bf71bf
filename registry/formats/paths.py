"""Readers of what lies on disk: a PEFT folder, a model folder, a safetensors file, a file of torch.save. Neither
torch nor peft is imported."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from registry.core.adapter_config import AdapterConfig, read_adapter_config
from registry.core.errors import InvalidConfig, InvalidInput
from registry.core.manifest import check_file_path
from registry.core.reference import shown
from registry.formats.attachments import ATTACHMENT_LIMIT, FolderListing, attachments, list_folder
from registry.formats.kinds import kind_of
from registry.formats.model_config import described_by_header
from registry.formats.model_source import read_model_folder
from registry.formats.payloads import read_pickled_file, source_of
from registry.formats.pickled import Components
from registry.formats.pickles import is_pickle
from registry.formats.safetensors_tree import STATE, read_tree
from registry.formats.source import (
    PlainFileInMemory,
    Source,
    TensorFileOnDisk,
    open_regular,
    open_tensors,
    read_small,
    source_errors,
)
from registry.formats.tensor_files import open_tensor_file

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
CONFIG_IN_HEADER = "adapter_config"
"""Where a safetensors file that a pull made keeps the adapter's configuration, in its `__metadata__`."""


def read_path(
    path: Path,
    *,
    attachment_limit: int | None = ATTACHMENT_LIMIT,
    without: frozenset[str] = frozenset(),
) -> Source:
    """Opens a PEFT folder, a folder that transformers or diffusers saved a model in, a safetensors file, or one of
    torch.save.

    Args:
        attachment_limit: bytes of each of a folder's other files, which are kept as they are; None: none is kept.
        without: files and folders in a folder that are as if they were not there.

    Raises:
        SourceNotFound, InvalidInput, InvalidConfig, MalformedTensors, StorageError (it cannot be read)
    """
    if "\0" in str(path):
        raise InvalidInput(f"{shown(str(path), 200)}: a path has no NUL in it")
    with source_errors(path):
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    if is_folder:
        return read_folder(list_folder(path, without), attachment_limit=attachment_limit)
    with open_regular(path) as file, source_errors(path):
        head = file.read(512)
    if is_safetensors(path, head):
        return read_safetensors_file(path)
    if is_pickle(head):
        return read_pickled_file(path)
    if path.suffix in PICKLE_SUFFIXES:
        return read_pickled_file(path)  # which knows what else is found under these names
    raise InvalidInput(
        f"{shown(str(path), 200)}: expected a PEFT or model folder, a .safetensors file, or one of torch.save "
        f"(.pth, .pt, .ckpt, .bin), found something else"
    )


def is_safetensors(path: Path, head: bytes) -> bool:
    """Whether a file that begins with these bytes is read as safetensors: by its suffix, else by its content."""
    return path.suffix == ".safetensors" or (head[8:9] == b"{" and not is_pickle(head))


def read_folder(listing: FolderListing, *, attachment_limit: int | None = ATTACHMENT_LIMIT) -> Source:
    """Opens a PEFT folder or a model folder.

    Raises:
        InvalidInput: it is neither; and what the two raise.
    """
    source = None
    if ADAPTER_TENSORS not in listing.paths and ADAPTER_PICKLE not in listing.paths:
        source = read_model_folder(listing, attachment_limit=attachment_limit)
    return source or read_peft_folder(listing, attachment_limit=attachment_limit)


def read_peft_folder(listing: FolderListing, *, attachment_limit: int | None) -> Source:
    """Opens a folder with `adapter_config.json` and `adapter_model.safetensors` or `adapter_model.bin`.

    Raises:
        InvalidInput: the folder is not of this form, or an attachment is refused; InvalidConfig: no config, or one
            that cannot be read.
    """
    folder = listing.folder
    tensors_name = next((name for name in (ADAPTER_TENSORS, ADAPTER_PICKLE) if name in listing.paths), None)
    if tensors_name is None:
        raise InvalidInput(
            f"{shown(str(folder), 200)} is no PEFT folder and no model folder: {_why_no_adapter(listing.paths)}"
        )
    if ADAPTER_CONFIG not in listing.paths:
        raise InvalidConfig(
            f"{shown(str(folder), 200)} has {tensors_name} but no {ADAPTER_CONFIG}: without it nobody knows "
            f"lora_alpha; save it again with save_pretrained, or push the file alone"
        )
    config_bytes = read_small(folder / ADAPTER_CONFIG)
    config = read_adapter_config(config_bytes, shown(str(folder / ADAPTER_CONFIG), 200))
    others = [path for path in (ADAPTER_PICKLE,) if path in listing.paths and path != tensors_name]
    beside, notes = attachments(
        listing, (ADAPTER_CONFIG, tensors_name), same_in_another_form=others, limit=attachment_limit
    )
    with ExitStack() as stack:
        tensors, about = open_tensor_file(folder / tensors_name, tensors_name, "adapter", stack)
        return Source(
            form="PEFT folder",
            kind="adapter",
            tensor_files=(tensors,),
            plain_files=(PlainFileInMemory(ADAPTER_CONFIG, config_bytes), *beside),
            config=config,
            peft_version=config.peft_version,
            notes=(*about, *notes),
            is_unchanged=listing.is_unchanged,
            resources=stack.pop_all(),
        )


def _why_no_adapter(names: Collection[str]) -> str:
    if any(name.endswith(".safetensors") for name in names):
        return f"it has no {ADAPTER_TENSORS}; push one of its .safetensors files by its own path"
    return f"it has no {ADAPTER_TENSORS}"


def read_safetensors_file(path: Path) -> Source:
    """Opens a safetensors file by itself: tensors alone, or a checkpoint with a state document in its header.

    Raises:
        InvalidInput, MalformedTensors, UnsupportedTensor
    """
    name = check_file_path(path.name)
    with ExitStack() as stack:
        tensors = open_tensors(path, name, "", stack)
        if STATE in tensors.header.metadata:
            return _read_checkpoint(tensors, shown(str(path), 200), stack)
        kind = kind_of(tensors.layout)
        tensors.rename_component("", "adapter" if kind == "adapter" else "model")
        notes: tuple[str, ...] = ()
        config = _header_config(tensors, shown(str(path), 200))
        if config is not None:
            kind = "adapter" if kind == "adapter" else "checkpoint"
        elif kind == "adapter":
            beside = path.with_name(ADAPTER_CONFIG).exists()
            notes = (
                f"pushed without its {ADAPTER_CONFIG}, so lora_alpha is unknown"
                + (f"; push the folder {shown(str(path.parent), 200)} to keep it" if beside else ""),
            )
        described, about = described_by_header(tensors.header.metadata)
        return Source(
            form="safetensors file",
            kind=kind,
            tensor_files=(tensors,),
            config=config,
            peft_version=None if config is None else config.peft_version,
            described=described,
            notes=(*notes, *about),
            resources=stack.pop_all(),
        )


def _read_checkpoint(tensors: TensorFileOnDisk, what: str, resources: ExitStack) -> Source:
    found, ordinals = read_tree(tensors.header, what)

    def with_components(components: Components) -> TensorFileOnDisk:
        if any(id(ref) not in ordinals for ref in components.tensors):
            raise InvalidInput(f"{what} holds tensors within bytes of its state document; save them as tensors")
        places = [ordinals[id(ref)] for ref in components.tensors]
        used = set(places)
        left = next((spec.name for at, spec in enumerate(tensors.layout) if at not in used), None)
        if left is not None:
            raise InvalidInput(f"{what}: the tensor {shown(left)} is in no state dict; save it in one, or leave it out")
        tensors.entries = {
            role: tuple((tensor_name, places[place]) for tensor_name, place in named)
            for role, named in components.entries.items()
        }
        return tensors

    return source_of(found, what, with_components, resources)


def _header_config(tensors: TensorFileOnDisk, what: str) -> AdapterConfig | None:
    """The configuration that a pull wrote into the header.

    Raises:
        InvalidConfig
    """
    text = tensors.header.metadata.get(CONFIG_IN_HEADER)
    return None if text is None else read_adapter_config(text.encode("utf-8"), f"{what}, {CONFIG_IN_HEADER}")
