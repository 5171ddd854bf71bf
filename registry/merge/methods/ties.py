"""TIES on the updates themselves: trim, elect a sign, average what agrees."""

from __future__ import annotations

from torch import Tensor

from registry.merge.elementwise import merge_deltas
from registry.merge.group import Group
from registry.merge.method import method


@method("ties", form="dense", options=("density", "majority"), paper="Yadav et al. 2023, TIES-Merging")
def ties(group: Group) -> Tensor:
    """Of each element the mean of w_i x_i over the sources that have the elected sign. They vote without their weights,
    as in the paper and in PEFT's ties_svd.

    Returns:
        (batch, out, in)
    """
    return merge_deltas("ties", group)
