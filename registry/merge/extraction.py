"""What a fine-tuning did to one weight, as a module of an adapter: the difference of two weights, laid as PEFT lays
the update of such a module, cut to a rank, rounded, and held against the difference. Tensors in, factors and numbers
out; nothing is read here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.core.errors import InvalidInput, ShapeMismatch
from registry.core.model_form import Module
from registry.core.reference import shown
from registry.merge.adapter_form import MadeModule
from registry.merge.compress import RankChoice, cut_dense
from registry.merge.low_rank import LowRank

WEIGHTS = {
    **dict.fromkeys(("linear", "transformers_conv1d", "conv1d", "conv2d", "conv3d", "embedding", "matrix"), "weight"),
    "attention": "in_proj_weight",
}
"""Kinds of modules that an update can be extracted for -> the parameter that it changes. A `matrix`, of which only the
name and shape are known, is taken for a linear."""


@dataclass(frozen=True, eq=False)
class Extracted:
    """One module, extracted.

    Attributes:
        module: in the dtype that it is stored in.
        rank: of one block.
        norm: Frobenius norm of the difference of the weights.
        error: of the stored product to that difference.
    """

    module: MadeModule
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class Shape:
    """How the update of a module lies in its weight.

    Attributes:
        kind: of the adapter's module.
        blocks: groups of a convolution.
        rows, columns: (out, in * kernel) of one block of the weight; of its transpose where it is `turned`.
        kernel: of a convolution in PEFT's A, which takes the channels of all groups: (in, kernel...).
        turned: the weight is stored as the transpose of the update.
    """

    kind: str
    blocks: int
    rows: int
    columns: int
    kernel: tuple[int, ...] = ()
    turned: bool = False


def update_shape_of(module: Module, *, attention_out: bool = False) -> Shape:
    """How PEFT lays the update of a module.

    Args:
        module: of a kind in `WEIGHTS`.
        attention_out: it is the out_proj of torch's MultiheadAttention.

    Raises:
        ShapeMismatch: its weight has not the shape of its kind.
    """
    parameter = module.parameter(WEIGHTS[module.kind])
    shape = () if parameter is None else parameter.shape
    if module.kind.startswith("conv"):
        dimensions, groups = int(module.kind[4]), module.groups
        if len(shape) == dimensions + 2 and groups > 0 and shape[0] % groups == 0 and math.prod(shape) > 0:
            kernel = (shape[1] * groups, *shape[2:])
            return Shape(module.kind, groups, shape[0] // groups, math.prod(shape[1:]), kernel)
    elif len(shape) == 2 and math.prod(shape) > 0:
        turned = module.kind in ("transformers_conv1d", "embedding")
        rows, columns = (shape[1], shape[0]) if turned else shape
        kind = module.kind if module.kind in ("embedding", "attention") else "linear"
        return Shape("attention_out" if attention_out else kind, 1, rows, columns, turned=turned)
    raise ShapeMismatch(f"{shown(module.path, 200)}: a {module.kind} has no weight of the shape {list(shape)}")


def difference(base: Tensor, tuned: Tensor, *, dtype: torch.dtype, device: str, name: str) -> Tensor:
    """The tuned weight less that of the base, each element in `dtype` before it is subtracted.

    Args:
        name: of the tensor, for messages.

    Raises:
        InvalidInput: NaN or Inf in either, or in the difference.
    """
    delta = tuned.to(device, dtype, copy=True)
    delta -= base.to(device, dtype)
    if not bool(torch.isfinite(delta).all()):
        for what, one in (("the base", base), ("the checkpoint", tuned)):
            if not bool(torch.isfinite(one).all()):
                raise InvalidInput(
                    f"{shown(name, 200)} holds NaN or Inf in {what}; extract from another checkpoint, or choose other "
                    "modules"
                )
        raise InvalidInput(f"{shown(name, 200)}: the difference is beyond {dtype}; extract in float64 (precise)")
    return delta


def extract_module(
    path: str,
    shape: Shape,
    delta: Tensor,
    choice: RankChoice,
    *,
    dtype: torch.dtype = torch.float32,
    times: int = 1,
) -> Extracted:
    """The best factors of a difference of weights in some rank.

    Args:
        path: of the module.
        shape: of `update_shape_of`.
        delta: of `difference`, in the shape of the weight.
        choice: each group of a convolution is cut by itself, and all get the largest of their ranks.
        dtype: that the factors are rounded to, once.
        times: how often the product is added to the weight: PEFT up to 0.21 adds that of an attention's out_proj twice.

    Raises:
        InvalidInput: a factor is beyond `dtype`.
    """
    laid = delta.T if shape.turned else delta
    matrices = laid.reshape(shape.blocks, shape.rows, shape.columns)
    cut = cut_dense(matrices, choice)
    a, b = (one.to(dtype) for one in (cut.a, cut.b / times))
    if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        raise InvalidInput(
            f"{shown(path, 200)}: its factors are beyond {str(dtype).removeprefix('torch.')}; ask for f32"
        )
    off = torch.baddbmm(matrices, b.to(matrices.dtype), a.to(matrices.dtype), alpha=-times)
    factors = LowRank(_among_all_channels(a, shape).cpu(), b.cpu())
    return Extracted(
        MadeModule(path, shape.kind, factors, shape.kernel),
        a.shape[1],
        float(torch.linalg.vector_norm(matrices, dtype=torch.float64)),
        float(torch.linalg.vector_norm(off, dtype=torch.float64)),
    )


def _among_all_channels(a: Tensor, shape: Shape) -> Tensor:
    """A for the channels of all groups: the weight of a grouped convolution sees those of its own, PEFT's A all."""
    if shape.blocks == 1:
        return a
    rank = a.shape[1]
    wide = a.new_zeros(shape.blocks, rank, shape.blocks, shape.columns)
    for block in range(shape.blocks):
        wide[block, :, block] = a[block]
    return wide.reshape(shape.blocks, rank, shape.blocks * shape.columns)
