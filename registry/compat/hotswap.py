"""Which LoRA adapters can follow each other in one slot of a compiled model, without compiling it again. Follows
`peft/utils/hotswap.py` of PEFT 0.21 (`prepare_model_for_compiled_hotswap`, `hotswap_adapter`; diffusers calls the same
from `enable_lora_hotswap`), and says no as well where that one raises nothing and computes something else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from registry.compat.case import AdapterSide
from registry.core.adapter_config import AdapterConfig
from registry.core.adapter_names import Target, canonical_name, target_scaling
from registry.core.content_digest import LORA_OPTIONS, PLAIN_INITS
from registry.core.findings import Finding
from registry.core.name_patterns import Undecided

CODE = "C28"
PADDED = frozenset(("linear", "conv2d", "attention_out"))
"""Kinds whose factors `prepare_model_for_compiled_hotswap` pads to the target rank."""
_AS_THEY_ARE = frozenset(("conv1d", "conv3d"))
_VARIANTS = (*(one for one in LORA_OPTIONS if one not in ("use_dora", "trainable_token_indices")), "velora_config")
_EXACT = 1e-9


@dataclass(frozen=True)
class SwapGroup:
    """Adapters that can be swapped into one slot, each after any other.

    Attributes:
        members: their references, in the order in which they were given.
        first: the one to load first: its targets include those of all others.
        target_rank: for `prepare_model_for_compiled_hotswap` or `enable_lora_hotswap`; 0 where the only member can
            not be swapped at all.
        why: for an adapter alone in its group, what keeps it from the others; else empty.
    """

    members: tuple[str, ...]
    first: str
    target_rank: int
    why: str = ""


def swap_findings(slot: AdapterSide, incoming: AdapterSide) -> list[Finding]:
    """What keeps an adapter from being swapped into the place of another; nothing, where it can be.

    The slot is what was loaded first, by `PeftModel.from_pretrained`, and prepared for the larger rank of the two. An
    adapter against itself: whether it can come back after another one.

    Returns:
        Errors of code C28, each naming the module or key.
    """
    found = [*_tuner(slot, incoming)]
    if found or slot.config is None or incoming.config is None:
        return found
    found.extend(_options(slot.config, incoming.config))
    sides = (slot,) if incoming is slot else (slot, incoming)
    for side in sides:
        found.extend(_extras(side))
    found.extend(_targets(slot, incoming))
    found.extend(_scalings(incoming))
    if incoming is not slot:
        found.extend(_weights(slot, incoming))
    return list(dict.fromkeys(found))


def swap_groups(adapters: Sequence[AdapterSide]) -> tuple[SwapGroup, ...]:
    """Groups whose members can all follow each other, in one slot that is made by loading `first`.

    Greedy: the adapter with the most targets takes all that fit its slot, then the next one that is left. Each adapter
    is in one group; groups are in the order of their earliest members.
    """
    able = [at for at, one in enumerate(adapters) if not _own_findings(one)]
    waiting = sorted(able, key=lambda at: (-len(adapters[at].targets), -_biases(adapters[at]), at))
    groups: list[tuple[int, list[int]]] = []
    while waiting:
        first = waiting[0]
        taken = [at for at in waiting if at == first or not swap_findings(adapters[first], adapters[at])]
        groups.append((first, sorted(taken)))
        waiting = [at for at in waiting if at not in taken]
    groups.extend((at, [at]) for at in range(len(adapters)) if at not in able)
    groups.sort(key=lambda group: group[1][0])
    return tuple(
        SwapGroup(
            members=tuple(adapters[at].reference for at in taken),
            first=adapters[first].reference,
            target_rank=_target_rank([adapters[at] for at in taken]) if first in able else 0,
            why=_why(adapters, first, groups) if len(taken) == 1 else "",
        )
        for first, taken in groups
    )


def _biases(adapter: AdapterSide) -> int:
    return sum("+lora_bias" in target.kind for target in adapter.targets)


def _own_findings(adapter: AdapterSide) -> list[Finding]:
    """Why an adapter can share no slot with any other."""
    broken = [one for one in adapter.read if one.severity == "error"]
    return broken or swap_findings(adapter, adapter)


def _why(adapters: Sequence[AdapterSide], alone: int, groups: list[tuple[int, list[int]]]) -> str:
    own = _own_findings(adapters[alone])
    if own:
        return str(own[0])
    reasons = [swap_findings(adapters[first], adapters[alone]) for first, _ in groups if first != alone]
    reasons = [one for one in reasons if one]
    if not reasons:
        return "there is no other adapter"
    return str(min(reasons, key=len)[0])


def _target_rank(adapters: Sequence[AdapterSide]) -> int:
    """The least rank that holds all padded factors, and that the groups of all grouped convolutions divide."""
    targets = [target for one in adapters for target in one.targets if _kind(target) in PADDED]
    most = max((target.rank for target in targets), default=1)
    step = math.lcm(*(count for one in adapters for count in _convolution_groups(one)))
    return -(-most // step) * step


def _convolution_groups(adapter: AdapterSide) -> Iterator[int]:
    grouped = {target.module: target.rank for target in adapter.targets if "+grouped" in target.kind}
    for spec in adapter.layout:
        path, _, part = canonical_name(spec.name).rpartition(".lora_B")
        if part == ".weight" and path in grouped and len(spec.shape) > 1 and spec.shape[1]:
            yield grouped[path] // spec.shape[1]


def _tuner(slot: AdapterSide, incoming: AdapterSide) -> Iterator[Finding]:
    for side in (slot,) if incoming is slot else (slot, incoming):
        if not side.is_lora and side.config is not None:
            yield _error("peft_type", f"{side.reference}: only LoRA can be swapped", "LORA", side.config.peft_type)
        elif side.config is None:
            message = f"{side.reference} came without a configuration, and swapping reads it"
            yield _error("adapter_config.json", message, "a file", "nothing", "push it with its adapter_config.json")


def _options(slot: AdapterConfig, incoming: AdapterConfig) -> Iterator[Finding]:
    """What PEFT itself compares, and refuses (`CONFIG_KEYS_TO_CHECK`)."""
    pairs: tuple[tuple[str, object, object], ...] = (
        ("use_rslora", slot.use_rslora, incoming.use_rslora),
        ("lora_dropout", slot.lora_dropout or 0.0, incoming.lora_dropout or 0.0),
        ("alpha_pattern", slot.alpha_pattern, incoming.alpha_pattern),
        ("use_dora", slot.use_dora, incoming.use_dora),
        ("layer_replication", slot.layer_replication, incoming.layer_replication),
    )
    for key, expected, found in pairs:
        if expected != found:
            message = "the adapter in the slot has another value"
            mend = "use a slot of its own"
            if key == "lora_dropout":
                mend = "dropout does nothing in evaluation: write the slot's value into adapter_config.json"
            yield _error(key, message, str(expected)[:80], str(found)[:80], mend)


def _extras(side: AdapterSide) -> Iterator[Finding]:
    """What is more than two factors and a scaling: swapping fails on it, or leaves it behind for the next adapter."""
    config = side.config
    assert config is not None
    mend = "merge it, or load it the ordinary way"
    if config.use_dora:
        yield _error("use_dora", "magnitude vectors cannot be swapped", "false", "true", mend)
    init = config.init_lora_weights
    if init is not None and init not in PLAIN_INITS:
        message = "loading it changes the base's weights, which stay so for the next adapter"
        mended = "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        yield _error("init_lora_weights", message, "an init that leaves them", init[:80], mended)
    for key in _VARIANTS:
        if key != "layer_replication" and config.document.get(key):
            message = "only plain factors can be swapped"
            yield _error(key, message, "none", str(config.document[key])[:80], mend)
    for target in side.targets:
        kind, *flags = target.kind.split("+")
        if kind in ("full", "token", "bias") or "full" in flags or "base_bias" in flags:
            what = {"full": "a whole copy", "token": "trained rows", "bias": "a trained bias"}.get(kind)
            message = "only plain factors can be swapped; it would fail, or stay for the next adapter"
            yield _error(target.module, message, "factors", what or "the module's own weight or bias as well", mend)
        elif kind in ("attention", "parameter"):
            message = "a model with a LoRA on this kind of module cannot be prepared for another rank or scaling"
            what = "a MultiheadAttention" if kind == "attention" else "an expert's parameter"
            yield _error(target.module, message, "a linear or 2d convolution", what, mend)


def _targets(slot: AdapterSide, incoming: AdapterSide) -> Iterator[Finding]:
    places = {target.module: target for target in slot.targets if target.rank}
    if not places:
        yield _error("", f"{slot.reference} has no layers to swap into", "a LoRA", "none")
    for target in incoming.targets:
        if not target.rank:
            continue
        kind = _kind(target)
        if kind == "embedding":
            message = "PEFT cannot swap the factors of an embedding"
            yield _error(target.module, message, "a linear or 2d convolution", "an embedding", "use a slot of its own")
            continue
        place = places.get(target.module)
        if place is None:
            message = f"{slot.reference} has no LoRA on this module, and swapping adds none"
            yield _error(target.module, message, "a target of the slot", "none", "load the one with more targets first")
            continue
        sizes, found = ((one.in_features, one.out_features) for one in (place, target))
        if _kind(place) != kind or sizes != found:
            message = "the module has another form in the slot, and would be filled in part"
            yield _error(target.module, message, f"{_kind(place)} {sizes}", f"{kind} {found}")
        elif kind in _AS_THEY_ARE and place.rank != target.rank:
            message = "factors of this kind of convolution are not padded, so their rank cannot change"
            yield _error(target.module, message, str(place.rank), str(target.rank), "use a slot of its own")
        if "+lora_bias" in target.kind and "+lora_bias" not in place.kind:
            message = "the slot has no bias in its LoRA"
            yield _error(target.module, message, "no bias", "lora_bias", "load the one with lora_bias first")


def _scalings(incoming: AdapterSide) -> Iterator[Finding]:
    """PEFT looks patterns up under the name of the tensor, not of the module, and so finds none: every module gets
    lora_alpha / r. It raises nothing."""
    config = incoming.config
    assert config is not None
    if not (config.rank_pattern or config.alpha_pattern):
        return
    for target in incoming.targets:
        if not target.rank or _kind(target) == "embedding":
            continue
        right = target_scaling(config, target)
        for part in ("lora_A", "lora_B"):
            got = _scaling_when_swapped(config, f"base_model.model.{target.module}.{part}.default.weight")
            if right is None or got is None or not math.isclose(right, got, rel_tol=_EXACT):
                message = "swapping does not follow rank_pattern and alpha_pattern: this module's scaling is wrong then"
                found = "unknown" if got is None else f"{got:g}"
                expected = "unknown" if right is None else f"{right:g}"
                mend = "load it the ordinary way, or train it with one rank and alpha"
                yield _error(target.module, message, expected, found, mend)
                break


def _scaling_when_swapped(config: AdapterConfig, tensor: str) -> float | None:
    try:
        rank_key, alpha_key = config.rank_keys.find(tensor), config.alpha_keys.find(tensor)
    except Undecided:
        return None
    rank = config.r if rank_key is None else config.rank_pattern[rank_key]
    alpha = config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]
    if rank is None or alpha is None:
        return None
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _weights(slot: AdapterSide, incoming: AdapterSide) -> Iterator[Finding]:
    """Both were trained on the same weights, as far as these are recorded."""
    one, other = slot.weights, incoming.weights
    if one is None or other is None or one.reference == other.reference:
        return
    modules = {target.module for target in incoming.targets if target.rank}
    for name in sorted(one.digests.keys() & other.digests.keys()):
        if name.rpartition(".")[0] not in modules or one.digests[name] == other.digests[name]:
            continue
        rounded = one.rounded.get(name)
        if rounded is None or rounded != other.rounded.get(name):
            message = "the two were trained on different weights, and the model has one of them"
            yield _error(name, message, one.reference, other.reference, "use a model for each")
            return


def _kind(target: Target) -> str:
    return target.kind.partition("+")[0]


def _error(subject: str, message: str, expected: str = "", found: str = "", mend: str = "") -> Finding:
    return Finding(CODE, "error", subject, message, expected, found, mend or "load it the ordinary way")
