"""The sum of the updates without their small elements."""

from __future__ import annotations

from torch import Tensor

from registry.merge.elementwise import merge_deltas
from registry.merge.group import Group
from registry.merge.method import method


@method("magnitude_prune", form="dense", options=("density",), paper="PEFT's magnitude_prune_svd")
def magnitude_prune(group: Group) -> Tensor:
    """sum_i w_i trim(x_i).

    Returns:
        (batch, out, in)
    """
    return merge_deltas("magnitude_prune", group)
