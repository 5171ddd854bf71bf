"""What a live model was built with, as plain JSON: the arguments of its constructor where it says them, else its
configuration by transformers' or diffusers' way. What differs between two machines or two savings of one model, and
changes nothing that it computes, is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from registry.core.canonical_json import MAX_INTEGER
from registry.formats.live_architecture import live_architecture

if TYPE_CHECKING:
    from torch import nn

MAX_DEPTH = 32
LEFT_OUT = frozenset(
    {
        *("architectures", "auto_map", "trust_remote_code"),  # who saved it, and how it is loaded
        *("dtype", "torch_dtype"),  # stand with the parameters
        *("transformers_version", "name_or_path"),
    }
)
"""Members of a configuration, at any depth, beside those that begin with `_`, like `_name_or_path`."""
_LOCAL_PATH = re.compile(r"(?:[/~][^\n]|[A-Za-z]:[\\/]|\\\\|file:)")
_SURROGATES = re.compile("[\ud800-\udfff]")
_NOTHING = object()


def arguments_of(model: nn.Module) -> dict[str, Any] | None:
    """Arguments by name; None where the model says none."""
    architecture, _ = live_architecture(model)
    if architecture is not None:
        return _plain_dict(architecture.arguments, is_config=False)
    config = _configuration(model)
    return None if config is None else _plain_dict(config, is_config=True)


def _configuration(model: nn.Module) -> Mapping[Any, Any] | None:
    try:
        config: Any = getattr(model, "config", None)
        found = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    except Exception:  # noqa: BLE001  # code of the user's, which may fail in any way
        return None
    return found if isinstance(found, Mapping) else None


def _plain_dict(values: Mapping[Any, Any], *, is_config: bool, depth: int = 0) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        if isinstance(key, int | float) and not isinstance(key, bool):
            key = str(key)  # as in JSON: `id2label` of transformers
        if not isinstance(key, str) or _SURROGATES.search(key):
            continue
        if is_config and (key.startswith("_") or key in LEFT_OUT):
            continue
        plain = _plain(value, is_config, depth + 1)
        if plain is not _NOTHING:
            found[key] = plain
    return found


def _plain(value: Any, is_config: bool, depth: int) -> Any:
    if depth > MAX_DEPTH:
        return _NOTHING
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _NOTHING if _SURROGATES.search(value) or _LOCAL_PATH.match(value) else str(value)
    if isinstance(value, int):
        return int(value) if abs(value) <= MAX_INTEGER else str(int(value))
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return _plain_dict(value, is_config=is_config, depth=depth)
    if isinstance(value, list | tuple):
        items = [_plain(item, is_config, depth + 1) for item in value]
        return [item for item in items if item is not _NOTHING]
    if isinstance(value, set | frozenset):
        items = [_plain(item, is_config, depth + 1) for item in value]
        return sorted(
            (item for item in items if item is not _NOTHING), key=lambda item: (type(item).__name__, str(item))
        )
    return _NOTHING
