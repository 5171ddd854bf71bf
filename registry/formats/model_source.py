"""A model folder, opened for a push: its shards as components, its other files as attachments, and beside it the map
from saved to live names, and the model's modules, where the library that loads it can be asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial

from registry.core.errors import InvalidInput
from registry.core.layout import TensorSpec
from registry.core.model_form import LIVE_NAMES
from registry.core.model_form import ROLE as MODULES
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

Answers = Mapping[str, LiveNames | NoLiveNames]
"""By component."""


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
        later = _described_later(plan, cache(partial(_ask, plan, documents, tensors)))
        return Source(
            form=plan.form,
            kind="checkpoint" if is_adapted else "base",
            tensor_files=tuple(files.values()),
            plain_files=tuple(sorted(kept, key=lambda file: file.path)),
            described_later=later,
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


def _described_later(plan: ModelFolder, ask: Callable[[], Answers]) -> dict[str, Callable[[], Described]]:
    """What the libraries can tell of the folder, by role; they are asked once, when the first role is wanted."""
    found: dict[str, Callable[[], Described]] = {LIVE_NAMES: lambda: _live_names(ask())}
    # A form is of one model, the one that an adapter is trained on.
    if [one.role for one in plan.components] == ["model"] and plan.components[0].library == "transformers":
        found[MODULES] = lambda: _modules(ask()["model"])
    return found


def _ask(plan: ModelFolder, documents: Mapping[str, bytes], tensors: Mapping[str, Sequence[TensorSpec]]) -> Answers:
    return {
        component.role: _names_of(component, documents[component.config], tensors[component.role])
        for component in plan.components
    }


def _live_names(answers: Answers) -> Described:
    """The maps that there are, and notes on those that there are not."""
    maps: dict[str, LiveNames] = {}
    notes: list[str] = []
    for role, found in answers.items():
        if isinstance(found, LiveNames):
            maps[role] = found
            notes.extend(f"{role}: {note}" for note in found.notes)
        else:
            notes.append(f"no map to the live names of the {role}: {found.why}")
    return Described(live_names_document(maps) if maps else None, tuple(notes))


def _modules(answer: LiveNames | NoLiveNames) -> Described:
    """The form of the model. Where there is no map either, the note on that says why."""
    if isinstance(answer, NoLiveNames) or answer.form is None:
        why = answer.no_form if isinstance(answer, LiveNames) else None
        return Described(None, () if why is None else (f"no list of the model's modules: {why}",))
    try:
        return Described(answer.form.document)
    except InvalidInput as error:
        return Described(None, (f"no list of the model's modules: {error}",))


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
