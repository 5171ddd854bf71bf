"""KnOTS: a common SVD aligns the updates, and an elementwise method merges what is left of each. The SVD of all dense
updates side by side comes from the factors, through a matrix of the size of the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from registry.merge.elementwise import merge_elements
from registry.merge.group import Group
from registry.merge.low_rank import LowRank
from registry.merge.method import method


@method(
    "knots",
    form="factors",
    options=("density", "majority", "inner", "seed"),
    paper="Stoica et al. 2024, Model merging with SVD to tie the KnOTS",
)
def knots(group: Group) -> LowRank:
    """[dW_1 | ... | dW_n] = U S [V_1^T | ... | V_n^T], merged to U S f(V_1^T, ..., V_n^T), f being the method that
    `options.inner` names, with the weights. In the sum of the ranks, or less where `out` and `in` allow no more.

    Singular values that are zero but for rounding are left out, as the authors' code leaves out small ones: their
    vectors are arbitrary, and f would count their elements.
    """
    u, s, aligned = _common_svd(group)
    merged = torch.zeros_like(aligned[0])
    ranks = _numerical_ranks(s)
    for rank in sorted(set(ranks) - {0}):  # most often one
        which = [matrix for matrix, own in enumerate(ranks) if own == rank]
        merged[which, :rank] = merge_elements(
            group.options.inner,
            # Indexing by a list copies, so that what is overwritten is no one else's.
            (one[which][:, :rank].contiguous() for one in aligned),
            group.weights[:, which],
            options=group.options,
            sources=group.sources,
            keys=[group.keys[matrix] for matrix in which],
        )
    return LowRank(merged, u * s[:, None, :])


def _common_svd(group: Group) -> tuple[Tensor, Tensor, list[Tensor]]:
    """U (batch, out, R), S (batch, R), and of each source V_i^T (batch, R, in). The largest element of a column of U is
    positive.

    With B = [s_1 B_1 | ...] = Q R and A_i^T = Q_i R_i, the dense updates side by side are
    Q (R blockdiag(R_i^T)) blockdiag(Q_i^T): what is in the first brackets has their singular values.
    """
    ranks = [one.a.shape[1] for one in group.updates]
    q, r = torch.linalg.qr(torch.cat([group.scaled_b(source) for source in range(len(ranks))], dim=2))
    rights = [torch.linalg.qr(one.a.mT) for one in group.updates]
    core = torch.cat([left @ right.R.mT for left, right in zip(r.split(ranks, dim=2), rights, strict=True)], dim=2)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    u = q @ u
    # An SVD leaves the sign of each pair of vectors open, and an even vote of signs is decided for plus.
    sign = torch.take_along_dim(u, u.abs().argmax(1, keepdim=True), dim=1).sign()
    u, vh = u * sign, vh * sign.mT
    parts = vh.split([right.R.shape[1] for right in rights], dim=2)
    return u, s, [part @ right.Q.mT for part, right in zip(parts, rights, strict=True)]


def _numerical_ranks(s: Tensor) -> list[int]:
    rounding = torch.finfo(s.dtype).eps * (16 + s.shape[1])
    ranks: list[int] = (s > rounding * s[:, :1]).sum(1).tolist()
    return ranks
