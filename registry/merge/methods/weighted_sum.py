"""The weighted sum of the updates, exactly: as it is, or to be cut to a rank."""

from __future__ import annotations

from registry.merge.group import Group
from registry.merge.low_rank import LowRank
from registry.merge.method import method


@method("cat", form="factors", exact=True, paper="Prabhakar et al. 2024, LoRA Soups")
def cat(group: Group) -> LowRank:
    """sum_i w_i s_i B_i A_i as [w_1 s_1 B_1 | ...] [A_1; ...]: no arithmetic but the scaling of B."""
    return group.weighted_sum()


@method("svd", form="factors", exact=True, paper="Eckart and Young 1936")
def svd(group: Group) -> LowRank:
    """The same sum; the caller cuts it to the rank or the energy that was asked for, by its SVD."""
    return group.weighted_sum()
