"""DARE on the updates themselves: drop elements at random, rescale the rest; then add, or elect signs as TIES does."""

from __future__ import annotations

from torch import Tensor

from registry.merge.elementwise import merge_deltas
from registry.merge.group import Group
from registry.merge.method import method

_PAPER = "Yu et al. 2024, Language Models are Super Mario"


@method("dare_linear", form="dense", options=("density", "seed"), paper=_PAPER)
def dare_linear(group: Group) -> Tensor:
    """sum_i w_i mask_i x_i / density.

    Returns:
        (batch, out, in)
    """
    return merge_deltas("dare_linear", group)


@method("dare_ties", form="dense", options=("density", "majority", "seed"), paper=_PAPER)
def dare_ties(group: Group) -> Tensor:
    """TIES with mask_i x_i / density in place of the trimmed updates.

    Returns:
        (batch, out, in)
    """
    return merge_deltas("dare_ties", group)
