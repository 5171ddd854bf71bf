"""The modules of a LoRA adapter with the tensors that make each one's update, and whether that update is
`scaling * B @ A` at all: DoRA and some other variants compute something else, or change the base weight as well. Names,
shapes and configuration only; `update_of` is the one step to tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.core.adapter_config import AdapterConfig, rank_of, unknown_keys
from registry.core.adapter_names import Target, canonical_name, target_scaling, targets_of
from registry.core.config_fields import kind_of
from registry.core.content_digest import PLAIN_INITS
from registry.core.layout import Layout
from registry.core.reference import shown
from registry.core.tensor_names import split_at_tuner, without_layers

if TYPE_CHECKING:
    from torch import Tensor

    from registry.merge.low_rank import LowRank

_A = ("lora_A.weight", "lora_A", "lora_embedding_A")
_B = ("lora_B.weight", "lora_B", "lora_embedding_B")
_VARIANTS = {
    "use_dora": "DoRA scales the whole weight by a magnitude",
    "kasa_config": "KaSA changes the base weight as well",
    "arrow_config": "Arrow routes between several adapters",
    "monteclora_config": "MonteCLoRA samples its factors",
    "use_bdlora": "BD-LoRA has block diagonal factors",
    "use_qalora": "QA-LoRA pools the input before A",
}
_OF_A_WEIGHT = {
    "alora_invocation_tokens": "aLoRA works after certain tokens alone",
    "layer_replication": "layer_replication has several layers of one weight, each with its own update",
}
"""What stands in the way of a change of the base's weight, and is none of the update."""
_FLAGS = {"use_dora": "dora", "kasa_config": "kasa"}
"""What shows of an option in the kind of a target."""


@dataclass(frozen=True)
class LoraModule:
    """One module that a LoRA changes by a pair of factors.

    Attributes:
        scaling: None where alpha is unknown.
        a, b: names of the factors, as they stand in the layout.
        tensors: names of all tensors of the module's LoRA, the factors among them.
        blocks: how many products make the update: groups of a convolution, experts of a parameter; else 1.
        obstacle: why the change of the weight is not `scaling * B @ A`; empty where it is.
    """

    target: Target
    scaling: float | None
    a: str
    b: str
    tensors: tuple[str, ...]
    blocks: int
    obstacle: str


def lora_modules(layout: Layout, config: AdapterConfig | None) -> dict[str, LoraModule]:
    """The modules of an adapter that have factors, by the path of their target, in its order.

    Whole copies, biases and tokens are no such modules; a module with missing or contradictory factors is left out
    (`targets_of` has findings for it), and so is all of another tuner.
    """
    targets = {target.module: target for target in targets_of(layout, config)[0] if target.rank}
    parts: dict[str, dict[str, str]] = {}
    for spec in layout:
        found = split_at_tuner(canonical_name(spec.name))
        if found is not None and found[1].startswith("lora_"):
            path, container, rest = found
            parts.setdefault(path, {}).setdefault(f"{container}.{rest}" if rest else container, spec.name)
    modules = {}
    for path, names in parts.items():
        target = _target_of(path, targets)
        a, b = (next((names[part] for part in factor if part in names), None) for factor in (_A, _B))
        if target is None or a is None or b is None:
            continue
        scaling = None if config is None else target_scaling(config, target)
        modules[target.module] = LoraModule(
            target,
            scaling,
            a,
            b,
            tuple(names.values()),
            _blocks(target, layout.by_name[a].shape, layout.by_name[b].shape),
            _obstacle(target, scaling, config),
        )
    return {module: modules[module] for module in targets if module in modules}


def update_of(module: LoraModule, tensors: Mapping[str, Tensor]) -> LowRank:
    """The module's update; that of an embedding, of transformers' Conv1D and of experts is transposed or stacked
    otherwise than the weight, and a convolution's has one row for an output channel.

    Args:
        module: one without obstacle.
        tensors: by their names in the layout.
    """
    from registry.merge.low_rank import low_rank

    if module.obstacle or module.scaling is None:
        raise ValueError(f"the update of {module.target.module} is no product: {module.obstacle}")
    factors = factors_of(module, tensors)
    return low_rank(factors.a, factors.b, scaling=module.scaling)


def factors_of(module: LoraModule, tensors: Mapping[str, Tensor]) -> LowRank:
    """The module's factors as they are, in their dtype and without the scaling: a (blocks, r, in * kernel), b (blocks,
    out, r).

    Args:
        tensors: by their names in the layout.
    """
    from registry.merge.low_rank import LowRank

    a, b = tensors[module.a], tensors[module.b]
    if module.target.kind.startswith("parameter"):
        # PEFT lays the experts out in A's rows block by block, and in B's columns one after the other.
        b = b.reshape(b.shape[0], -1, module.blocks).permute(2, 0, 1)
    else:
        b = b.reshape(module.blocks, b.shape[0] // module.blocks, -1)
    return LowRank(a.reshape(module.blocks, a.shape[0] // module.blocks, -1), b)


def update_shape(module: LoraModule, layout: Layout) -> tuple[int, int, int, int]:
    """(blocks, out, in * kernel, rank of a block) of the factors that `factors_of` gives, from the layout alone."""
    a, b = layout.by_name[module.a].shape, layout.by_name[module.b].shape
    columns = math.prod(a[1:])
    rows = b[0] if module.target.kind.startswith("parameter") else b[0] // module.blocks
    return module.blocks, rows, columns, a[0] // module.blocks


def _target_of(path: str, targets: Mapping[str, Target]) -> Target | None:
    """The target whose factors stand below a path; a parameter's has the parameter's name behind its module."""
    bare = ".".join(without_layers(path.split(".")))
    for name in (path, bare):
        if name in targets:
            return targets[name]
    below = (one for one in targets.values() if one.kind.startswith("parameter"))
    return next((one for one in below if one.module.rpartition(".")[0] == bare), None)


def _blocks(target: Target, a: tuple[int, ...], b: tuple[int, ...]) -> int:
    kind, *flags = target.kind.split("+")
    if kind == "parameter":
        return a[0] // target.rank
    return a[0] // b[1] if "grouped" in flags else 1


def _obstacle(target: Target, scaling: float | None, config: AdapterConfig | None) -> str:
    flags = target.kind.split("+")
    if config is None:
        return "lora_alpha is unknown: the adapter came without a configuration"
    for option, why in _VARIANTS.items():
        if config.document.get(option) or _FLAGS.get(option) in flags:
            return why
    return _obstacle_of_any_variant(target, scaling, config, own_base=False)


def weight_obstacle(module: LoraModule, config: AdapterConfig, *, own_base: bool = False) -> str:
    """Why the module's new weight is not known from its base's weight and its tensors; empty where it is, which is so
    of DoRA as well.

    Args:
        own_base: the base's weights are those that the adapter's initialisation left, not those that it began with.
    """
    flags = module.target.kind.split("+")
    for option, why in (_VARIANTS | _OF_A_WEIGHT).items():
        if option != "use_dora" and (config.document.get(option) or _FLAGS.get(option) in flags):
            return why
    return _obstacle_of_any_variant(module.target, module.scaling, config, own_base=own_base)


def _obstacle_of_any_variant(target: Target, scaling: float | None, config: AdapterConfig, *, own_base: bool) -> str:
    init = config.init_lora_weights
    if init is not None and init not in PLAIN_INITS and not own_base:
        return f"init_lora_weights {shown(init)} changed the base weight as well"
    for key, value in unknown_keys(config).items():
        if value:
            return f"the option {shown(key)} ({kind_of(value)}) is not known"
    if scaling is None:
        return "lora_alpha is unknown"
    if target.kind.partition("+")[0] == "parameter" and rank_of(config, target.module) is None:
        return "the rank of one expert is unknown"
    return ""
