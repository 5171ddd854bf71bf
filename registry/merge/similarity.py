"""How alike the updates of two adapters are, module by module, before they are merged: angle, shared subspaces, and
signs that conflict. Norms and angles come from the factors alone; signs are looked at in rows of the dense updates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.core.errors import ShapeMismatch
from registry.merge.low_rank import LowRank, cosine_of, inner_product, norm

MOST_ELEMENTS = 1 << 20
"""Elements of one matrix whose signs are compared; of a larger one evenly spaced rows are."""


@dataclass(frozen=True)
class ModuleSimilarity:
    """Two updates of one module.

    Attributes:
        norms: Frobenius norms of both.
        inner: their inner product; `cosine` is it over both norms, None where one is zero.
        writes, reads: overlap of what they write to (columns, output space) and read from (rows, input space):
            ||Q_1^T Q_2||^2 over the smaller rank, 0 to 1; None where one is zero.
        by_chance: (writes, reads) that random subspaces of these ranks have on the average.
        conflict: share of the elements in which both are not zero whose signs differ; None where there are none.
        weighted_conflict: the same, each element counted with the smaller of both magnitudes.
        elements: how many signs were compared.
        sampled: whether these are not all.
    """

    path: str
    norms: tuple[float, float]
    inner: float
    writes: float | None
    reads: float | None
    by_chance: tuple[float, float]
    conflict: float | None
    weighted_conflict: float | None
    elements: int
    sampled: bool

    @property
    def cosine(self) -> float | None:
        return cosine_of(self.inner, *self.norms)


@dataclass(frozen=True)
class OverallSimilarity:
    """Two adapters: sums over all modules; a module that one of them alone changes counts in its norm.

    Attributes:
        writes, reads, conflict, weighted_conflict: means over the shared modules, each counted with the product of both
            norms there; None where they share none.
    """

    cosine: float | None
    writes: float | None
    reads: float | None
    conflict: float | None
    weighted_conflict: float | None


def compare_updates(path: str, x: LowRank, y: LowRank) -> ModuleSimilarity:
    """Compares two updates of one module.

    Args:
        x, y: (blocks, r, in) and (blocks, out, r), float64, the scaling in b.

    Raises:
        ShapeMismatch: they are of weights of different sizes.
    """
    if x.shape != y.shape:
        raise ShapeMismatch(
            f"{path}: updates of different sizes, (blocks, out, in): {x.shape} and {y.shape}; these adapters are of "
            "different bases"
        )
    conflict, weighted, elements = _sign_conflict(x, y)
    (writes, by_chance_w), (reads, by_chance_r) = (
        _overlap(one, other) for one, other in zip(_bases(x), _bases(y), strict=True)
    )
    blocks, rows, columns = x.shape
    return ModuleSimilarity(
        path,
        (norm(x), norm(y)),
        inner_product(x, y),
        writes,
        reads,
        (by_chance_w, by_chance_r),
        conflict,
        weighted,
        elements,
        elements < blocks * rows * columns,
    )


def overall(
    shared: Iterable[ModuleSimilarity], alone: tuple[Iterable[float], Iterable[float]] = ((), ())
) -> OverallSimilarity:
    """All modules together.

    Args:
        alone: norms of the updates of modules that only the first, and only the second, changes.
    """
    modules = list(shared)
    norms = [
        math.hypot(*(one.norms[side] for one in modules), *alone[side]) if modules or alone[side] else 0.0
        for side in (0, 1)
    ]
    inner = math.fsum(one.inner for one in modules)
    weights = [one.norms[0] * one.norms[1] for one in modules]

    def mean(values: list[float | None]) -> float | None:
        pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
        total = math.fsum(weight for _, weight in pairs)
        return math.fsum(value * weight for value, weight in pairs) / total if total else None

    return OverallSimilarity(
        cosine_of(inner, norms[0], norms[1]),
        mean([one.writes for one in modules]),
        mean([one.reads for one in modules]),
        mean([one.conflict for one in modules]),
        mean([one.weighted_conflict for one in modules]),
    )


def _bases(x: LowRank) -> tuple[list[Tensor], list[Tensor]]:
    """Orthonormal bases of column and row space of each block, in its numerical rank."""
    left, right = torch.linalg.qr(x.b), torch.linalg.qr(x.a.mT)
    u, s, vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    ranks = (s > torch.finfo(s.dtype).eps * max(x.shape[1:]) * s[:, :1]).sum(1).tolist()
    columns, rows = left.Q @ u, right.Q @ vh.mT
    return (
        [one[:, :rank] for one, rank in zip(columns, ranks, strict=True)],
        [one[:, :rank] for one, rank in zip(rows, ranks, strict=True)],
    )


def _overlap(x: list[Tensor], y: list[Tensor]) -> tuple[float | None, float]:
    """Mean over the blocks of ||Q_1^T Q_2||^2 / min(r_1, r_2), and that of random subspaces, max(r_1, r_2) / "
    "dimension."""
    found, by_chance = [], []
    for one, other in zip(x, y, strict=True):
        ranks = one.shape[1], other.shape[1]
        if min(ranks):
            found.append(float((one.mT @ other).square().sum()) / min(ranks))
        by_chance.append(max(ranks) / max(1, one.shape[0]))
    return (min(1.0, sum(found) / len(found)) if found else None), sum(by_chance) / len(by_chance)


def _sign_conflict(x: LowRank, y: LowRank) -> tuple[float | None, float | None, int]:
    """Share of conflicting signs, the same weighted, and the number of elements that were looked at."""
    blocks, rows, columns = x.shape
    step = max(1, -(-rows * columns * blocks // MOST_ELEMENTS))
    both = differing = 0
    magnitude = conflicting = 0.0
    elements = 0
    for block in range(blocks):
        picked = torch.arange(step // 2, rows, step)
        for part in torch.split(picked, max(1, (1 << 18) // columns)):
            one, other = x.b[block, part] @ x.a[block], y.b[block, part] @ y.a[block]
            elements += one.numel()
            least = torch.minimum(one.abs(), other.abs())
            apart = (one * other) < 0
            both += int(torch.count_nonzero(least))
            differing += int(torch.count_nonzero(apart))
            magnitude += float(least.sum())
            conflicting += float(least[apart].sum())
    if not both:
        return None, None, elements
    return differing / both, conflicting / magnitude if magnitude else None, elements
