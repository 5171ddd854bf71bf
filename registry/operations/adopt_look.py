"""One artifact of a tree, looked at and opened: its headers, configuration and trainer's state are read, one artifact
at a time, and nothing of it is kept open."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry.core.adapter_names import Target, targets_of
from registry.core.errors import InvalidInput, RegistryError
from registry.core.layout import Layout, TensorSpec
from registry.core.reference import shown
from registry.formats.attachments import ATTACHMENT_LIMIT, FolderListing, list_folder
from registry.formats.model_folders import CONFIG, INDEX, PIPELINE, is_weights_name
from registry.formats.paths import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_TENSORS, read_path
from registry.formats.pickles import is_pickle, read_pickle_file
from registry.formats.scan import SAFETENSORS, Artifact
from registry.formats.source import Source, TensorFile, open_regular, read_small
from registry.operations.base_fit import asked_targets

TRAINER_STATE = "trainer_state.json"
STATE_BYTES = 64 << 20


@dataclass(frozen=True)
class Attachments:
    """Which of a folder's other files are kept.

    Attributes:
        limit: bytes of one file. Here a larger one is left out, where a push alone would refuse the folder.
    """

    keep: bool = True
    limit: int = ATTACHMENT_LIMIT


@dataclass(frozen=True)
class Look:
    """What there is to know of an artifact before it is pushed.

    Attributes:
        recorded, revision: the base that its configuration names.
        targets: those that a base can be held against.
        layouts: of a base, by component; empty for others.
        step, epoch: of training, as it says of itself.
        can_be_external: all its tensors are in safetensors files.
    """

    kind: str
    recorded: str | None = None
    revision: str | None = None
    targets: tuple[Target, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    step: int | None = None
    epoch: float | None = None
    can_be_external: bool = False


class NoArtifact(Exception):
    """It can be read as a whole, and is nothing that a registry keeps."""


def open_artifact(artifact: Artifact, attachments: Attachments) -> Source:
    """Opens it for a push.

    Raises:
        RegistryError: what `read_path` raises.
    """
    if artifact.form == "file":
        return read_path(artifact.place)
    without, notes = artifact.without, []
    if attachments.keep:
        unwanted = _not_kept(artifact, list_folder(artifact.place, without), attachments.limit)
        without |= unwanted.keys()
        notes = [f"left out ({why}): {shown(path, 200)}" for path, why in sorted(unwanted.items())]
    limit = attachments.limit if attachments.keep else None
    source = read_path(artifact.place, attachment_limit=limit, without=without)
    source.notes = (*source.notes, *notes)
    return source


def _not_kept(artifact: Artifact, listing: FolderListing, limit: int) -> dict[str, str]:
    """Files that would make a push of the folder alone refuse it, and why."""
    found = {}
    for file in listing.files:
        name = file.path.rpartition("/")[2]
        if artifact.form == "peft":
            is_known = file.path in (ADAPTER_CONFIG, ADAPTER_TENSORS, ADAPTER_PICKLE)
        else:
            is_known = is_weights_name(name) or name in (CONFIG, PIPELINE) or name.endswith((SAFETENSORS, INDEX))
        if is_known:
            continue
        if file.refusal is not None:
            found[file.path] = file.refusal.partition(";")[0]
        elif file.size > limit:
            found[file.path] = f"{file.size} bytes, over the limit of {limit}"
    return found


def look_at(artifact: Artifact, attachments: Attachments) -> Look:
    """Reads its headers.

    Raises:
        NoArtifact
        RegistryError: it is broken.
    """
    if artifact.broken is not None:
        raise InvalidInput(f"{shown(artifact.path, 200)}: {artifact.broken}")
    try:
        with open_artifact(artifact, attachments) as source:
            return _look(source, artifact)
    except InvalidInput as error:
        if artifact.form == "file" and _is_whole_pickle(artifact.place):
            raise NoArtifact(str(error)) from error
        raise


def _is_whole_pickle(path: Path) -> bool:
    """Whether it can be read, so that what was refused is only what it holds."""
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            if not is_pickle(file.read(512)):
                return False
            read_pickle_file(file, size=size, what=shown(str(path), 200))
    except (RegistryError, OSError):
        return False
    return True


def _look(source: Source, artifact: Artifact) -> Look:
    step, epoch = _progress(source.metadata)
    if artifact.form != "file":
        state = trainer_state(artifact.place)
        step, epoch = _progress({"step": state.get("global_step"), "epoch": state.get("epoch")}, (step, epoch))
    config, layouts = source.config, _layouts(source.tensor_files)
    targets: tuple[Target, ...] = ()
    if source.kind == "adapter":
        adapted = layouts.get("adapter") or layouts.get("model") or Layout(())
        targets = asked_targets(targets_of(adapted, config)[0])
    return Look(
        kind=source.kind,
        recorded=(config.base_model or None) if config else None,
        revision=config.revision if config else None,
        targets=targets,
        layouts=layouts if source.kind == "base" else {},
        step=step,
        epoch=epoch,
        can_be_external=all(file.can_be_external for file in source.tensor_files),
    )


def _progress(
    said: Mapping[str, object], before: tuple[int | None, float | None] = (None, None)
) -> tuple[int | None, float | None]:
    step, epoch = said.get("global_step", said.get("step")), said.get("epoch")
    return (
        step if type(step) is int and 0 <= step < 2**53 else before[0],
        epoch if isinstance(epoch, int | float) and math.isfinite(epoch) else before[1],
    )


def _layouts(files: tuple[TensorFile, ...]) -> dict[str, Layout]:
    """Layouts by component, as a push puts them together."""
    specs: dict[str, dict[str, TensorSpec]] = {}
    for file in files:
        for role, entries in file.entries.items():
            known = specs.setdefault(role, {})
            for name, ordinal in entries:
                spec = file.layout.tensors[ordinal]
                known[name] = TensorSpec(name, spec.dtype, spec.shape)
    return {role: Layout(tuple(known.values())) for role, known in specs.items()}


def trainer_state(folder: Path) -> dict[str, Any]:
    """What transformers' Trainer wrote beside a checkpoint; empty where it did not, or it cannot be read."""
    path = folder / TRAINER_STATE
    try:
        tree = json.loads(read_small(path, STATE_BYTES)) if path.is_file() else {}
    except (RegistryError, OSError, ValueError, RecursionError):
        return {}  # it is kept as an attachment all the same
    return tree if isinstance(tree, dict) else {}


def history_of(artifact: Artifact) -> tuple[bytes, ...]:
    """Digests of the entries of a trainer's log, in order: where one log begins with all of another, both are of one
    run, and the shorter is the earlier."""
    if artifact.form == "file":
        return ()
    log = trainer_state(artifact.place).get("log_history")
    if not isinstance(log, list):
        return ()
    return tuple(hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).digest()[:16] for entry in log)
