"""Builds a model from a class that the user names, on torch's meta device: its modules and sizes without a weight. The
only place where a name is imported, and that name is one that somebody typed; none that stands in data is."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.formats.live_names_worker import plain_config
from registry.formats.meta_build import Allocated, building_on_meta, refuse_allocated
from registry.formats.source import read_small

if TYPE_CHECKING:
    from torch import nn

_FORM = re.compile(r"(?!\d)\w+(?:\.(?!\d)\w+)*:(?!\d)\w+(?:\.(?!\d)\w+)*")
_NO_CONFIG_OF_OURS = ("model_type", "architectures", "transformers_version")
"""Members by which a whole config.json is told from a few fields that somebody typed."""
_LIVE = "build the model yourself and give the live one to Registry.check"


def build_on_meta(path: str, kwargs: Mapping[str, Any], *, notes: list[str] | None = None) -> nn.Module:
    """Builds a model without weights.

    Args:
        path: `module:Class`, as the user typed it; imported from `sys.path`, and last from the working folder.
        kwargs: arguments of the constructor. Of a transformers model fields of its configuration, or a whole
            config.json; of a diffusers model its configuration.
        notes: what the user should know is put here.

    Raises:
        InvalidInput: in one line, why there is no such model, or why it cannot be built so.
    """
    if not _FORM.fullmatch(path):
        raise InvalidInput(f"the model {shown(repr(path))} is not of the form module:Class, like my_package.net:Net")
    module_name, _, attribute = path.partition(":")
    with _working_folder():
        model_class = _class_of(module_name, attribute)
        with building_on_meta() as allocated:
            model = _build(path, model_class, kwargs, allocated)
    for note in refuse_allocated(path, model):
        if notes is not None:
            notes.append(note)
    return model


def read_kwargs(text: str) -> dict[str, Any]:
    """Arguments as the command line has them: a JSON object, or the path of a file with one.

    Raises:
        InvalidInput: neither; SourceNotFound, StorageError.
    """
    what = "the arguments"
    if not text.lstrip().startswith("{"):
        what = shown(text, 200)
        data = read_small(Path(text))
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{what}: expected JSON in UTF-8, found other bytes at {error.start}") from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f'{what}: expected a JSON object like {{"n_head": 4}}: {shown(str(error), 200)}') from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{what}: expected a JSON object, found a {type(found).__name__}")
    return found


@contextmanager
def _working_folder() -> Iterator[None]:
    """Modules of the working folder can be imported, after all others: none hides an installed one."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


# ---------------------------------------------------------------- the class


def _class_of(module_name: str, attribute: str) -> type[nn.Module]:
    from torch import nn

    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        raise InvalidInput(f"cannot import {shown(module_name)}: {_one_line(error)}") from error
    found: Any = module
    for place, name in enumerate(attribute.split(".")):
        try:
            found = getattr(found, name)
        except Exception as error:
            where = ".".join([module_name, *attribute.split(".")[:place]])
            raise InvalidInput(
                f"{shown(where)} ({_file_of(module)}) has no {shown(name)}{_near(name, _classes_in(found))}"
            ) from error
    if not isinstance(found, type):
        raise InvalidInput(f"{shown(module_name)}:{shown(attribute)} is a {type(found).__name__}; expected a class")
    if not issubclass(found, nn.Module):
        raise InvalidInput(
            f"{shown(module_name)}:{shown(attribute)} is no torch.nn.Module{_near(attribute, _classes_in(module))}"
        )
    return found


def _file_of(module: object) -> str:
    return shown(str(getattr(module, "__file__", None) or "built in"), 200)


def _classes_in(holder: object) -> list[str]:
    """Names of its modules' classes; of lazy packages, as transformers is, all names."""
    from torch import nn

    members = list(getattr(holder, "__dict__", {}).items())
    held = [name for name, one in members if isinstance(one, type) and issubclass(one, nn.Module)]
    return held or dir(holder)


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {' or '.join(map(shown, near))}?" if near else ""


# ---------------------------------------------------------------- the constructor


def _build(path: str, model_class: Any, kwargs: Mapping[str, Any], allocated: Allocated) -> nn.Module:
    from torch import nn

    make = _maker(path, model_class, kwargs)
    try:
        model = make()
    except (Exception, SystemExit) as error:
        if allocated.refusal is not None:  # which the constructor may have turned into another
            raise InvalidInput(f"{path} {allocated.refusal}; {_LIVE}") from error
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path} cannot be built without weights: {_one_line(error)}; {_mend(error)}") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{path} gave a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _mend(error: BaseException) -> str:
    text = str(error)
    if "meta" in text or isinstance(error, NotImplementedError):
        return f"its constructor needs values of weights, which a model on the meta device has not: {_LIVE}"
    if isinstance(error, OSError):
        return f"its constructor needs a file: give its arguments in full, or {_LIVE}"
    return f"correct the arguments, or {_LIVE}"


def _maker(path: str, model_class: Any, kwargs: Mapping[str, Any]) -> Any:
    """What builds the model when it is called, with arguments that fit."""
    config_class = getattr(model_class, "config_class", None)
    if isinstance(config_class, type) and hasattr(config_class, "from_dict") and _takes_config(model_class):
        return lambda: _of_config(path, model_class, config_class, kwargs)
    if any(one.__name__ == "ConfigMixin" and one.__module__.startswith("diffusers.") for one in model_class.__mro__):
        known = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        _check_arguments(path, model_class, known)
        return lambda: model_class.from_config(dict(kwargs))
    _check_arguments(path, model_class, kwargs)
    return lambda: model_class(**kwargs)


def _takes_config(model_class: type) -> bool:
    try:
        parameters = list(inspect.signature(model_class).parameters)
    except (TypeError, ValueError):
        return False
    return bool(parameters) and parameters[0] == "config"


def _of_config(path: str, model_class: Any, config_class: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    import torch

    fields = plain_config(dict(kwargs))
    own = getattr(config_class, "base_config_key", "")
    if own and isinstance(fields.get(own), dict):
        fields = fields[own]  # of a model of several, such as CLIP's text encoder
    asked, expected = fields.get("model_type"), getattr(config_class, "model_type", "")
    if asked is not None and expected and asked != expected:
        raise InvalidInput(
            f"{path} is of the model_type {shown(repr(expected))}, the configuration of {shown(repr(asked))}; "
            "give the class of this configuration"
        )
    if not any(name in fields for name in _NO_CONFIG_OF_OURS):
        known = _fields_of(config_class)
        unknown = [name for name in fields if known and name not in known]
        if unknown:
            near = _near(unknown[0], sorted(known))
            raise InvalidInput(f"{path}: {config_class.__name__} has no {_listed(unknown)}{near}")
    config = config_class.from_dict(fields)
    dtype = getattr(config, "dtype", None)
    usual = torch.get_default_dtype()
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        torch.set_default_dtype(dtype)
    try:
        model: nn.Module = model_class(config)
    finally:
        torch.set_default_dtype(usual)
    return model


def _fields_of(config_class: Any) -> set[str]:
    """Names that a configuration of transformers takes; empty where that cannot be told."""
    try:
        known = set(inspect.signature(config_class).parameters) | set(config_class().to_dict())
    except Exception:  # noqa: BLE001  # some cannot be made without arguments
        return set()
    return known | set(getattr(config_class, "attribute_map", {})) | {"torch_dtype"}


def _check_arguments(path: str, model_class: type, kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        InvalidInput: the constructor takes other arguments; says which.
    """
    try:
        signature = inspect.signature(model_class)
    except (TypeError, ValueError):
        return
    parameters = signature.parameters.values()
    named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    unknown = [] if takes_any else [name for name in kwargs if name not in named]
    missing = [
        one.name
        for one in parameters
        if one.default is one.empty
        and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        and (one.name not in kwargs or one.kind is one.POSITIONAL_ONLY)
    ]
    if not unknown and not missing:
        return
    parts = [f"it takes no {_listed(unknown)}{_near(unknown[0], sorted(named))}"] if unknown else []
    parts += [f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
    takes = _listed([one.name for one in parameters]) or "nothing"
    raise InvalidInput(f"the arguments do not fit {path}: {'; '.join(parts)} (its constructor takes {takes})")


def _listed(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {shown(text, 300)}" if text else type(error).__name__
