"""Which modules of a model PEFT would wrap, worked out from the configuration and the modules' paths alone. Follows
`check_target_module_exists` and `_maybe_include_all_linear_layers` of PEFT 0.21; expressions are evaluated by
`core.name_patterns`, never by `re`."""

from __future__ import annotations

import re

from registry.core.adapter_config import AdapterConfig
from registry.core.model_form import ModelForm, Module
from registry.core.name_patterns import PatternTable, Undecided

WRAPPED = frozenset(
    {
        *("linear", "conv1d", "conv2d", "conv3d", "embedding", "transformers_conv1d", "attention", "quantised"),
        "matrix",
    }
)
"""Kinds of modules that PEFT has LoRA layers for."""
ALL_LINEAR = "all-linear"
_HEADS = frozenset({"lm_head", "embed_out", "score", "classifier"})
_INDEX = re.compile(r"[0-9]+")


def targeted(config: AdapterConfig, form: ModelForm) -> tuple[Module, ...] | None:
    """The modules that `target_modules` names and that PEFT can wrap.

    Returns:
        None where the configuration does not say (no `target_modules`), and where that cannot be evaluated.
    """
    names = config.target_modules
    if names is None:
        return None
    try:
        wanted = _Names(names)
        excluded = _Names(config.exclude_modules or ())
        return tuple(
            module
            for module in form.modules
            if module.path
            and module.kind in WRAPPED
            and _is_wanted(module, wanted, config)
            and not excluded.match(module.path)
            and not _is_saved(module.path, config)
        )
    except Undecided:
        return None


def is_targeted(config: AdapterConfig, path: str) -> bool | None:
    """Whether the configuration targets a module of this path, whatever its kind; None where that cannot be told."""
    names = config.target_modules
    if names is None or (isinstance(names, str) and names.lower() == ALL_LINEAR):
        return None
    try:
        excluded = _Names(config.exclude_modules or ())
        return _is_named(path, _Names(names), config) and not excluded.match(path) and not _is_saved(path, config)
    except Undecided:
        return None


def unsupported(config: AdapterConfig, form: ModelForm) -> tuple[str, ...]:
    """Paths of modules that the configuration targets and that PEFT has no LoRA for; form: an exact one."""
    others = [path for path in sorted(form.paths) if (one := form.by_path.get(path)) is None or one.kind not in WRAPPED]
    return tuple(path for path in others if is_targeted(config, path))


def _is_wanted(module: Module, wanted: _Names, config: AdapterConfig) -> bool:
    if wanted.all_linear:
        return module.kind in ("linear", "transformers_conv1d") and module.path.rpartition(".")[2] not in _HEADS
    return _is_named(module.path, wanted, config)


def _is_named(path: str, wanted: _Names, config: AdapterConfig) -> bool:
    if not wanted.match(path):
        return False
    # A name that is the whole path counts in every layer.
    return wanted.pattern is not None or path in wanted.names or _in_layers(path, config)


def _is_saved(path: str, config: AdapterConfig) -> bool:
    """Whether modules_to_save names it or a module around it; such a module is copied and never wrapped."""
    segments = path.split(".")
    for name in config.modules_to_save:
        parts = name.split(".")
        if any(segments[at : at + len(parts)] == parts for at in range(len(segments))):
            return True
    return False


def _in_layers(path: str, config: AdapterConfig) -> bool:
    layers = config.layers_to_transform
    if not layers:
        return True
    segments = path.split(".")
    # The first number that stands behind a name that is not the first one, or behind one of layers_pattern.
    for at, segment in enumerate(segments[:-1]):
        if not _INDEX.fullmatch(segment) or at == 0:
            continue
        if config.layers_pattern and segments[at - 1] not in config.layers_pattern:
            continue
        if not config.layers_pattern and at < 2:
            continue
        return int(segment) in layers
    return False


class _Names:
    """`target_modules` or `exclude_modules`: ends of paths, or one expression for the whole path."""

    def __init__(self, names: tuple[str, ...] | str) -> None:
        self.all_linear = isinstance(names, str) and names.lower() == ALL_LINEAR
        self.pattern = None
        self.names: frozenset[str] = frozenset()
        if isinstance(names, str):
            self.pattern = PatternTable([f"^(?:{names})"])
            if self.pattern.unreadable and not self.all_linear:
                raise Undecided("the expression is not evaluated")
        else:
            self.names = frozenset(names)

    def match(self, path: str) -> bool:
        if self.pattern is not None:
            return self.pattern.find(path) is not None
        if path in self.names:
            return True
        return any(path[at + 1 :] in self.names for at, letter in enumerate(path) if letter == ".")
