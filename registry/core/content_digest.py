"""The content digest: one number for what an adapter or checkpoint computes with, whatever form it was pushed in. Two
versions with equal content digests load to the same function on the same base; docs/format.md has this text for others.

It is the sha256 (64 lower-case hex digits) of the RFC 8785 form of

    {"format": 1, "components": {ROLE: TENSORS, ...}, "config": CONFIG}

- ROLE: the component's role, like `adapter` or `model`.
- TENSORS: the distinct pairs `[canonical name, tensor digest]`, sorted by name, then by digest, both by code point.
  The canonical name is that of `canonical_name`: no wrapper prefix, no adapter name, none of `modules_to_save`'s. The
  tensor digest (BLAKE3) covers dtype, shape and bytes. The order of the file is left out.
- CONFIG of a LoRA: `{"tuner": "LORA", "modules": MODULES, "options": OPTIONS}`.
  MODULES: for each target `[path, full copy, rank, scaling]`, sorted by path: whether the kind is or has `full`, a
  number, and alpha / rank or alpha / sqrt(rank), null where alpha is unknown or the rank is 0.
  OPTIONS: those of the keys in `LORA_OPTIONS`, and of the keys that no known PEFT has, whose value is not off (null,
  false, zero, empty), with the value as in `canonical_config`; further `qalora_group_size` where `use_qalora` is on,
  `init_lora_weights` where it is no member of `PLAIN_INITS` (it changes the base weights), and `target_parameters` as
  the sorted distinct last names of its entries, where it is not empty.
- CONFIG of another tuner: `{"tuner": TYPE, "config": REST}`, REST being `canonical_config` without the keys of
  `OUTSIDE`, those that contain `dropout`, and those whose value is null.
- CONFIG is null where no configuration is known, and for a base model.

So outside are: peft_version, base name and revision, task type, dropout, inference flags, the spelling and order of
target_modules, how the weights were initialised (but for the inits named above), alpha and r of modules that have no
tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import rfc8785

from registry.core.adapter_config import AdapterConfig, canonical_config, is_off, unknown_keys
from registry.core.adapter_names import Target, canonical_name, target_scaling
from registry.core.digest import sha256_hex
from registry.core.errors import InvalidInput
from registry.core.layout import Layout

FORMAT = 1
LORA_OPTIONS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Keys of a LoRA that change the function. `velora_config` changes the backward pass alone."""
PLAIN_INITS = frozenset(("true", "false", "gaussian", "eva", "orthogonal", "mica"))
"""Values of init_lora_weights that leave the base weights as they are."""
OUTSIDE = frozenset(("base_model_name_or_path", "revision", "task_type", "peft_type"))


def content_digest(
    components: Mapping[str, tuple[Layout, Sequence[str]]],
    config: AdapterConfig | None,
    targets: Iterable[Target],
) -> str:
    """The content digest, as this module's text defines it.

    Args:
        components: role -> layout, and the tensors' digests (hex) in its order.
        config: of the adapter, where it is known.
        targets: `targets_of` of the adapter's layout and this configuration.

    Raises:
        InvalidInput: a layout and its digests are of different lengths.
    """
    for role, (layout, digests) in components.items():
        if len(layout) != len(digests):
            raise InvalidInput(f"component {role}: {len(layout)} tensors and {len(digests)} digests")
    document: Any = {
        "format": FORMAT,
        "components": {
            role: [list(pair) for pair in sorted({(canonical_name(s.name), d) for s, d in zip(*one, strict=True)})]
            for role, one in components.items()
        },
        "config": None if config is None else _config(config, targets),
    }
    return sha256_hex(rfc8785.dumps(document))


def _config(config: AdapterConfig, targets: Iterable[Target]) -> dict[str, Any]:
    canonical = canonical_config(config)
    if config.peft_type != "LORA":
        rest = {
            key: value
            for key, value in canonical.items()
            if value is not None and key not in OUTSIDE and "dropout" not in key
        }
        return {"tuner": config.peft_type, "config": rest}
    named = (*LORA_OPTIONS, *unknown_keys(config))
    options = {key: canonical[key] for key in named if not is_off(canonical.get(key))}
    if "use_qalora" in options:
        options["qalora_group_size"] = canonical.get("qalora_group_size")
    if config.init_lora_weights is not None and config.init_lora_weights not in PLAIN_INITS:
        options["init_lora_weights"] = config.init_lora_weights
    if config.target_parameters:
        options["target_parameters"] = sorted({name.rpartition(".")[2] for name in config.target_parameters})
    modules = [
        [target.module, "full" in target.kind.split("+"), target.rank, target_scaling(config, target)]
        for target in sorted(targets, key=lambda target: (target.module, target.kind))
    ]
    return {"tuner": config.peft_type, "modules": modules, "options": options}
