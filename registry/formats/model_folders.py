"""Folders that transformers and diffusers save models in: which files carry tensors, and of which component. A plan is
made from the names in a folder and a few small JSON files; tensors are not looked at here, but an index of shards
is held against what its shards turn out to have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from registry.core.canonical_json import parse_json
from registry.core.errors import InvalidInput, InvalidManifest, MalformedTensors
from registry.core.manifest import check_file_path, is_role
from registry.core.reference import shown

CONFIG = "config.json"
PIPELINE = "model_index.json"
INDEX = ".index.json"
TRANSFORMERS_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which `from_pretrained` looks for them."""
DIFFUSERS_WEIGHTS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)
"""The same for diffusers, which prefers an index."""

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_|pytorch_)?model(?:\.[^./]+)?(?:-\d+-of-\d+)?(?:\.[^./]+)?"
    r"\.(?:safetensors|bin)(?:\.index(?:\.[^./]+)?\.json)?"
)
"""Weights, shards, variants (`model.fp16.safetensors`) and indices by these libraries' names."""


@dataclass(frozen=True)
class ModelComponent:
    """One state dict of a model folder.

    Attributes:
        role: `model`, or in a pipeline the name of its folder.
        library: `transformers` or `diffusers`, by whose rules its files are named; None: a configuration of neither.
        model_class: as the configuration names it, if it does.
        config: its configuration file.
        index: the file that says which tensor is in which shard, if there are shards.
        files: the files with its tensors, sorted; all of them are safetensors files, or none.
    """

    role: str
    library: str | None
    model_class: str | None
    config: str
    index: str | None
    files: tuple[str, ...]


@dataclass(frozen=True)
class ModelFolder:
    """How a folder is read.

    Attributes:
        form: for messages: `transformers folder`, `diffusers model`, `diffusers pipeline`, `model folder`.
        components: sorted by role.
        left_out: other files with the weights of these components: pickles beside safetensors, and variants.
        parts: files that make it what it is, and belong to no component.
    """

    form: str
    components: tuple[ModelComponent, ...]
    left_out: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def tensor_files(self) -> tuple[str, ...]:
        """Sorted by path."""
        return tuple(sorted(path for component in self.components for path in component.files))

    @property
    def documents(self) -> tuple[str, ...]:
        """Configurations and indices, without which nothing is loaded. Sorted by path."""
        named = (path for component in self.components for path in (component.config, component.index) if path)
        return tuple(sorted((*named, *self.parts)))


@dataclass(frozen=True)
class ShardIndex:
    """A `*.index.json`: where each tensor is.

    Attributes:
        path: of the index itself.
        files: tensor -> plain name of the file in the index's folder.
        total_size: bytes of all tensors, as the index says.
    """

    path: str
    files: Mapping[str, str]
    total_size: int | None


def plan_model_folder(paths: Collection[str], read: Callable[[str], bytes]) -> ModelFolder | None:
    """What a folder is, by the files in it.

    Args:
        paths: all its files, relative, with `/`.
        read: gives the bytes of a small file.

    Returns:
        None: it is no model folder, as nothing says so or nothing in it carries tensors.

    Raises:
        InvalidInput: a configuration or an index that cannot be read, a shard or a component's folder that is
            missing, a component whose name is no role; and what `read` raises.
    """
    if PIPELINE in paths:
        return _pipeline(paths, read)
    if CONFIG not in paths:
        return None
    component, left_out = _component("", "model", paths, read)
    if component is None:
        _refuse_others("the folder", "", paths)
        return None
    form = {"transformers": "transformers folder", "diffusers": "diffusers model"}.get(component.library or "")
    return ModelFolder(form or "model folder", (component,), left_out)


def _pipeline(paths: Collection[str], read: Callable[[str], bytes]) -> ModelFolder:
    index = _object(PIPELINE, read)
    components: list[ModelComponent] = []
    left_out: list[str] = []
    for name, entry in sorted(index.items()):
        # [library, class]; what a pipeline does without is [null, null], and its settings are no lists.
        if name.startswith("_") or not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            continue
        if not is_role(name):
            raise InvalidInput(
                f"{PIPELINE}: the component {shown(name)!r} is no role: 1 to 64 of a-z, 0-9, '_', '.' and '-', a "
                f"letter first; rename it and its folder"
            )
        if not any(path.startswith(f"{name}/") for path in paths):
            raise InvalidInput(
                f"{PIPELINE} names the component {shown(name)!r}, but there is no folder of this name; download the "
                f"pipeline again, or set it to [null, null]"
            )
        component, others = _component(f"{name}/", name, paths, read)
        if component is not None:
            components.append(component)
            left_out.extend(others)
        else:
            _refuse_others(f"the component {name!r}", f"{name}/", paths)
    if not components:
        raise InvalidInput(f"{PIPELINE}: none of its components has a file with tensors; there is nothing to keep")
    return ModelFolder("diffusers pipeline", tuple(components), tuple(left_out), (PIPELINE,))


def _refuse_others(what: str, folder: str, paths: Collection[str]) -> None:
    if others := list(_weights_in(folder, paths)):
        raise InvalidInput(
            f"{what} has no weights or index that would be loaded by default, but {shown(', '.join(others), 200)}: "
            f"save it without a variant, download its index, or push such a file by its own path"
        )


def _component(
    folder: str, role: str, paths: Collection[str], read: Callable[[str], bytes]
) -> tuple[ModelComponent | None, tuple[str, ...]]:
    """The component whose files lie in a folder (`` or `unet/`), and its weights that are left out."""
    path = f"{folder}{CONFIG}"
    if path not in paths:
        return None, ()
    config = _object(path, read)
    names: tuple[str, ...]
    class_name, library = _text(config.get("_class_name")), None
    if class_name is not None:
        library, names = "diffusers", DIFFUSERS_WEIGHTS
    else:
        architectures = config.get("architectures")
        class_name = _text(architectures[0]) if isinstance(architectures, list) and architectures else None
        library = "transformers" if class_name or _text(config.get("model_type")) else None
        names = TRANSFORMERS_WEIGHTS
        if (explicit := config.get("transformers_weights")) is not None:
            names = (_explicit_weights(path, explicit),)
    found = next((f"{folder}{name}" for name in names if f"{folder}{name}" in paths), None)
    if found is None:
        return None, ()
    index = found if found.endswith(INDEX) else None
    files = (found,) if index is None else _shards(folder, read_shard_index(index, read(index)), paths)
    left_out = tuple(other for other in _weights_in(folder, paths) if other not in (*files, index))
    return ModelComponent(role, library, class_name, path, index, files), left_out


def _weights_in(folder: str, paths: Collection[str]) -> Iterator[str]:
    for path in sorted(paths):
        name = path.removeprefix(folder)
        if path.startswith(folder) and _WEIGHTS.fullmatch(name):
            yield path


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _explicit_weights(path: str, name: object) -> str:
    """What transformers loads where a configuration says so."""
    if not isinstance(name, str) or "/" in name or not name.endswith((".safetensors", f".safetensors{INDEX}")):
        raise InvalidInput(
            f"{path}: transformers_weights is {shown(str(name))!r}; expected a .safetensors file of this folder or its "
            f"index"
        )
    return name


def _shards(folder: str, index: ShardIndex, paths: Collection[str]) -> tuple[str, ...]:
    files = tuple(sorted({f"{folder}{name}" for name in index.files.values()}))
    for file in files:
        if file not in paths:
            tensor = next(name for name, shard in index.files.items() if f"{folder}{shard}" == file)
            raise InvalidInput(
                f"{index.path}: the file {shown(file, 120)!r} is missing, in which {shown(tensor, 120)!r} should be; "
                f"download or save the model again"
            )
    return files


def read_shard_index(path: str, data: bytes) -> ShardIndex:
    """Reads a `*.safetensors.index.json` or `*.bin.index.json`.

    Raises:
        InvalidInput: not of this form, or it names a file that is no plain name of its kind.
    """
    tree = _parsed(path, data, parse_json)
    files = tree.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InvalidInput(f"{path}: expected an object weight_map with the file of each tensor")
    suffix = ".safetensors" if path.endswith(f".safetensors{INDEX}") else ".bin"
    for tensor, name in files.items():
        if not isinstance(name, str) or not _is_plain_name(name) or not name.endswith(suffix):
            raise InvalidInput(
                f"{path}: {shown(tensor, 120)!r} is said to be in {shown(str(name), 120)!r}; expected the plain name "
                f"of a {suffix} file beside the index"
            )
    metadata = tree.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return ShardIndex(path, files, int(total) if isinstance(total, (int, float)) else None)


def _is_plain_name(name: str) -> bool:
    try:
        return "/" not in check_file_path(name)
    except InvalidManifest:
        return False


def check_shards(index: ShardIndex, shards: Mapping[str, Collection[str]], *, nbytes: int) -> tuple[str, ...]:
    """Holds an index against what its shards have.

    Args:
        shards: file, by the name that the index gives it -> names of its tensors.
        nbytes: bytes of all their tensors.

    Returns:
        notes for the user.

    Raises:
        MalformedTensors: a tensor that is not in the file that the index names, that it does not name, or that is in
            two files.
    """
    homes: dict[str, str] = {}
    for file, tensors in sorted(shards.items()):
        for tensor in tensors:
            what = f"{index.path}: the tensor {shown(tensor, 120)!r}"
            other = homes.setdefault(tensor, file)
            if other != file:
                raise MalformedTensors(f"{what} is in {shown(other, 120)!r} and in {shown(file, 120)!r}; save it again")
            listed = index.files.get(tensor)
            if listed is None:
                raise MalformedTensors(f"{what} of {shown(file, 120)!r} is not listed; save the model again")
            if listed != file:
                raise MalformedTensors(f"{what} is in {shown(file, 120)!r}, and listed in {shown(listed, 120)!r}")
    for tensor, file in index.files.items():
        if tensor not in homes:
            raise MalformedTensors(
                f"{index.path}: the tensor {shown(tensor, 120)!r} is listed in {shown(file, 120)!r}, which does not "
                f"have it; save the model again"
            )
    if index.total_size is None or index.total_size == nbytes:
        return ()
    return (f"{index.path} says {index.total_size} bytes of tensors; its shards have {nbytes}",)


def _object(path: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    """A configuration. Libraries write and read Infinity in it, so it is read as Python does."""
    return _parsed(path, read(path), json.loads)


def _parsed(path: str, data: bytes, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    try:
        tree = parse(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} cannot be read as JSON: {shown(str(error), 200)}") from error
    if not isinstance(tree, dict):
        raise InvalidInput(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree
