"""Checkpoints of torch.save: which parts of what was saved are state dicts, and of what. pdp's forms, those of
Lightning and of torch's own tutorials, and plain state dicts become components; what stands beside them becomes the
component `training`, and the plain values that people ask for become metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from registry.core.adapter_config import AdapterConfig
from registry.core.annotations import read_metadata
from registry.core.errors import InvalidInput, MalformedTensors
from registry.core.manifest import check_file_path
from registry.core.reference import shown
from registry.core.state_document import Inert
from registry.core.tensor_names import is_adapter_tensor
from registry.formats.guide_config import config_from_settings, has_settings
from registry.formats.kinds import kind_of
from registry.formats.model_config import MODEL_CONFIG, described_by, names_a_class
from registry.formats.pickled import Components, PickledFile, opaque_note
from registry.formats.pickles import Opaque, PickleFile, TensorRef, read_pickle_bytes, read_pickle_file
from registry.formats.source import OpenFile, Source, TensorFile, open_regular, source_errors

ROLES = {
    **dict.fromkeys(("model", "model_state_dict", "state_dict", "model_state", "module", "net", "network"), "model"),
    **dict.fromkeys(("ema", "ema_model", "ema_state_dict", "ema_model_state_dict", "model_ema"), "ema"),
    **dict.fromkeys(("optimizer", "optimizer_state_dict", "optimizer_state", "optimizer_states", "optim"), "optimizer"),
    **dict.fromkeys(("scheduler", "scheduler_state_dict", "lr_scheduler", "lr_schedulers"), "scheduler"),
}
"""What the state dicts of a checkpoint are called, and the components that they become."""
TRAINING = "training"
NOT_MODELS = ("ema", "optimizer", "scheduler", TRAINING)
ASKED_FOR = ("epoch", "global_step", "step", "iteration", "model_type", "task_type")
"""Plain values that become metadata of the version, wherever the checkpoint keeps them."""

_SAVE_A_DICT = "save the model's state_dict()"
_NOT_IN_A_ROLE = re.compile(r"[^a-z0-9_.-]+")


@dataclass
class Payload:
    """A checkpoint taken apart.

    Attributes:
        tree: the whole of it, with pickles that stood in it as bytes read in their places.
        state_dicts: by component, with the key under which each was found.
        settings: of a LoRA, as pdp saves them.
        training: what is no state dict.
        notes: what was left out because it is there twice.
    """

    tree: object
    state_dicts: dict[str, tuple[str, object]] = field(default_factory=dict)
    settings: Mapping[object, object] | None = None
    training: dict[object, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_pickled_file(path: Path) -> Source:
    """Opens a `.pth`, `.pt`, `.ckpt` or `.bin`.

    Raises:
        UnsafePickle: it would call something; InvalidInput, MalformedTensors, UnsupportedTensor, StorageError
    """
    name, what = check_file_path(path.name), shown(str(path), 200)
    with ExitStack() as stack:
        file = stack.enter_context(open_regular(path))
        with source_errors(path):
            found = read_pickle_file(file, size=OpenFile(file, what).size, what=what)
        return source_of(found, what, lambda components: PickledFile(name, file, components, what=what), stack)


def source_of(
    found: PickleFile, what: str, tensor_file: Callable[[Components], TensorFile], resources: ExitStack
) -> Source:
    """What was read from one file as something to push.

    Args:
        what: names the file in errors.
        tensor_file: the file with these components in it.
        resources: what the source closes; taken over.

    Raises:
        InvalidInput, MalformedTensors: nobody can tell what is the model, or there is none.
    """
    payload = take_apart(found, what)
    components = Components(what)
    notes = [*opaque_note(found), *payload.notes]
    _collect(payload, components, what)
    described, about = described_by(payload.training)
    notes += about
    config = _config(payload, components, what)
    kind = _kind(payload, components, config)
    if kind == "adapter" and config is None:
        notes.append("pushed without a configuration, so lora_alpha is unknown")
    return Source(
        form=f"{found.form} file",
        kind=kind,
        tensor_files=(tensor_file(components),),
        config=config,
        data=components.data,
        metadata=dict(_asked_for(payload.training)),
        described=described,
        notes=tuple(notes),
        resources=resources.pop_all(),
    )


def state_dict_file(path: Path, name: str, role: str, file: BinaryIO) -> tuple[PickledFile, tuple[str, ...]]:
    """A file that is one state dict and nothing else, as a part of a component.

    Raises:
        InvalidInput: it is none; and what `read_pickled_file` raises.
    """
    what = shown(str(path), 200)
    with source_errors(path):
        found = read_pickle_file(file, size=OpenFile(file, what).size, what=what)
    if not _is_state_dict(found.tree):
        raise InvalidInput(
            f"{what}: expected a state dict, names with tensors, found {_described(found.tree)}; {_SAVE_A_DICT}"
        )
    components = Components(what)
    components.add(role, found.tree)
    return PickledFile(name, file, components, what=what), opaque_note(found)


def take_apart(found: PickleFile, what: str) -> Payload:
    """Finds the state dicts of a checkpoint and what they are.

    A single state dict that is neither `model` nor `adapter` is the model. What stands there twice, tensor for tensor,
    is kept once.

    Args:
        what: names the file in errors.

    Raises:
        InvalidInput: no dict, two state dicts of one kind, or a name that no component may have; and what reading the
            pickles within it raises.
    """
    tree = found.tree
    payload = Payload(tree)
    if _is_state_dict(tree):
        payload.state_dicts["model"] = ("the file", tree)
        _keep_once(payload)
        return payload
    if not isinstance(tree, dict):
        raise InvalidInput(f"{what}: expected a state dict or a checkpoint, found {_described(tree)}; {_SAVE_A_DICT}")
    if isinstance(tree.get("state"), dict) and isinstance(tree.get("param_groups"), list):
        payload.state_dicts["optimizer"] = ("the file", tree)
        return payload
    rest = dict(tree)
    if isinstance(rest.get("lora_state_dict"), dict) and has_settings(rest):
        _add(payload, "adapter", "lora_state_dict", rest.pop("lora_state_dict"), what)
        payload.settings = {key: rest.pop(key) for key in [*rest] if str(key).startswith("lora_") or key in _TARGETS}
    saved = rest.get("pickles")
    if isinstance(saved, dict):
        # The workspace keeps each as the bytes of a pickle of its own.
        rest.pop("pickles")
        read = {
            key: _read_inner(value, f"{what}, {shown(str(key))}", found) if isinstance(value, bytes) else value
            for key, value in saved.items()
        }
        payload.tree = {**tree, "pickles": read}
        for key, value in read.items():
            rest.setdefault(key, value)
    state_dicts = rest.get("state_dicts")
    if isinstance(state_dicts, dict):
        rest.pop("state_dicts")
        for key, value in state_dicts.items():
            _add(payload, _role(key, what), str(key), value, what)
    if has_settings(rest.get("lora_config")):
        payload.settings = rest.pop("lora_config")
    for key, value in rest.items():
        if key == MODEL_CONFIG and names_a_class(value):
            payload.training[key] = value  # no state dict, whatever stands in it
        elif isinstance(value, dict | list | tuple) and (_has_tensor(value) or (key in ROLES and value)):
            _add(payload, _role(key, what), str(key), value, what)
        else:
            payload.training[key] = value
    _keep_once(payload)
    return payload


_TARGETS = ("target_modules", "apply_to")


def _read_inner(data: bytes, what: str, found: PickleFile) -> object:
    return read_pickle_bytes(data, what=what, budget=found.budget).tree


def _role(key: object, what: str) -> str:
    if isinstance(key, str) and key in ROLES:
        return ROLES[key]
    role = _NOT_IN_A_ROLE.sub("_", str(key).lower()).strip("_")[:64]
    if not role or not role[0].isalpha():
        raise InvalidInput(f"{what}: the state dict {shown(repr(key))} has no usable name; save it under another key")
    return role


def _add(payload: Payload, role: str, key: str, tree: object, what: str) -> None:
    if role == TRAINING and key not in payload.training:
        payload.training[key] = tree  # the component of that name is ours
        return
    if role == TRAINING:
        raise InvalidInput(f"{what} has {shown(key)} twice; save one of them under another key")
    if role in payload.state_dicts:
        both = f"{shown(payload.state_dicts[role][0])} and {shown(key)}"
        raise InvalidInput(f"{what} holds two state dicts that could be its {role}, {both}; save one of them alone")
    payload.state_dicts[role] = (key, tree)


def _keep_once(payload: Payload) -> None:
    """Decides what the model is, and takes out what is the same again."""
    found = payload.state_dicts
    others = [role for role, (_, tree) in found.items() if role not in NOT_MODELS and _has_tensor(tree)]
    if "adapter" not in found and "model" not in found and len(others) == 1:
        found["model"] = found.pop(others[0])
    if "model" not in found:
        return
    key, model = found["model"]
    model, payload.notes = _once(model)
    found["model"] = (key, model)
    for role in [role for role in found if role not in ("model", *NOT_MODELS)]:
        if _same_tensors(found[role][1], model):
            del found[role]
            payload.notes.append(f"{shown(role)} is the model again, tensor for tensor, and is kept once")


def _once(model: object) -> tuple[object, list[str]]:
    """A model's state dict without the second name of each tensor: pdp's later form registers the base both in
    `base_model` and within `lora_model`."""
    if not isinstance(model, dict) or not _is_state_dict(model):
        return model, []
    prefix = "lora_model."
    inner = {str(key): value for key, value in model.items() if str(key).startswith(prefix)}
    seen = {_place(value) for value in inner.values()}
    others = [key for key, value in model.items() if str(key) not in inner]
    if not inner or not others or not all(_place(model[key]) in seen for key in others):
        return model, []
    note = f"{len(others)} tensors stand under two names ({shown(str(others[0]))}, ...) and are kept once"
    return {key.removeprefix(prefix): value for key, value in inner.items()}, [note]


def _same_tensors(tree: object, model: object) -> bool:
    """Whether both are flat, and the same tensors in the same order under the same names."""
    if not isinstance(tree, dict) or not isinstance(model, dict) or len(tree) != len(model) or not tree:
        return False
    return all(
        one == other and isinstance(tensor, TensorRef) and _place(tensor) == _place(its)
        for (one, tensor), (other, its) in zip(tree.items(), model.items(), strict=True)
    )


def _collect(payload: Payload, components: Components, what: str) -> None:
    """Puts the state dicts into components.

    Raises:
        InvalidInput, MalformedTensors: there is no model.
    """
    found = {role: tree for role, (_, tree) in payload.state_dicts.items()}
    if "adapter" not in found and "model" not in found:
        others = [role for role in found if role not in NOT_MODELS and _has_tensor(found[role])]
        if others:
            named = ", ".join(shown(payload.state_dicts[role][0]) for role in others)
            raise InvalidInput(
                f"{what} holds {len(others)} state dicts and none that is called model: {named}; save the model's "
                "under 'model', or each in its own file"
            )
        elif _has_tensor(payload.training, into_opaque=True):
            raise InvalidInput(
                f"{what}: expected a state dict or a checkpoint, found tensors that stand in no dict of named "
                f"tensors, in {_described(payload.training)}; {_SAVE_A_DICT}"
            )
        elif not any(map(_has_tensor, found.values())):
            raise MalformedTensors(f"{what} holds no tensors; there is nothing to keep")
        else:
            raise InvalidInput(f"{what} holds no model, only {', '.join(sorted(found))}; push the model's checkpoint")
    for role, tree in found.items():
        components.add(role, tree)
    if not components.tensors:
        raise MalformedTensors(f"{what} holds no tensors; there is nothing to keep")
    if payload.training:
        components.add(TRAINING, payload.training)


def _place(value: object) -> object:
    if not isinstance(value, TensorRef):
        return id(value)
    return id(value.storage), value.offset, value.shape, value.stride, value.dtype


def _config(payload: Payload, components: Components, what: str) -> AdapterConfig | None:
    role = "adapter" if "adapter" in components.entries else "model"
    names = [name for name, _ in components.entries[role] if is_adapter_tensor(name)]
    if payload.settings is None or not names:
        return None
    return config_from_settings(payload.settings, names, what)


def _kind(payload: Payload, components: Components, config: AdapterConfig | None) -> str:
    roles = set(components.entries) - {TRAINING}
    if roles == {"adapter"}:
        return "adapter"
    if roles != {"model"} or config is not None:
        return "checkpoint"
    kind = kind_of(components.layout_of("model"))
    # Epochs and settings beside a model make it a checkpoint of a run; what it is, and how it was built, do not.
    trained = set(payload.training) - {"model_type", MODEL_CONFIG}
    return "checkpoint" if kind == "base" and trained else kind


def _asked_for(training: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    given = training.get("metadata")
    for source in (training, given if isinstance(given, dict) else {}):
        for key, value in source.items():
            if not isinstance(key, str) or type(value) not in (int, float, str, bool):
                continue
            if source is given or key in ASKED_FOR:
                try:
                    read_metadata({key: value})
                except InvalidInput:
                    continue  # no key or value for metadata: it stands in the component `training`
                yield key, value


def _is_state_dict(tree: object) -> bool:
    """Names with tensors, and at most plain values between them."""
    return (
        isinstance(tree, dict)
        and any(isinstance(value, TensorRef) for value in tree.values())
        and not any(key in ROLES and isinstance(value, dict | list) for key, value in tree.items())
        and all(isinstance(key, str) for key in tree)
        and not any(isinstance(value, dict | list) and _has_tensor(value) for value in tree.values())
    )


def _has_tensor(tree: object, *, into_opaque: bool = False) -> bool:
    open_values, seen = [tree], set()
    while open_values:
        value = open_values.pop()
        if isinstance(value, TensorRef):
            return True
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            open_values += value.values() if isinstance(value, dict) else value
        elif into_opaque and isinstance(value, Opaque | Inert) and id(value) not in seen:
            seen.add(id(value))
            open_values += [value.arguments, value.state]
            open_values += [value.keywords, value.items] if isinstance(value, Opaque) else []
    return False


def _described(tree: object) -> str:
    if isinstance(tree, TensorRef):
        return "a single tensor"
    if isinstance(tree, dict):
        keys = ", ".join(shown(str(key)) for key in list(tree)[:5])
        return f"a dict of {keys}" if keys else "an empty dict"
    if isinstance(tree, Opaque | Inert):
        return f"an object of {shown(tree.type_name if isinstance(tree, Opaque) else tree.name)}"
    return f"a {type(tree).__name__}"
