"""How a made adapter looks to PEFT: the names and shapes of its tensors, and a configuration that makes PEFT wrap
exactly these modules, each in its own rank and with the scaling 1. The inverse of `lora_modules`; nothing is read or
written here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from registry.core.adapter_config import AdapterConfig, adapter_config, is_off, rank_of
from registry.core.adapter_names import Target, canonical_name, pattern_paths, target_scaling
from registry.core.errors import InvalidInput, ShapeMismatch
from registry.core.layout import Layout
from registry.core.reference import shown
from registry.core.tensor_names import split_at_tuner, without_layers
from registry.merge.lora_modules import LoraModule
from registry.merge.low_rank import LowRank
from registry.merge.wrapping import agreed, rank_pattern, selection

PEFT_PREFIX = "base_model.model."
KINDS = ("linear", "conv1d", "conv2d", "conv3d", "embedding", "attention", "attention_out", "parameter")
_NO_LORA_BIAS = ("embedding", "parameter")
_MADE = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out", "lora_dropout", "bias"}
_KEPT = {
    *("auto_mapping", "layer_replication", "megatron_config", "megatron_core", "modules_to_save", "peft_version"),
    *("revision", "target_parameters", "task_type", "trainable_token_indices"),
}
"""Keys whose value stays where all sources have the same; of other keys only what is off stays."""


@dataclass(frozen=True, eq=False)
class MadeModule:
    """One module of an adapter that was computed.

    Attributes:
        path: in the base model, as `Target.module`.
        kind: one of `KINDS`: the first part of `Target.kind`; transformers' Conv1D is `linear`.
        factors: a (blocks, r, in * kernel), b (blocks, out, r), the scaling in them. Blocks are the groups of a
            convolution or the experts of a parameter; else one.
        kernel: of a convolution: the shape of one row of A, (in_channels, *kernel size).
        bias: (out,) that is added to what B gives (`lora_bias`).
        wrapper: of a `parameter`: path of PEFT's wrapper, like `experts` for `experts.down_proj`.
    """

    path: str
    kind: str
    factors: LowRank
    kernel: tuple[int, ...] = ()
    bias: Tensor | None = None
    wrapper: str = ""

    @property
    def rank(self) -> int:
        """What PEFT calls `r`: of all groups of a convolution together, of one expert of a parameter."""
        blocks, rank = self.factors.a.shape[:2]
        return rank if self.kind == "parameter" else blocks * rank


def made_module(module: LoraModule, layout: Layout, factors: LowRank, bias: Tensor | None = None) -> MadeModule:
    """The module of a source with other factors.

    Args:
        layout: of the source.
        factors: of the sizes that `factors_of` gives, in any rank.
    """
    kind = module.target.kind.partition("+")[0]
    kernel = layout.by_name[module.a].shape[1:] if kind.startswith("conv") else ()
    found = split_at_tuner(canonical_name(module.a))
    wrapper = found[0] if kind == "parameter" and found is not None else ""
    return MadeModule(module.target.module, kind, factors, kernel, bias, wrapper)


# ---------------------------------------------------------------- tensors


def peft_tensors(modules: Sequence[MadeModule], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an adapter, under the names that PEFT saves them by.

    Of a MultiheadAttention PEFT wraps both projections in one rank, so the one that is missing gets zeros, and the
    smaller rank is filled with zeros. With one bias every module gets one.

    Args:
        dtype: each number is rounded to it once.

    Raises:
        ShapeMismatch: factors that do not fit together, or the kernel.
        InvalidInput: PEFT cannot hold such modules in one adapter.
    """
    found: dict[str, Tensor] = {}
    for module in _complete(modules):
        for part, tensor in _parts(module):
            name = f"{PEFT_PREFIX}{_wrapped(module)}.{part}"
            if name in found:
                raise InvalidInput(
                    f"two parameters of the module {shown(_wrapped(module), 200)} would have the tensor {shown(part)}: "
                    "which one is which stands in no file of PEFT; merge adapters with the same target_parameters"
                )
            found[name] = tensor.detach().to(dtype).contiguous()
    return found


def _parts(module: MadeModule) -> Iterator[tuple[str, Tensor]]:
    a, b = module.factors.a, module.factors.b
    blocks, rank, columns = a.shape
    rows = b.shape[1]
    if module.kind == "embedding":
        yield "lora_embedding_A", a[0]
        yield "lora_embedding_B", b[0]
        return
    if module.kind == "parameter":
        # As PEFT lays experts out: A's rows block by block, B's columns one expert after the other.
        yield "lora_A.weight", a.reshape(blocks * rank, columns)
        yield "lora_B.weight", b.permute(1, 2, 0).reshape(rows, rank * blocks)
    elif module.kind.startswith("conv"):
        yield "lora_A.weight", a.reshape(blocks * rank, *module.kernel)
        yield "lora_B.weight", b.reshape(blocks * rows, rank, *(1 for _ in module.kernel[1:]))
    else:
        yield "lora_A.weight", a[0]
        yield "lora_B.weight", b[0]
    if module.bias is not None:
        yield "lora_B.bias", module.bias


def _wrapped(module: MadeModule) -> str:
    """The path at which PEFT has the module's factors."""
    if module.kind == "attention_out":
        owner, _, last = module.path.rpartition(".")
        return f"{owner}.base_layer.{last}"
    if module.kind == "parameter":
        return module.wrapper or module.path.rpartition(".")[0]
    return module.path


def _complete(modules: Sequence[MadeModule]) -> list[MadeModule]:
    """The modules as PEFT will have them: both projections of an attention, no rank of 0, biases everywhere or nowhere.

    Raises:
        ShapeMismatch, InvalidInput
    """
    for module in modules:
        _check(module)
    by_path = {module.path: module for module in modules}
    if len(by_path) != len(modules):
        twice = Counter(module.path for module in modules).most_common(1)[0][0]
        raise InvalidInput(f"the module {shown(twice, 200)} is made twice")
    for module in modules:
        if module.kind == "attention":
            width = module.factors.a.shape[2]
            by_path.setdefault(f"{module.path}.out_proj", _zeros(f"{module.path}.out_proj", "attention_out", width))
        elif module.kind == "attention_out":
            width, path = module.factors.a.shape[2], module.path.rpartition(".")[0]
            by_path.setdefault(path, _zeros(path, "attention", width))
    ranks: dict[str, int] = {}
    for module in by_path.values():
        ranks[_owner(module)] = max(1, ranks.get(_owner(module), 1), module.factors.a.shape[1])
    biased = any(module.bias is not None for module in modules)
    return [_filled(module, ranks[_owner(module)], biased) for module in by_path.values()]


def _check(module: MadeModule) -> None:
    a, b = module.factors.a, module.factors.b
    if module.kind not in KINDS:
        raise InvalidInput(
            f"{shown(module.path, 200)}: kind '{shown(module.kind)}'; expected one of {', '.join(KINDS)}"
        )
    fits = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
    several = module.kind == "parameter" or module.kind.startswith("conv")
    if not fits or (a.shape[0] != 1 and not several):
        raise ShapeMismatch(
            f"{shown(module.path, 200)}, {module.kind}: A {list(a.shape)} and B {list(b.shape)}; expected "
            "(blocks, r, in) and (blocks, out, r)" + ("" if several else " with one block")
        )
    if module.kind.startswith("conv") and math.prod(module.kernel) != a.shape[2]:
        raise ShapeMismatch(
            f"{shown(module.path, 200)}: a row of A has {a.shape[2]} numbers, its kernel {list(module.kernel)} has "
            f"{math.prod(module.kernel)}"
        )


def _zeros(path: str, kind: str, width: int) -> MadeModule:
    rows = 3 * width if kind == "attention" else width
    return MadeModule(path, kind, LowRank(torch.zeros(1, 1, width), torch.zeros(1, rows, 1)))


def _owner(module: MadeModule) -> str:
    """What shares one rank: an attention, or all parameters of a module."""
    if module.kind == "attention_out":
        return module.path.rpartition(".")[0]
    return _bare(_wrapped(module)) if module.kind == "parameter" else module.path


def _bare(path: str) -> str:
    return ".".join(without_layers(path.split(".")))


def _filled(module: MadeModule, rank: int, biased: bool) -> MadeModule:
    factors, bias = module.factors, module.bias
    missing = rank - factors.a.shape[1]
    if missing:
        pad = torch.nn.functional.pad
        factors = LowRank(pad(factors.a, (0, 0, 0, missing)), pad(factors.b, (0, missing)))
    if biased and module.kind in _NO_LORA_BIAS:
        raise InvalidInput(
            f"{shown(module.path, 200)} is an {module.kind}, for which PEFT knows no lora_bias, and other modules have "
            "one; leave the adapters with lora_bias out"
        )
    if biased and bias is None:
        bias = factors.b.new_zeros(factors.b.shape[0] * factors.b.shape[1])
    return replace(module, factors=factors, bias=bias)


# ---------------------------------------------------------------- configuration


def made_config(
    modules: Sequence[MadeModule],
    *,
    like: Sequence[AdapterConfig] = (),
    all_paths: Collection[str] | None = None,
    target_modules: Sequence[str] | None = None,
    base_model: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> AdapterConfig:
    """The configuration that goes with `peft_tensors` of the same modules.

    Args:
        like: of the sources: where all say the same (task, saved modules, replicated layers, ...), it stays; what
            concerns rank, scaling and variants never does.
        all_paths: of all modules of the base, those that hold others included; None: not known, and then names that
            select more than these modules in some other model cannot be told.
        target_modules: short names to try before those of the sources.
        base_model: for `base_model_name_or_path`.
        extra: keys that overrule what stands here.

    Raises:
        InvalidInput: no configuration of PEFT says this; and what `peft_tensors` raises.
    """
    complete = _complete(modules)
    if not complete:
        raise InvalidInput("an adapter without a module; there is nothing to write")
    document = _shared(like)
    has_parameter = any(module.kind == "parameter" for module in complete)
    biased = any(module.bias is not None for module in complete)
    document |= {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "fan_in_fan_out": not has_parameter and agreed(like, "fan_in_fan_out") is True,
        "lora_dropout": 0.0 if has_parameter else agreed(like, "lora_dropout") or 0.0,
        "bias": "none" if biased else agreed(like, "bias") or "none",
        **({"lora_bias": biased} if biased or any("lora_bias" in one.document for one in like) else {}),
        "target_parameters": _target_parameters(complete, like),
        **(extra or {}),
    }
    if not document["target_parameters"] and not any("target_parameters" in one.document for one in like):
        del document["target_parameters"]
    replicated = bool(document.get("layer_replication"))
    wanted = [one.path for one in complete if one.kind not in ("parameter", "attention_out")]
    document |= selection(wanted, like, None if replicated else all_paths, target_modules)
    slots = _slots(complete, adapter_config(document))
    counts = Counter(slots.values())
    rank = max(counts, key=lambda one: (counts[one], one))
    pattern = rank_pattern(slots, rank)
    document |= {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    config = adapter_config(document)
    _prove(complete, config)
    return config


def _shared(like: Sequence[AdapterConfig]) -> dict[str, Any]:
    """Keys with the same value in all sources, as far as they say nothing of what was computed anew."""
    return {
        key: value
        for key, value in (like[0].document.items() if like else ())
        if all(key in one.document and one.document[key] == value for one in like)
        and key not in _MADE
        and (key in _KEPT or is_off(value))
    }


def _target_parameters(modules: Iterable[MadeModule], like: Sequence[AdapterConfig]) -> list[str] | None:
    made = [module for module in modules if module.kind == "parameter"]
    if not made:
        return None
    named = {one.target_parameters for one in like if one.target_parameters}
    if len(named) == 1:
        return list(named.pop())
    if any(module.path == _wrapped(module) for module in made):
        raise InvalidInput(
            f"{shown(made[0].path, 200)}: which parameters of this module are changed stands in target_parameters, and "
            "the sources differ there; merge adapters with the same target_parameters"
        )
    return sorted(module.path for module in made)


# ---------------------------------------------------------------- in which rank


def _slots(modules: Iterable[MadeModule], config: AdapterConfig) -> dict[str, int]:
    """Rank by the path under which PEFT looks it up."""
    return {path: module.rank for module in modules for path in pattern_paths(module.path, module.kind, config)}


def _prove(modules: Iterable[MadeModule], config: AdapterConfig) -> None:
    """
    Raises:
        InvalidInput: PEFT would give a module another rank or scaling.
    """
    for module in modules:
        target = Target(module.path, module.rank, None, None, module.kind)
        ranks = {rank_of(config, path) for path in pattern_paths(module.path, module.kind, config)}
        if ranks != {module.rank} or target_scaling(config, target) != 1:
            raise InvalidInput(
                f"{shown(module.path, 200)}: expected rank {module.rank} with the scaling 1, and by the configuration "
                f"PEFT gives it rank {ranks} and {target_scaling(config, target)}; give one rank for all"
            )
