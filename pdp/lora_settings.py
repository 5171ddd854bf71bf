"""The settings of a LoRA, as pdp names them: `lora_r`, `lora_alpha`, `lora_dropout`, `target_modules`, `apply_to`,
and what a LoRA has beside these in PEFT's own words. One value for what a file, a version and a live model say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from pdp.errors import ConfigError
from pdp.targets import check_apply_to, check_targets, linear_layers
from registry.core.reference import shown

_OUTSIDE = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("runtime_config", "task_type", "target_modules", "r", "lora_alpha", "lora_dropout"),
}
"""Keys of a LoraConfig that are settings of their own, or belong to a session."""
MAX_RANK, MAX_ALPHA = 2**16, 1e9
_NAME = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_INIT = re.compile(r"gaussian|orthogonal|olora|pissa(?:_niter_[0-9]{1,2})?")
_WHICH_MODULES = {"exclude_modules", "layers_pattern", "layers_to_transform"}
OPTIONS = ("alpha_pattern", "init_lora_weights", "lora_bias", "rank_pattern", "use_dora", "use_rslora")
"""What PEFT's LoraConfig has beside rank, alpha, dropout and targets, and pdp keeps: all that stays within the
adapter."""


@dataclass(frozen=True)
class LoraSettings:
    """What a LoRA was made with.

    Attributes:
        r: rank.
        alpha: numerator of the scaling, alpha / r.
        dropout: on the inputs of the adapter, in training.
        target_modules: sorted parts of names.
        apply_to: `encoder`, `decoder` or `both`.
        options: other keys of PEFT's LoraConfig that are not at their default.
        by_suffix: the targets are PEFT's: a whole name, or the end of one after a dot.
    """

    r: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    apply_to: str = "both"
    options: Mapping[str, Any] = field(default_factory=dict)
    by_suffix: bool = False

    def names(self, path: str) -> bool:
        """Whether the targets name the module of this path."""
        if self.by_suffix:
            return any(path == target or path.endswith(f".{target}") for target in self.target_modules)
        return any(target in path for target in self.target_modules)

    def to_payload(self) -> dict[str, Any]:
        """As it stands in a `.pth`: plain values."""
        found = {
            "lora_r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.target_modules),
            "apply_to": self.apply_to,
        }
        return found | ({"lora_options": dict(self.options)} if self.options else {})

    def differences(self, other: LoraSettings, model: nn.Module | None = None) -> list[str]:
        """What differs, one text each; targets by the modules that they resolve to.

        Args:
            other: named second in the texts.
            model: resolves targets; without it a network with as many blocks as the targets name.
        """
        found = [
            f"{name}: {mine} and {others}"
            for name, mine, others in (
                ("lora_r", self.r, other.r),
                ("lora_alpha", self.alpha, other.alpha),
                ("lora_dropout", self.dropout, other.dropout),
            )
            if mine != others
        ]
        found += [
            f"{key}: {self.options.get(key)!r} and {other.options.get(key)!r}"
            for key in sorted({*self.options, *other.options})
            if self.options.get(key) != other.options.get(key)
        ]
        rules = [(one.target_modules, one.apply_to, one.by_suffix) for one in (self, other)]
        if rules[0] != rules[1]:
            mine, others = (_resolved(one, model, (self, other)) for one in (self, other))
            for text, modules in (("only in the first", mine - others), ("only in the second", others - mine)):
                if modules:
                    named = sorted(modules)
                    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
                    found.append(f"targets {text}: {', '.join(named[:4])}{more}")
        return found


def read_settings(given: object, what: str = "the LoRA configuration") -> LoraSettings:
    """Settings from a mapping as it stands in a `.pth` or in a configuration, or from PEFT's LoraConfig.

    Raises:
        ConfigError: not such a mapping, an unknown key (with the near one), or a value of another type.
        InvalidInput: `apply_to` or targets of another form.
    """
    if isinstance(given, LoraSettings):
        return given
    if not isinstance(given, Mapping) and hasattr(given, "to_dict"):
        return settings_of_peft(given.to_dict(), what=what)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what}: expected a mapping with lora_r and lora_alpha, found a {type(given).__name__}")
    if "lora_r" not in given and "peft_type" in given:
        return settings_of_peft(given, what=what)
    known = ("lora_r", "lora_alpha", "lora_dropout", "target_modules", "apply_to", "lora_options")
    for key in given:
        if key not in (*known, "task_type"):
            near = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(known)}"
            raise ConfigError(f"{what}: unknown key {shown(str(key))}{hint}")
    missing = [key for key in ("lora_r", "lora_alpha", "target_modules") if key not in given]
    if missing:
        raise ConfigError(f"{what}: {', '.join(missing)} missing; found {', '.join(map(str, given)) or 'nothing'}")
    options = given.get("lora_options") or {}
    if not isinstance(options, Mapping):
        raise ConfigError(f"{what}: lora_options is a {type(options).__name__}; expected a mapping")
    return make_settings(
        given["lora_r"],
        given["lora_alpha"],
        given.get("lora_dropout", 0.0),
        given["target_modules"],
        given.get("apply_to", "both"),
        options,
        what=what,
    )


def make_settings(
    r: object,
    alpha: object,
    dropout: object,
    target_modules: object,
    apply_to: object = "both",
    options: Mapping[str, Any] | None = None,
    *,
    what: str = "LoRA",
) -> LoraSettings:
    """Checked settings.

    Raises:
        ConfigError, InvalidInput
    """
    _check_rank(r, what, "lora_r")
    _check_alpha(alpha, what, "lora_alpha")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:  # type: ignore[operator]  # a number by then
        raise ConfigError(f"{what}: lora_dropout is {shown(repr(dropout))}; expected a number from 0 to below 1")
    checked = check_options(options or {}, what)
    if isinstance(alpha, float) and alpha.is_integer():
        alpha = int(alpha)  # one LoRA has one form, however its alpha was written
    targets, words = check_targets(target_modules), check_apply_to(apply_to)
    return LoraSettings(r, alpha, float(dropout), targets, words, checked)  # type: ignore[arg-type]  # checked above


def _check_rank(value: object, what: str, key: str) -> None:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise ConfigError(f"{what}: {key} is {shown(repr(value))}; expected a whole number from 1 to {MAX_RANK}")


def _check_alpha(value: object, what: str, key: str) -> None:
    if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:  # type: ignore[operator]  # a number by then
        raise ConfigError(f"{what}: {key} is {shown(repr(value))}; expected a positive number, {MAX_ALPHA:g} at most")


def _check_pattern(pattern: object, what: str, key: str, check: Callable[[object, str, str], None]) -> None:
    """Keys are names here. PEFT takes expressions, and one from a file can keep it busy for ever."""
    if not isinstance(pattern, Mapping):
        raise ConfigError(f"{what}: {key} is a {type(pattern).__name__}; expected a mapping from names of modules")
    for name, value in pattern.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{what}: {key} has the key {shown(repr(name))}; expected the name of a module, or its end"
            )
        check(value, what, f"{key}[{name!r}]")


def _check_init(value: object, what: str) -> None:
    if not (isinstance(value, bool) or (isinstance(value, str) and _INIT.fullmatch(value))):
        raise ConfigError(
            f"{what}: init_lora_weights is {shown(repr(value))}; expected true, false, gaussian, orthogonal, olora, "
            "pissa or pissa_niter_N"
        )


def check_options(options: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Options that PEFT's LoraConfig has, less those at their default.

    Raises:
        ConfigError: an unknown one, with the near name.
    """
    defaults = _defaults()
    found = {}
    odd = next((key for key in options if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigError(f"{what}: {shown(repr(odd))} is no name of an option")
    for key, value in sorted(options.items()):
        plain = _plain(value)
        if key not in OPTIONS and (key not in defaults or not _is_default(plain, defaults[key])):
            near = get_close_matches(str(key), [*OPTIONS, *_OWN], n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; pdp's LoRA takes {', '.join(OPTIONS)}"
            raise ConfigError(f"{what}: unknown option {shown(str(key))}{hint}")
        if _is_default(plain, defaults[key]):
            continue
        if key == "rank_pattern":
            _check_pattern(plain, what, key, _check_rank)
        elif key == "alpha_pattern":
            _check_pattern(plain, what, key, _check_alpha)
        elif key == "init_lora_weights":
            _check_init(plain, what)
        elif not isinstance(plain, bool):
            raise ConfigError(f"{what}: {key} is {shown(repr(plain))}; expected true or false")
        found[key] = plain
    return found


_OWN = ("lora_r", "lora_alpha", "lora_dropout", "target_modules", "apply_to", "base_model")


def settings_of_peft(document: Mapping[str, Any], modules: Iterable[str] = (), *, what: str) -> LoraSettings:
    """Settings from PEFT's configuration of a LoRA.

    Args:
        modules: paths of the modules that its tensors belong to, which say what the targets resolve to; without them
            the configuration's own targets.

    Raises:
        ConfigError: no LoRA, or without rank or alpha.
    """
    kind = str(getattr(document.get("peft_type"), "value", document.get("peft_type")))
    if kind != "LORA":
        raise ConfigError(f"{what}: its type is {shown(kind)}; pdp has LoRA alone")
    resolved = list(modules)
    targets = resolved or document.get("target_modules")
    outside = _OUTSIDE | (_WHICH_MODULES if resolved else set())
    options = {
        key: value
        for key, value in document.items()
        if key not in outside and (key in OPTIONS or _plain(value) not in (None, False, {}, []))
    }
    dropout = document.get("lora_dropout", 0.0)
    if isinstance(targets, str):
        raise ConfigError(f"{what}: target_modules is the expression {shown(targets)}; give the names that it means")
    found = make_settings(
        document.get("r"), document.get("lora_alpha"), dropout or 0.0, targets, "both", options, what=what
    )
    return found if resolved else replace(found, by_suffix=True)


def _is_default(value: Any, default: Any) -> bool:
    empty: tuple[Any, ...] = (None, {}, [])
    return bool(value == default) or (value in empty and default in empty)


def _plain(value: Any) -> Any:
    """Containers as dicts and lists, sets sorted: what a file can hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value


def _defaults() -> dict[str, Any]:
    """PEFT's own defaults, as its configuration would be written."""
    from peft import LoraConfig

    found = {}
    for one in fields(LoraConfig):
        default = one.default if one.default is not MISSING else None
        if default is None and one.default_factory is not MISSING:
            default = one.default_factory()
        found[one.name] = default
    return found


def _resolved(one: LoraSettings, model: nn.Module | None, both: tuple[LoraSettings, LoraSettings]) -> set[str]:
    if model is None:
        paths = _reference_layers([target for settings in both for target in settings.target_modules])
        paths = [path for path in paths if one.apply_to == "both" or one.apply_to in path]
    else:
        paths = linear_layers(model, one.apply_to)
    found = {path for path in paths if one.names(path)}
    if model is None:
        # Of another network than the one that is known here: the names themselves.
        found |= {target for target in one.target_modules if not any(target in path for path in paths)}
    return found


def _reference_layers(targets: Iterable[str]) -> list[str]:
    """The linear layers of a QKVTransformerForDiffusion with as many blocks as are named."""
    numbers = [int(part) for target in targets for part in target.split(".") if part.isdigit() and len(part) < 4]
    blocks = 1 + max(numbers, default=0)
    attentions = [f"encoder.blocks.{n}.attn" for n in range(blocks)]
    attentions += [f"decoder.blocks.{n}.{kind}" for n in range(blocks) for kind in ("self_attn", "cross_attn")]
    projections = [f"{path}.{name}_proj" for path in attentions for name in ("q", "k", "v", "out")]
    stacks = [f"{stack}.blocks.{n}.mlp" for stack in ("encoder", "decoder") for n in range(blocks)]
    return projections + [f"{path}.{name}" for path in stacks for name in ("fc1", "fc2")]
