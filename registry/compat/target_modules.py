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


class Targeting:
    """What a configuration targets.

    Attributes:
        known: False where it names nothing, or cannot be evaluated.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self._config = config
        self._wanted = self._excluded = _Names(())
        self.known = config.target_modules is not None
        try:
            self._wanted = _Names(config.target_modules or ())
            self._excluded = _Names(config.exclude_modules or ())
        except Undecided:
            self.known = False

    def modules(self, form: ModelForm) -> tuple[Module, ...] | None:
        """The modules that are targeted and that PEFT can wrap; None where that is not known."""
        if not self.known:
            return None
        try:
            return tuple(
                module
                for module in form.modules
                if module.path and module.kind in WRAPPED and self._is_wanted(module) and not self._is_out(module.path)
            )
        except Undecided:
            return None

    def names(self, path: str) -> bool | None:
        """Whether a module of this path is targeted, whatever its kind; None where that cannot be told."""
        if not self.known or self._wanted.all_linear:
            return None
        try:
            return self._is_named(path) and not self._is_out(path)
        except Undecided:
            return None

    def unsupported(self, form: ModelForm) -> tuple[str, ...]:
        """Paths of modules that are targeted and that PEFT has no LoRA for.

        Args:
            form: an exact one.
        """
        others = (path for path in form.paths if (one := form.by_path.get(path)) is None or one.kind not in WRAPPED)
        return tuple(sorted(path for path in others if self.names(path)))

    def _is_wanted(self, module: Module) -> bool:
        if self._wanted.all_linear:
            is_linear = module.kind in ("linear", "transformers_conv1d", "matrix")
            return is_linear and module.path.rpartition(".")[2] not in _HEADS
        return self._is_named(module.path)

    def _is_named(self, path: str) -> bool:
        if not self._wanted.match(path):
            return False
        # A name that is the whole path counts in every layer.
        is_whole = self._wanted.pattern is not None or path in self._wanted.names
        return is_whole or _in_layers(path, self._config)

    def _is_out(self, path: str) -> bool:
        return self._excluded.match(path) or _is_saved(path, self._config)


def _is_saved(path: str, config: AdapterConfig) -> bool:
    """Whether modules_to_save names it or a module around it; such a module is copied and never wrapped."""
    if not config.modules_to_save:
        return False
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
        self._has_dots = False
        if isinstance(names, str):
            self.pattern = PatternTable([f"^(?:{names})"])
            if self.pattern.unreadable and not self.all_linear:
                raise Undecided("the expression is not evaluated")
        else:
            self.names = frozenset(names)
            self._has_dots = any("." in name for name in names)

    def match(self, path: str) -> bool:
        if self.pattern is not None:
            return self.pattern.find(path) is not None
        if path in self.names or path.rpartition(".")[2] in self.names:
            return True
        if not self._has_dots:
            return False
        return any(path[at + 1 :] in self.names for at, letter in enumerate(path) if letter == ".")
