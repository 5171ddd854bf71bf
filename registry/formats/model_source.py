"""A model folder, opened for a push: its shards as components, its other files as attachments, and beside it the map
from saved to live names where the library that loads it can be asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial

from registry.core.layout import TensorSpec
from registry.core.tensor_names import is_adapter_tensor
from registry.formats.attachments import ATTACHMENT_LIMIT, FolderListing, attachments
from registry.formats.live_names import (
    LiveNames,
    NoLiveNames,
    diffusers_live_names,
    live_names,
    live_names_document,
)
from registry.formats.model_folders import (
    ModelComponent,
    ModelFolder,
    check_shards,
    plan_model_folder,
    read_shard_index,
)
from registry.formats.source import Described, PlainFileInMemory, Source, TensorFile, read_small
from registry.formats.tensor_files import open_tensor_file

LIVE_NAMES = "live_names"
"""Role of the map among what is said of a version."""


def read_model_folder(listing: FolderListing, *, attachment_limit: int | None = ATTACHMENT_LIMIT) -> Source | None:
    """Opens a folder of transformers or diffusers.

    Args:
        attachment_limit: bytes of each file that is neither tensors nor a configuration; None: none of them is kept.

    Returns:
        None: it is no model folder.

    Raises:
        InvalidInput, MalformedTensors: a configuration, index or attachment that cannot be taken, or shards that are
            not as their index says; UnsafePickle, UnsupportedTensor, StorageError.
    """
    folder = listing.folder
    plan = plan_model_folder(frozenset(listing.paths), lambda path: read_small(folder / path))
    if plan is None:
        return None
    documents = {path: read_small(folder / path) for path in plan.documents}
    beside, notes = attachments(
        listing, (*plan.tensor_files, *documents), same_in_another_form=plan.left_out, limit=attachment_limit
    )
    with ExitStack() as stack:
        files, about_files = _open_files(listing, plan, stack)
        about_shards = _check_indices(plan, documents, files)
        tensors = {
            one.role: [spec for path in one.files for spec in _tensors_of(files[path], one.role)]
            for one in plan.components
        }
        kept = [*(PlainFileInMemory(path, data) for path, data in documents.items()), *beside]
        is_adapted = any(
            is_adapter_tensor(name) for file in files.values() for named in file.entries.values() for name, _ in named
        )
        return Source(
            form=plan.form,
            kind="checkpoint" if is_adapted else "base",
            tensor_files=tuple(files.values()),
            plain_files=tuple(sorted(kept, key=lambda file: file.path)),
            described_later={LIVE_NAMES: cache(partial(_live_names, plan, documents, tensors))},
            notes=(*notes, *about_files, *about_shards),
            is_unchanged=listing.is_unchanged,
            resources=stack.pop_all(),
        )


def _open_files(
    listing: FolderListing, plan: ModelFolder, resources: ExitStack
) -> tuple[dict[str, TensorFile], tuple[str, ...]]:
    files: dict[str, TensorFile] = {}
    notes: list[str] = []
    for component in plan.components:
        for path in component.files:
            files[path], about = open_tensor_file(listing.folder / path, path, component.role, resources)
            notes.extend(f"{path}: {note}" for note in about)
    return files, tuple(notes)


def _tensors_of(file: TensorFile, role: str) -> list[TensorSpec]:
    """Under the names that they have there; a pickle may have one tensor under two."""
    specs = file.layout.tensors
    return [TensorSpec(name, specs[ordinal].dtype, specs[ordinal].shape) for name, ordinal in file.entries[role]]


def _check_indices(
    plan: ModelFolder, documents: Mapping[str, bytes], files: Mapping[str, TensorFile]
) -> tuple[str, ...]:
    notes: list[str] = []
    for component in plan.components:
        if component.index is not None:
            index = read_shard_index(component.index, documents[component.index])
            names = {
                path.rpartition("/")[2]: [spec.name for spec in _tensors_of(files[path], component.role)]
                for path in component.files
            }
            nbytes = sum(files[path].layout.nbytes for path in component.files)
            notes.extend(check_shards(index, names, nbytes=nbytes))
    return tuple(notes)


def _live_names(
    plan: ModelFolder, documents: Mapping[str, bytes], tensors: Mapping[str, Sequence[TensorSpec]]
) -> Described:
    """The maps that there are, and notes on those that there are not."""
    maps: dict[str, LiveNames] = {}
    notes: list[str] = []
    for component in plan.components:
        found = _names_of(component, documents[component.config], tensors[component.role])
        if isinstance(found, LiveNames):
            maps[component.role] = found
            notes.extend(f"{component.role}: {note}" for note in found.notes)
        else:
            notes.append(f"no map to the live names of the {component.role}: {found.why}")
    return Described(live_names_document(maps) if maps else None, tuple(notes))


def _names_of(component: ModelComponent, config: bytes, tensors: Sequence[TensorSpec]) -> LiveNames | NoLiveNames:
    if component.library == "diffusers":
        return diffusers_live_names(component.model_class or "", tensors, is_sharded=component.index is not None)
    if component.library is None:
        return NoLiveNames(f"{component.config} names no model_type")
    tree = json.loads(config)
    found = live_names(tree, tensors)
    if isinstance(found, NoLiveNames) and "auto_map" in tree:
        return NoLiveNames(f"{found.why}; code beside the weights (auto_map) is never run")
    return found
