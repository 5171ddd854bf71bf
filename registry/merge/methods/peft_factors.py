"""What PEFT's add_weighted_adapter does under these names: it merges the A's apart from the B's. The product of two
such sums has terms B_i A_j of different sources, so it is not the weighted sum; these are here for parity."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from registry.core.errors import ShapeMismatch
from registry.core.reference import shown
from registry.merge.elementwise import merge_elements
from registry.merge.group import Group, Inner
from registry.merge.low_rank import LowRank
from registry.merge.method import method


@method("linear", form="factors", factor_wise=True, paper="PEFT's linear")
def linear(group: Group) -> LowRank:
    """(sum_i sqrt|w_i s_i| B_i) (sum_i +-sqrt|w_i s_i| A_i)."""
    return _merge_factors(group, "linear")


@method("ties_factors", form="factors", options=("density", "majority"), factor_wise=True, paper="PEFT's ties")
def ties_factors(group: Group) -> LowRank:
    """TIES on the A's, and on the B's."""
    return _merge_factors(group, "ties")


@method(
    "dare_linear_factors", form="factors", options=("density", "seed"), factor_wise=True, paper="PEFT's dare_linear"
)
def dare_linear_factors(group: Group) -> LowRank:
    """DARE and a sum, on the A's, and on the B's."""
    return _merge_factors(group, "dare_linear")


@method(
    "dare_ties_factors",
    form="factors",
    options=("density", "majority", "seed"),
    factor_wise=True,
    paper="PEFT's dare_ties",
)
def dare_ties_factors(group: Group) -> LowRank:
    """DARE and TIES' signs, on the A's, and on the B's."""
    return _merge_factors(group, "dare_ties")


@method(
    "magnitude_prune_factors", form="factors", options=("density",), factor_wise=True, paper="PEFT's magnitude_prune"
)
def magnitude_prune_factors(group: Group) -> LowRank:
    """The sum of the trimmed A's, and of the trimmed B's."""
    return _merge_factors(group, "magnitude_prune")


def _merge_factors(group: Group, how: Inner | Literal["linear"]) -> LowRank:
    """Both factors with the square root of |w s|, so that their product has it whole; A with its sign.

    Raises:
        ShapeMismatch: two sources are of different ranks.
    """
    ranks = [one.a.shape[1] for one in group.updates]
    for source, rank in zip(group.sources, ranks, strict=True):
        if rank != ranks[0]:
            raise ShapeMismatch(
                f"{shown(group.keys[0], 200)}: PEFT's {how} merges factors element by element, so all sources need one "
                f"rank; source {group.sources[0] + 1} has {ranks[0]}, source {source + 1} has {rank}; take a method "
                "that works on the updates, such as cat"
            )
    root = group.coefficients.abs().sqrt()

    def merged(factors: list[Tensor], weights: Tensor, part: str) -> Tensor:
        copies = (one.clone(memory_format=torch.contiguous_format) for one in factors)
        return merge_elements(
            how, copies, weights, options=group.options, sources=group.sources, keys=group.keys, part=part
        )

    a = merged([one.a for one in group.updates], root.copysign(group.coefficients), "A")
    return LowRank(a, merged([one.b for one in group.updates], root, "B"))
