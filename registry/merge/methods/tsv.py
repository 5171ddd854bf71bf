"""TSV-M: the singular vectors of all updates, made orthogonal to each other before the updates are added. All of it
comes from the factors; no dense update is made."""

from __future__ import annotations

import torch
from torch import Tensor

from registry.merge.group import Group
from registry.merge.low_rank import LowRank
from registry.merge.method import method


@method("tsv", form="factors", paper="Gargiulo et al. 2024, Task Singular Vectors")
def tsv(group: Group) -> LowRank:
    """U S V^T, where U and V are the orthonormal matrices nearest to [U_1 | ...] and [V_1 | ...], and S has all of
    w_i S_i, of the SVDs dW_i = U_i S_i V_i^T. All r_i singular values of a source are kept, where the paper keeps 1 / n
    of those of a full matrix. In the sum of the ranks.

    A weight multiplies S_i alone: a source of weight 0 still has its directions, and a zero update has none. Where
    directions coincide (the same update twice) no nearest matrix is unique; the one of least norm is taken.
    """
    triples = [_svd(group.scaled_b(source), one.a) for source, one in enumerate(group.updates)]
    values = torch.cat([s * weight[:, None] for (_, s, _), weight in zip(triples, group.weights, strict=True)], dim=1)
    u = _nearest_orthonormal(torch.cat([u for u, _, _ in triples], dim=2))
    v = _nearest_orthonormal(torch.cat([v for _, _, v in triples], dim=2))
    return LowRank(v.mT.contiguous(), u * values[:, None, :])


def _svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (batch, out, k), S (batch, k), V (batch, in, k) of b @ a, k = min(out, r, in). Vectors of singular values that
    are zero but for rounding are arbitrary, and set to zero."""
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    real = _nonzero(s)[:, None, :]
    return left.Q @ u * real, s, right.Q @ vh.mT * real


def _nearest_orthonormal(x: Tensor) -> Tensor:
    """P Q^T for x = P D Q^T, (batch, m, R): with orthonormal columns, or rows where R is above m, in the span of x."""
    q, r = torch.linalg.qr(x)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    nearest: Tensor = q @ ((u * _nonzero(s)[:, None, :]) @ vh)
    return nearest


def _nonzero(s: Tensor) -> Tensor:
    """(batch, k), 1 or 0: which singular values are more than rounding."""
    rounding = torch.finfo(s.dtype).eps * (16 + s.shape[1])
    return (s > rounding * s[:, :1]).to(s.dtype)
