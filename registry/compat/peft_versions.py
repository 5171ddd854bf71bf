"""Which PEFT brought which configuration key, which value and which tuner, and what an older PEFT does without it. The
tables were read from the released wheels of PEFT 0.2 to 0.21 (the last patch of each minor version);
tests/compatibility/test_peft_versions.py holds keys and defaults against the installed one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from registry.core.adapter_config import AdapterConfig, is_off, unknown_keys
from registry.core.errors import InvalidInput
from registry.core.peft_keys import CONFIG_KEYS

Changes = Literal["maths", "training", "nothing"]
"""What is lost with a key: outputs, only what further training does, or neither."""

FIRST_REFUSING = (0, 6)
"""From here on `from_pretrained` hands all keys to the class: one that it does not know is a TypeError, whatever its
value. Before, an unknown key was passed over without a word."""
FIRST_DROPPING = (0, 14)
"""From here on unknown keys are taken out, with a warning (huggingface/peft#2038)."""
FIRST_INITS = (0, 7)
"""From here on an unknown text in `init_lora_weights` is a ValueError; before, any text was a yes."""


@dataclass(frozen=True, slots=True)
class Key:
    """A configuration key.

    Attributes:
        brought_by: minor version of PEFT, like `0.15`; None: it was there in 0.2, where the table begins.
        default: of `LoraConfig`, or of `AdaLoraConfig` for the keys that only it has, as JSON has it.
        changes: what another value than the default changes.
    """

    brought_by: str | None
    default: Any
    changes: Changes


@dataclass(frozen=True, slots=True)
class Dropped:
    """A key, or a value of a key, that a PEFT does not know.

    Attributes:
        value: as it stands in the configuration.
        brought_by: the minor version that knows it; None: no PEFT does.
        refuses: loading ends with an error; else the key is dropped, or the value read as another.
    """

    key: str
    value: Any
    brought_by: str | None
    changes: Changes
    refuses: bool


KEYS: dict[str, Key] = {
    # Where the adapter belongs: read by people and by the Auto classes; the caller gives from_pretrained the base.
    "auto_mapping": Key("0.4", None, "nothing"),
    "base_model_name_or_path": Key(None, None, "nothing"),
    "inference_mode": Key(None, False, "training"),
    "peft_type": Key(None, None, "maths"),
    "peft_version": Key("0.18", None, "nothing"),
    "revision": Key("0.4", None, "nothing"),
    "task_type": Key(None, None, "maths"),
    # Plain LoRA.
    "r": Key(None, 8, "maths"),
    "lora_alpha": Key(None, 8, "maths"),
    "lora_dropout": Key(None, 0.0, "training"),
    "fan_in_fan_out": Key(None, False, "maths"),
    "bias": Key(None, "none", "maths"),
    "modules_to_save": Key(None, None, "maths"),
    "rank_pattern": Key("0.6", {}, "maths"),
    "alpha_pattern": Key("0.6", {}, "maths"),
    "use_rslora": Key("0.8", False, "maths"),
    "lora_bias": Key("0.14", False, "maths"),
    # Which modules. Without the three that narrow target_modules more modules get a LoRA, which begins as zero.
    "target_modules": Key(None, None, "maths"),
    "layers_to_transform": Key("0.4", None, "training"),
    "layers_pattern": Key("0.4", None, "training"),
    "exclude_modules": Key("0.14", None, "training"),
    "layer_replication": Key("0.10", None, "maths"),
    "trainable_token_indices": Key("0.15", None, "maths"),
    "target_parameters": Key("0.17", None, "maths"),
    "ensure_weight_tying": Key("0.18", False, "maths"),
    # How the factors begin; what an init does to the base is said by its name, in INITS.
    "init_lora_weights": Key("0.3", True, "training"),
    "loftq_config": Key("0.7", {}, "maths"),
    "eva_config": Key("0.14", None, "training"),
    "corda_config": Key("0.15", None, "training"),
    "lora_ga_config": Key("0.19", None, "training"),
    # Variants. Monteclora samples while training, and VeLoRA changes the backward pass; both end as plain LoRA.
    "use_dora": Key("0.9", False, "maths"),
    "use_qalora": Key("0.16", False, "maths"),
    "qalora_group_size": Key("0.16", 16, "maths"),
    "alora_invocation_tokens": Key("0.18", None, "maths"),
    "arrow_config": Key("0.18", None, "maths"),
    "use_bdlora": Key("0.19", None, "maths"),
    "velora_config": Key("0.20", None, "training"),
    "monteclora_config": Key("0.20", None, "training"),
    "kasa_config": Key("0.21", None, "maths"),
    # How it runs. megatron_config chooses the class of the layers.
    "megatron_config": Key("0.7", None, "maths"),
    "megatron_core": Key("0.7", "megatron.core", "nothing"),
    "runtime_config": Key("0.12", {"ephemeral_gpu_offload": False}, "nothing"),
    # AdaLoRA's own: it came with all of them, and only init_r is in the tensors' shapes.
    "beta1": Key("0.3", 0.85, "training"),
    "beta2": Key("0.3", 0.85, "training"),
    "deltaT": Key("0.3", 1, "training"),
    "init_r": Key("0.3", 12, "maths"),
    "orth_reg_weight": Key("0.3", 0.5, "training"),
    "target_r": Key("0.3", 8, "training"),
    "tfinal": Key("0.3", 0, "training"),
    "tinit": Key("0.3", 0, "training"),
    "total_step": Key("0.3", None, "training"),
}
"""Every key of a LoRA's and an AdaLoRA's configuration. (0.2 also had `merge_weights` and `enable_lora`, which went
with 0.3; no file of a newer PEFT has them.)"""

INITS: dict[str, tuple[str, Changes]] = {
    "gaussian": ("0.7", "training"),
    "loftq": ("0.7", "maths"),
    "pissa": ("0.11", "maths"),
    "olora": ("0.12", "maths"),
    "eva": ("0.14", "training"),
    "corda": ("0.15", "maths"),
    "orthogonal": ("0.16", "training"),
    "lora_ga": ("0.19", "maths"),
    "mica": ("0.20", "training"),
}
"""Texts of `init_lora_weights` -> the version that brought them, and whether they change the base's weights, so that
the adapter belongs to the changed ones (`maths`). `pissa_niter_16` counts as `pissa`."""

TYPES: dict[str, str | None] = {
    **dict.fromkeys(("LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")),
    **dict.fromkeys(("ADALORA", "ADAPTION_PROMPT"), "0.3"),
    "IA3": "0.4",
    **dict.fromkeys(("LOHA", "LOKR", "MULTITASK_PROMPT_TUNING"), "0.6"),
    "OFT": "0.7",
    "POLY": "0.8",
    **dict.fromkeys(("BOFT", "LN_TUNING", "VERA"), "0.11"),
    **dict.fromkeys(("FOURIERFT", "HRA", "XLORA"), "0.12"),
    "VBLORA": "0.13",
    **dict.fromkeys(("BONE", "CPT"), "0.14"),
    "TRAINABLE_TOKENS": "0.15",
    **dict.fromkeys(("C3A", "RANDLORA"), "0.16"),
    **dict.fromkeys(("MISS", "SHIRA"), "0.17"),
    **dict.fromkeys(("DELORA", "OSF", "ROAD", "WAVEFT"), "0.18"),
    **dict.fromkeys(("ADAMSS", "CARTRIDGE", "GRALORA", "LILY", "PEANUT", "PSOFT", "PVERA", "TINYLORA"), "0.19"),
    **dict.fromkeys(("BEFT", "DEFT", "FROD", "GLORA", "HIRA", "UNILORA"), "0.20"),
    **dict.fromkeys(("SHADOW", "SUPERTUNING"), "0.21"),
}
"""peft_type -> the minor version that brought it; None: it was there in 0.2."""

GONE: dict[str, str] = {"BONE": "0.19"}
"""peft_type -> the minor version that no longer has it."""

_BEFORE: dict[tuple[str, str], str] = {("ADALORA", "rank_pattern"): "0.3"}
"""Keys that one tuner had before the others."""
_COMMON = ("auto_mapping", "inference_mode", "peft_version", "revision", "task_type")
_VERSION = re.compile(
    r"v?(?P<release>[0-9]{1,6}(?:\.[0-9]{1,6}){1,3})(?:[-_.]?(?:a|b|c|rc|alpha|beta|pre|post|dev)[-_.]?[0-9]{0,9}){0,3}"
    r"(?:[+@].*)?"
)


def parse_peft(text: str) -> tuple[int, ...]:
    """The numbers of a PEFT version, to be compared: `0.15`, `0.15.2`, `0.18.2.dev0`, and `0.18.2.dev0@COMMIT`, as PEFT
    itself writes it from a checkout. What follows the numbers is left out.

    Raises:
        InvalidInput: not a version.
    """
    found = _VERSION.fullmatch(text.strip())
    if found is None:
        raise InvalidInput(f"not a version of PEFT: {text[:80]!r}; write it like 0.15 or 0.15.2")
    return tuple(int(part) for part in found["release"].split("."))


def dropped_keys(config: AdapterConfig, peft: str) -> tuple[Dropped, ...]:
    """What a PEFT does not know of a configuration, by key.

    Where this PEFT drops unknown keys, those with which nothing is lost are left out, like all that have the default
    value. Where it refuses, all are named, since any of them ends the loading. Of tuners other than LoRA and AdaLoRA
    only the keys that all tuners have are compared.

    Args:
        peft: like `0.15`.

    Raises:
        InvalidInput: `peft` is not a version.
    """
    version = parse_peft(peft)[:2]
    refuses = FIRST_REFUSING <= version < FIRST_DROPPING
    found = [*_unknown_keys(config, version, refuses), *_unknown_values(config, version)]
    return tuple(sorted(found, key=lambda one: one.key))


def type_known(peft_type: str, peft: str) -> bool:
    """Whether a PEFT has this tuner; False also for a type that no PEFT up to the newest known one has.

    Raises:
        InvalidInput: `peft` is not a version.
    """
    version = parse_peft(peft)[:2]
    if peft_type not in TYPES:
        return False
    gone = GONE.get(peft_type)
    return not _older(version, TYPES[peft_type]) and (gone is None or version < parse_peft(gone))


def least_peft(config: AdapterConfig) -> str | None:
    """The oldest PEFT that has the tuner and all that changes what the adapter computes, and that takes its init.

    One from 0.6 to 0.13 may still refuse the file for keys whose value changes nothing (`dropped_keys` names them);
    taking those out of the file is enough.

    Returns:
        A minor version like `0.15`; None where any PEFT since 0.2 will do, and for a tuner that is in no table.
    """
    if config.peft_type not in TYPES:
        return None
    needed = [TYPES[config.peft_type]]
    for key, value in config.document.items():
        entry = _entry(config, key)
        if entry is not None and _what_changes(config, key, value, entry) == "maths":
            needed.append(_brought_by(config, key, entry))
    needed.extend(one.brought_by for one in _late_values(config))
    return max((one for one in needed if one is not None), key=parse_peft, default=None)


def fused_expert_layout(version: str) -> int | None:
    """How this PEFT lays out the two factors of a three-dimensional parameter (`target_parameters`).

    The parameter is (experts, d1, d2). A is (experts * r, in), expert by expert; B is (out, r * experts), the expert
    running fastest: so in every version. What changed is which dimension counts as `in`:

    - 0 (0.17 and 0.18): in = d1, out = d2, always.
    - 1 (0.19.0): in = d2, out = d1 where the module says `is_transposed`; else as before.
    - 2 (0.19.1 and newer): in = d2, out = d1 except where the module says `is_transposed`.

    transformers stores most experts as (experts, out, in), as nn.Linear does, and gpt-oss's as (experts, in, out) with
    `is_transposed`: 2 is the one that takes both as they are meant. A file of 0 is read rightly by 1 for the former and
    by 2 for the latter; the number here does not say which modules there are, so different numbers mean: not known to
    be the same. With d1 = d2 nothing tells them apart by shape.

    Returns:
        None: this PEFT has no target_parameters, or the text is no version.
    """
    try:
        numbers = parse_peft(version)
    except InvalidInput:
        return None
    if numbers < (0, 17):
        return None
    if numbers[:2] < (0, 19):
        return 0
    return 1 if (*numbers, 0)[:3] == (0, 19, 0) else 2


def _unknown_keys(config: AdapterConfig, version: tuple[int, ...], refuses: bool) -> Iterator[Dropped]:
    for key, value in config.document.items():
        entry = _entry(config, key)
        if entry is None:
            continue
        brought_by = _brought_by(config, key, entry)
        if _older(version, brought_by):
            changes = _what_changes(config, key, value, entry)
            if refuses or changes != "nothing":
                yield Dropped(key, value, brought_by, changes, refuses)
    if refuses:  # those with a value that is on are told as C02 of every PEFT
        for key, value in unknown_keys(config).items():
            if is_off(value):
                yield Dropped(key, value, None, "nothing", True)


def _unknown_values(config: AdapterConfig, version: tuple[int, ...]) -> Iterator[Dropped]:
    for one in _late_values(config):
        is_init = one.key == "init_lora_weights"
        if not _older(version, one.brought_by) or (is_init and _older(version, KEYS[one.key].brought_by)):
            continue
        yield Dropped(one.key, one.value, one.brought_by, one.changes, not is_init or version >= FIRST_INITS)


def _late_values(config: AdapterConfig) -> Iterator[Dropped]:
    """Values that came later than their keys."""
    if config.peft_type not in ("LORA", "ADALORA"):
        return
    init = config.document.get("init_lora_weights")
    if isinstance(init, str):
        name = "pissa" if init.startswith("pissa_niter_") else init.lower()
        if name in INITS:
            brought_by, changes = INITS[name]
            yield Dropped("init_lora_weights", init, brought_by, changes, True)
    targets = config.document.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":  # before, an expression that matches nothing
        yield Dropped("target_modules", targets, "0.8", "maths", True)


def _entry(config: AdapterConfig, key: str) -> Key | None:
    if config.peft_type in ("LORA", "ADALORA"):
        return KEYS.get(key) if key in CONFIG_KEYS[config.peft_type] or key in _COMMON else None
    return KEYS[key] if key in _COMMON else None


def _brought_by(config: AdapterConfig, key: str, entry: Key) -> str | None:
    return _BEFORE.get((config.peft_type, key), entry.brought_by)


def _what_changes(config: AdapterConfig, key: str, value: Any, entry: Key) -> Changes:
    if _is_default(value, entry) or (key == "qalora_group_size" and not config.document.get("use_qalora")):
        return "nothing"
    if key == "exclude_modules" and config.document.get("init_lora_weights") is False:
        return "maths"  # the LoRAs that more modules then get do not begin as zero
    return entry.changes


def _is_default(value: Any, entry: Key) -> bool:
    if isinstance(value, bool) or isinstance(entry.default, bool):
        return value is entry.default or (value is None and not entry.default)
    return bool(value == entry.default) or (is_off(value) and is_off(entry.default))


def _older(version: tuple[int, ...], brought_by: str | None) -> bool:
    return brought_by is not None and version < parse_peft(brought_by)
