"""Readers of what lies on disk: a PEFT folder, a safetensors file. Neither torch nor peft is imported."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from registry.core.adapter_config import AdapterConfig, read_adapter_config
from registry.core.adapter_names import is_adapter_tensor
from registry.core.errors import InvalidConfig, InvalidInput, MalformedTensors
from registry.core.layout import Layout
from registry.core.manifest import check_file_path
from registry.core.reference import shown
from registry.formats.source import PlainFileInMemory, Source, TensorFileOnDisk, open_regular, read_small, source_errors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
EMBEDDINGS = ("embed_tokens", "lm_head")
"""What PEFT saves beside an adapter without being asked (its `EMBEDDING_LAYER_NAMES`)."""


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
    if path.suffix != ".safetensors":
        raise InvalidInput(
            f"{shown(str(path), 200)}: expected a PEFT folder or a .safetensors file, "
            f"found {shown(path.suffix) or 'no suffix'}"
        )
    return read_safetensors_file(path)


def read_peft_folder(folder: Path) -> Source:
    """Opens a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        InvalidInput: the folder is not of this form; InvalidConfig: no config, or one that cannot be read.
    """
    with source_errors(folder):
        names = sorted(os.listdir(folder))
    if ADAPTER_TENSORS not in names:
        raise InvalidInput(f"{shown(str(folder), 200)} is no PEFT folder: {_why_no_adapter(names)}")
    if ADAPTER_CONFIG not in names:
        raise InvalidConfig(
            f"{shown(str(folder), 200)} has {ADAPTER_TENSORS} but no {ADAPTER_CONFIG}: without it nobody knows "
            f"lora_alpha; save it again with save_pretrained, or push the .safetensors file alone"
        )
    config_bytes = read_small(folder / ADAPTER_CONFIG)
    config = read_adapter_config(config_bytes, shown(str(folder / ADAPTER_CONFIG), 200))
    with ExitStack() as stack:
        file = stack.enter_context(open_regular(folder / ADAPTER_TENSORS))
        tensors = _tensor_file(folder / ADAPTER_TENSORS, ADAPTER_TENSORS, "adapter", file)
        left_out = [shown(name) for name in names if name not in (ADAPTER_CONFIG, ADAPTER_TENSORS)]
        notes = (f"left out (other files are not kept yet): {', '.join(left_out)}",) if left_out else ()
        return Source(
            form="PEFT folder",
            kind="adapter",
            tensor_files=(tensors,),
            plain_files=(PlainFileInMemory(ADAPTER_CONFIG, config_bytes),),
            config=config,
            peft_version=config.peft_version,
            notes=notes,
            resources=stack.pop_all(),
        )


def _why_no_adapter(names: list[str]) -> str:
    if ADAPTER_PICKLE in names:
        return f"its tensors are a pickle ({ADAPTER_PICKLE}); save it again with safe_serialization=True"
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
        kind = kind_of(tensors.layout, None)
        tensors.rename_component("", "adapter" if kind == "adapter" else "model")
        notes: tuple[str, ...] = ()
        if kind == "adapter":
            beside = path.with_name(ADAPTER_CONFIG).exists()
            notes = (
                f"pushed without its {ADAPTER_CONFIG}, so lora_alpha is unknown"
                + (f"; push the folder {shown(str(path.parent), 200)} to keep it" if beside else ""),
            )
        return Source(
            form="safetensors file", kind=kind, tensor_files=(tensors,), notes=notes, resources=stack.pop_all()
        )


def _tensor_file(path: Path, name: str, role: str, file: BinaryIO) -> TensorFileOnDisk:
    with source_errors(path):
        tensors = TensorFileOnDisk(name, role, file, what=shown(str(path), 200))
    if not tensors.layout.tensors:
        raise MalformedTensors(f"{shown(str(path), 200)} holds no tensors; there is nothing to keep")
    return tensors


def kind_of(layout: Layout, config: AdapterConfig | None) -> str:
    """Adapter where there are adapter tensors without a base, checkpoint where there are both, else base.

    Full copies of modules (`modules_to_save`) cannot be told from a base by their names alone: a config decides for
    an adapter, or the prefix that PEFT gives a file, where none of the weights that adapters wrap is there.
    """
    plain = [spec.name for spec in layout if not is_adapter_tensor(spec.name)]
    if config is not None or (len(layout) and not plain):
        return "adapter"
    if len(plain) == len(layout):
        return "base"
    prefixed = all(spec.name.startswith("base_model.model.") for spec in layout)
    return "adapter" if prefixed and not any(map(_is_wrapped_weight, plain)) else "checkpoint"


def _is_wrapped_weight(name: str) -> bool:
    """Whether it is the weight under an adapter. PEFT saves some of their tensors with the adapter: trained biases,
    and unasked whole embeddings."""
    path, wrapped, part = name.partition(".base_layer.")
    return bool(wrapped) and part != "bias" and path.rpartition(".")[2] not in EMBEDDINGS
