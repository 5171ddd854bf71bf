"""Readers of what lies on disk: a PEFT folder, a safetensors file. Neither torch nor peft is imported."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from registry.core.adapter_config import AdapterConfig, read_adapter_config
from registry.core.errors import InvalidConfig, InvalidInput, MalformedTensors
from registry.core.manifest import check_file_path
from registry.core.reference import shown
from registry.formats.kinds import kind_of
from registry.formats.payloads import read_pickled_file, state_dict_file
from registry.formats.pickles import is_pickle
from registry.formats.source import (
    PlainFileInMemory,
    Source,
    TensorFile,
    TensorFileOnDisk,
    open_regular,
    read_small,
    source_errors,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
CONFIG_IN_HEADER = "adapter_config"
"""Where a safetensors file that a pull made keeps the adapter's configuration, in its `__metadata__`."""


def read_path(path: Path) -> Source:
    """Opens a PEFT folder or a safetensors file.

    Raises:
        SourceNotFound, InvalidInput, InvalidConfig, MalformedTensors, StorageError (it cannot be read)
    """
    if "\0" in str(path):
        raise InvalidInput(f"{shown(str(path), 200)}: a path has no NUL in it")
    with source_errors(path):
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    if is_folder:
        return read_peft_folder(path)
    with open_regular(path) as file, source_errors(path):
        head = file.read(512)
    if path.suffix != ".safetensors" and is_pickle(head):
        return read_pickled_file(path)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return read_safetensors_file(path)
    raise InvalidInput(
        f"{shown(str(path), 200)}: expected a PEFT or model folder, a .safetensors file, or one of torch.save "
        f"(.pth, .pt, .ckpt, .bin), found something else"
    )


def read_peft_folder(folder: Path) -> Source:
    """Opens a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        InvalidInput: the folder is not of this form; InvalidConfig: no config, or one that cannot be read.
    """
    with source_errors(folder):
        names = sorted(os.listdir(folder))
    tensors_name = next((name for name in (ADAPTER_TENSORS, ADAPTER_PICKLE) if name in names), None)
    if tensors_name is None:
        raise InvalidInput(f"{shown(str(folder), 200)} is no PEFT folder: {_why_no_adapter(names)}")
    if ADAPTER_CONFIG not in names:
        raise InvalidConfig(
            f"{shown(str(folder), 200)} has {tensors_name} but no {ADAPTER_CONFIG}: without it nobody knows "
            f"lora_alpha; save it again with save_pretrained, or push the file alone"
        )
    config_bytes = read_small(folder / ADAPTER_CONFIG)
    config = read_adapter_config(config_bytes, shown(str(folder / ADAPTER_CONFIG), 200))
    with ExitStack() as stack:
        path = folder / tensors_name
        file = stack.enter_context(open_regular(path))
        tensors: TensorFile
        about: tuple[str, ...] = ()
        if tensors_name == ADAPTER_TENSORS:
            tensors = _tensor_file(path, tensors_name, "adapter", file)
        else:
            tensors, about = state_dict_file(path, tensors_name, "adapter", file)
        left_out = [shown(name) for name in names if name not in (ADAPTER_CONFIG, tensors_name)]
        unkept = (f"left out (other files are not kept yet): {', '.join(left_out)}",) if left_out else ()
        return Source(
            form="PEFT folder",
            kind="adapter",
            tensor_files=(tensors,),
            plain_files=(PlainFileInMemory(ADAPTER_CONFIG, config_bytes),),
            config=config,
            peft_version=config.peft_version,
            notes=(*about, *unkept),
            resources=stack.pop_all(),
        )


def _why_no_adapter(names: list[str]) -> str:
    if any(name.endswith(".safetensors") for name in names):
        return f"it has no {ADAPTER_TENSORS}; push one of its .safetensors files by its own path"
    return f"it has no {ADAPTER_TENSORS}"


def read_safetensors_file(path: Path) -> Source:
    """Opens a safetensors file by itself.

    Raises:
        InvalidInput, MalformedTensors
    """
    name = check_file_path(path.name)
    with ExitStack() as stack:
        file = stack.enter_context(open_regular(path))
        tensors = _tensor_file(path, name, "", file)
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
        return Source(
            form="safetensors file",
            kind=kind,
            tensor_files=(tensors,),
            config=config,
            peft_version=None if config is None else config.peft_version,
            notes=notes,
            resources=stack.pop_all(),
        )


def _header_config(tensors: TensorFileOnDisk, what: str) -> AdapterConfig | None:
    """The configuration that a pull wrote into the header.

    Raises:
        InvalidConfig
    """
    text = tensors.header.metadata.get(CONFIG_IN_HEADER)
    return None if text is None else read_adapter_config(text.encode("utf-8"), f"{what}, {CONFIG_IN_HEADER}")


def _tensor_file(path: Path, name: str, role: str, file: BinaryIO) -> TensorFileOnDisk:
    with source_errors(path):
        tensors = TensorFileOnDisk(name, role, file, what=shown(str(path), 200))
    if not tensors.layout.tensors:
        raise MalformedTensors(f"{shown(str(path), 200)} holds no tensors; there is nothing to keep")
    return tensors
