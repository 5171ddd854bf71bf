"""The LoRA settings of pdp's `.pth` files (`lora_r`, `lora_alpha`, `lora_dropout`, `target_modules`, `apply_to`, and
`lora_options` where there are more) and PEFT's configuration, each made from the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from registry.core.adapter_config import AdapterConfig, adapter_config, canonical_config, is_off, unknown_keys
from registry.core.adapter_names import Target
from registry.core.content_digest import LORA_OPTIONS, PLAIN_INITS
from registry.core.errors import InvalidConfig, InvalidInput
from registry.core.reference import shown
from registry.core.tensor_names import canonical_name, split_at_tuner
from registry.formats.pickles import Limits, walk

KEYS = ("lora_r", "lora_alpha")
"""What such settings have at least."""
OPTIONS = "lora_options"
MAX_OPTIONS = 100_000
"""Values in the options, shared ones counted each time."""


def has_settings(tree: object) -> bool:
    return isinstance(tree, Mapping) and all(key in tree for key in KEYS)


def config_from_settings(settings: Mapping[Any, Any], names: Iterable[str], what: str) -> AdapterConfig:
    """PEFT's configuration for adapter tensors that were saved with such settings.

    The settings' own targets are substrings of names within an `apply_to`, which PEFT has not, so the modules are taken
    from the tensors: each by its whole path.

    Args:
        names: of the adapter's tensors, under any wrapper and adapter name.
        what: names the file in errors.

    What the settings have as `lora_options` are further keys of PEFT's LoraConfig (`use_rslora`, `rank_pattern`, ...);
    they change nothing of what is said beside them.

    Raises:
        InvalidConfig: a setting of another type.
        InvalidInput: options without end.
    """
    modules = set()
    for name in names:
        parts = split_at_tuner(canonical_name(name))
        if parts is not None:
            modules.add(parts[0])
    rank, alpha, dropout = settings["lora_r"], settings["lora_alpha"], settings.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise InvalidConfig(f"{what}: lora_r is {shown(repr(rank))}; expected a whole number from 1")
    for key, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if type(value) not in (int, float):
            raise InvalidConfig(f"{what}: {key} is {shown(repr(value))}; expected a number")
    return adapter_config(
        {
            "bias": "none",
            **_options(settings, what),
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "target_modules": sorted(modules),
        },
        what,
    )


def _options(settings: Mapping[Any, Any], what: str) -> dict[str, Any]:
    options = settings.get(OPTIONS)
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        found = "keys that are not text" if isinstance(options, Mapping) else f"a {type(options).__name__}"
        raise InvalidConfig(f"{what}: {OPTIONS} is {found}; expected a dict of keys of PEFT's LoraConfig")
    for _ in walk(options, what=f"{what}, {OPTIONS}", limits=Limits(items=MAX_OPTIONS, depth=32)):
        pass  # what is shared is expanded below: this counts it first
    return dict(options)


def settings_from_config(config: AdapterConfig, targets: Iterable[Target], what: str) -> dict[str, Any]:
    """Settings for a `.pth`, as plain values that `torch.load(weights_only=True)` reads.

    Raises:
        InvalidInput: the adapter is more than r, alpha and dropout over linear layers, so settings would not say it.
    """
    linear = sorted(targets, key=lambda target: target.module)
    other = next((target for target in linear if target.kind != "linear" or target.rank != config.r), None)
    document = canonical_config(config)
    named = (
        *LORA_OPTIONS,
        *unknown_keys(config),
        "use_rslora",
        "alpha_pattern",
        "modules_to_save",
        "target_parameters",
    )
    option = next((key for key in named if not is_off(document.get(key))), None)
    if config.init_lora_weights is not None and config.init_lora_weights not in PLAIN_INITS:
        option = "init_lora_weights"
    if config.peft_type != "LORA" or config.r is None or config.lora_alpha is None:
        reason = f"its type is {config.peft_type}, r {config.r} and lora_alpha {config.lora_alpha}"
    elif option is not None:
        reason = f"its configuration has {shown(option)}"
    elif other is not None:
        reason = f"{shown(other.module)} is {other.kind} with rank {other.rank}, r is {config.r}"
    else:
        alpha = config.lora_alpha
        return {
            "lora_r": config.r,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": 0.0 if config.lora_dropout is None else float(config.lora_dropout),
            "target_modules": [target.module for target in linear],
            "apply_to": _apply_to(target.module for target in linear),
        }
    raise InvalidInput(
        f"{what} cannot be a .pth of r, alpha and dropout alone: {reason}; pull it as peft or safetensors"
    )


def _apply_to(modules: Iterable[str]) -> str:
    found = {part for module in modules for part in ("encoder", "decoder") if part in module}
    return found.pop() if len(found) == 1 else "both"
