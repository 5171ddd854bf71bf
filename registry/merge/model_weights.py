"""What adapters make of one weight of a base: W + sum_i w_i delta_i, every delta from the base as it is, in float32 or
float64, rounded once. Tensors and numbers in, the new tensor and what the rounding cost out; no names of files, no I/O.
Large weights are worked on in blocks of rows, so that the only copy of their size is the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.core.adapter_config import AdapterConfig
from registry.core.adapter_names import Target, canonical_name
from registry.core.errors import InvalidInput, ShapeMismatch
from registry.core.reference import shown
from registry.core.tensor_names import split_at_tuner
from registry.merge.adding import MergedTensor, added, arithmetic_of, row_blocks
from registry.merge.lora_modules import LoraModule, factors_of, weight_obstacle
from registry.merge.low_rank import LowRank
from registry.merge.orientation import is_turned, oriented

__all__ = ["MergedTensor", "WeightUpdate", "added_update", "merged_bias", "merged_weight"]


@dataclass(frozen=True, eq=False)
class WeightUpdate:
    """What one adapter does to one module.

    Attributes:
        tensors: by the names in `module.tensors`; on any device.
        weight: the user's; may be negative or 0.
        config: of the adapter; its `peft_version` decides how square experts lie.
    """

    module: LoraModule
    tensors: Mapping[str, Tensor]
    weight: float
    config: AdapterConfig


def merged_weight(
    weight: Tensor,
    updates: Sequence[WeightUpdate],
    *,
    turned: bool | None = None,
    attention_out_times: int = 1,
    own_base: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> MergedTensor:
    """The weight with the updates of several adapters.

    A DoRA's delta is `m (W + s B A) / ||W + s B A|| - W`, the norm along the inputs of each output: the columns of a
    linear, all but the first dimension of a convolution, the vocabulary of an embedding. So several add up, whatever
    their order; PEFT's merge, and its forward in eval mode, apply one to what the other made.

    Args:
        weight: (out, in) of a linear, (in, out) of transformers' Conv1D, (out, in, kernel...) of a convolution,
            (vocabulary, dim) of an embedding, (3 dim, dim) `in_proj_weight` of an attention, a parameter of two or
            three dimensions. float16, bfloat16, float32 or float64; it is not changed.
        updates: at least one; all of one module.
        turned: whether the module is transformers' Conv1D, or one of experts that says `is_transposed`; only looked at
            where the shape is square. None: not known; then `fan_in_fan_out` tells it of a linear.
        attention_out_times: how often the update of an attention's `out_proj` is added: PEFT up to 0.21 adds it twice,
            in its forward pass too, so 2 gives what an adapter computed there.
        own_base: the weight is what the adapter's initialisation (PiSSA, OLoRA, ...) left, not what it began with.
        dtype: of the arithmetic, float32 or float64; a float64 weight is always computed in float64.
        device: where it is computed; by default where the weight is.

    Raises:
        InvalidInput: an update that is no change of this weight (the message says why), NaN or Inf in a source, or a
            result that the dtype cannot hold.
        ShapeMismatch: the update is of a weight of another shape.

    Source: `get_delta_weight` of PEFT 0.21's layers; Liu et al. 2024, DoRA, section 4.3.
    """
    path = _check(updates, attention_out_times, own_base=own_base)
    place, wide = arithmetic_of(weight, dtype, device)
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    gain: Tensor | None = None
    blocks, turn = 1, False
    for number, update in enumerate(updates, 1):
        factors = _finite_factors(update, number, len(updates), place, wide)
        columns = tuple(update.tensors[update.module.a].shape[1:])
        turn = is_turned(tuple(weight.shape), factors.shape, columns, update.module.target, update.config, turned)
        blocks = factors.shape[0]
        scaling = update.module.scaling or 0.0
        weighting = update.weight * _times(update.module.target, attention_out_times)
        b = factors.b * (weighting * scaling)
        if _has_dora(update):
            ratio = _dora_ratio(weight, update, LowRank(factors.a, factors.b * scaling), turn)
            b = b * ratio.to(wide)[:, None]
            gain = weighting * (ratio - 1) + (0 if gain is None else gain)
        lying = oriented(LowRank(factors.a, b), turn)
        lefts.append(lying.b)
        rights.append(lying.a)
    left, right = torch.cat(lefts, dim=2), torch.cat(rights, dim=1)
    of_outputs = None if gain is None else gain.to(wide)

    def rows(block: int, part: slice, base: Tensor) -> Tensor:
        if of_outputs is None:
            return left[block, part] @ right[block]
        stretched = base * (of_outputs if turn else of_outputs[part, None])
        return torch.addmm(stretched, left[block, part], right[block])

    return added(weight, rows, blocks, path, wide, place)


def added_update(
    weight: Tensor,
    update: Tensor | LowRank,
    *,
    module: LoraModule,
    config: AdapterConfig,
    turned: bool | None = None,
    attention_out_times: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> MergedTensor:
    """The weight with an update that is merged already, by another method than the sum.

    Args:
        weight: as for `merged_weight`.
        update: (blocks, out, in * kernel) or its factors, scaled and weighted, as `combine` gives it.
        module, config: of one of its sources: they say how the update lies in the weight.
        turned, attention_out_times, dtype, device: as for `merged_weight`.

    Raises:
        InvalidInput, ShapeMismatch: as for `merged_weight`.
    """
    path = shown(module.target.module, 200)
    place, wide = arithmetic_of(weight, dtype, device)
    _refuse_grouped(module.target)
    shape = update.shape if isinstance(update, LowRank) else tuple(update.shape)
    if len(shape) != 3:
        raise ShapeMismatch(f"{path}: an update is (blocks, out, in), found {list(shape)}")
    # A convolution's update has the kernel within its columns.
    inner = tuple(weight.shape[1:]) if weight.dim() > 2 and module.target.kind.startswith("conv") else (shape[2],)
    if math.prod(inner) != shape[2]:
        inner = (shape[2],)
    turn = is_turned(tuple(weight.shape), (shape[0], shape[1], shape[2]), inner, module.target, config, turned)
    times = _times(module.target, attention_out_times)
    if isinstance(update, LowRank):
        factors = oriented(LowRank(update.a.to(place, wide), update.b.to(place, wide) * times), turn)
        return added(
            weight, lambda block, part, _: factors.b[block, part] @ factors.a[block], shape[0], path, wide, place
        )
    dense = update.mT if turn else update
    return added(weight, lambda block, part, _: dense[block, part].to(place, wide) * times, shape[0], path, wide, place)


def merged_bias(
    bias: Tensor | None,
    updates: Sequence[WeightUpdate],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> MergedTensor:
    """The bias with those of the adapters' B (`lora_bias`): bias + sum_i w_i s_i b_i.

    Args:
        bias: (out,); None: the module has none.
        updates: as for `merged_weight`; those without such a bias add nothing. That of an attention's `out_proj` is
            added once, as PEFT does; that of its `in_proj` PEFT never uses, so it is zero, or refused here.

    Raises:
        InvalidInput: the module has no bias; NaN or Inf; a result that the dtype cannot hold.
        ShapeMismatch: a bias of another size.
    """
    having = [(one, _part(one, "lora_B.bias")) for one in updates]
    path = _path(updates)
    given = [(one, own) for one, own in having if own is not None]
    if given and bias is None:
        raise InvalidInput(
            f"{path}: the adapter has a bias (lora_bias), and the base's module has none to add it to: expected a bias "
            f"of {given[0][1].numel()} elements, found none; build the base with one, or train without lora_bias"
        )
    if bias is None:
        raise InvalidInput(f"{path}: neither the base nor an adapter has a bias")
    place, wide = arithmetic_of(bias, dtype, device)
    total = torch.zeros(bias.shape, dtype=wide, device=place)
    for update, own in given:
        _refuse(update, own_base=True)
        if update.module.target.kind.partition("+")[0] == "attention" and bool(own.any()):
            raise InvalidInput(f"{path}: PEFT never uses the bias of an attention's in_proj (lora_bias); leave it out")
        if own.shape != bias.shape:
            raise ShapeMismatch(
                f"{path}: the adapter's bias has the shape {list(own.shape)}, the base's {list(bias.shape)}"
            )
        if not bool(torch.isfinite(own).all()):
            raise InvalidInput(_not_finite(f"{path}: the bias of lora_B"))
        total += own.detach().to(place, wide) * (update.weight * (update.module.scaling or 0.0))
    column = total[None, :, None]
    return added(bias, lambda block, part, _: column[block, part], 1, path, wide, place)


# ---------------------------------------------------------------- what is refused


def _check(updates: Sequence[WeightUpdate], times: int, *, own_base: bool) -> str:
    path = _path(updates)
    if times not in (1, 2):
        raise InvalidInput(f"attention_out_times is {times}; expected 1, or 2 as PEFT up to 0.21 adds it")
    if len({update.module.target.kind.partition("+")[0] for update in updates}) > 1:
        raise ShapeMismatch(f"{path}: the adapters take it for modules of different kinds; they are of different bases")
    for update in updates:
        _refuse(update, own_base=own_base)
        _refuse_grouped(update.module.target)
    return path


def _path(updates: Sequence[WeightUpdate]) -> str:
    if not updates:
        raise ValueError("no update is given; expected at least one")
    return shown(updates[0].module.target.module, 200)


def _refuse(update: WeightUpdate, *, own_base: bool) -> None:
    path = shown(update.module.target.module, 200)
    if not math.isfinite(update.weight):
        raise InvalidInput(f"{path}: the weight of an adapter is {update.weight}; expected a finite number")
    obstacle = weight_obstacle(update.module, update.config, own_base=own_base)
    if obstacle:
        raise InvalidInput(f"{path} cannot be merged into a base: {obstacle}")


def _refuse_grouped(target: Target) -> None:
    if "grouped" in target.kind.split("+"):
        raise InvalidInput(
            f"{shown(target.module, 200)} cannot be merged into a base: it is a grouped convolution, and PEFT's A "
            "takes the channels of all groups, so the update is no weight of such a convolution; keep the adapter "
            "beside it"
        )


def _not_finite(what: str) -> str:
    return f"{what} holds NaN or Inf; leave that version out, or train it again from its last finite checkpoint"


def _finite_factors(update: WeightUpdate, number: int, of: int, place: torch.device, wide: torch.dtype) -> LowRank:
    found = factors_of(update.module, update.tensors)
    factors = LowRank(found.a.detach().to(place, wide), found.b.detach().to(place, wide))
    if not bool(torch.isfinite(factors.a).all() & torch.isfinite(factors.b).all()):
        which = f" (adapter {number} of {of})" if of > 1 else ""
        raise InvalidInput(_not_finite(f"{shown(update.module.target.module, 200)}: a factor{which}"))
    return factors


def _times(target: Target, attention_out_times: int) -> int:
    return attention_out_times if target.kind.partition("+")[0] == "attention_out" else 1


# ---------------------------------------------------------------- DoRA


def _part(update: WeightUpdate, part: str) -> Tensor | None:
    """A tensor of the module besides its factors, by its name less wrappers and adapter name."""
    for name in update.module.tensors:
        found = split_at_tuner(canonical_name(name))
        if found is not None and ".".join(filter(None, found[1:])) == part:
            return update.tensors[name]
    return None


def _has_dora(update: WeightUpdate) -> bool:
    own = "dora" in update.module.target.kind.split("+")
    if own != update.config.use_dora:
        found = "has a lora_magnitude_vector" if own else "has no lora_magnitude_vector"
        raise InvalidInput(
            f"{shown(update.module.target.module, 200)} {found}, and use_dora is {update.config.use_dora}; correct the "
            "configuration"
        )
    return own


def _dora_ratio(weight: Tensor, update: WeightUpdate, factors: LowRank, turn: bool) -> Tensor:
    """(out,) magnitude over norm, in float64.

    Args:
        factors: scaled, not weighted.
    """
    path = shown(update.module.target.module, 200)
    blocks, out, _ = factors.shape
    if blocks != 1:
        raise InvalidInput(f"{path}: PEFT has no DoRA of several experts, so what it computes is not known")
    found = _part(update, "lora_magnitude_vector")
    if found is None or found.numel() != out:
        size = "none" if found is None else str(found.numel())
        raise ShapeMismatch(f"{path}: expected a magnitude of {out} elements, found {size}")
    if not bool(torch.isfinite(found).all()):
        raise InvalidInput(_not_finite(f"{path}: the magnitude"))
    magnitude = found.detach().reshape(-1).to(factors.b.device, torch.float64)
    return magnitude / _norms(weight, oriented(factors, turn), turn, path)


def _norms(weight: Tensor, update: LowRank, turn: bool, path: str) -> Tensor:
    """(out,) norms of W + s B A along its inputs, in float64, a block of rows at a time.

    Args:
        update: as the weight is stored.
    """
    _, rows, columns = update.shape
    place, wide = update.b.device, update.b.dtype
    base = weight.detach().reshape(rows, columns)
    squares = torch.zeros(columns if turn else rows, dtype=torch.float64, device=place)
    for part in row_blocks(rows, columns, place):
        moved = torch.addmm(base[part].to(place, wide), update.b[0, part], update.a[0])
        norms = torch.linalg.vector_norm(moved, dim=0 if turn else 1, dtype=torch.float64).square()
        if turn:
            squares += norms
        else:
            squares[part] = norms
    if bool((squares == 0).any()):
        raise InvalidInput(
            f"{path}: DoRA divides by the norm of what each output takes, and one of them is 0; no weight computes that"
        )
    return squares.sqrt()
