"""How alike the updates of two adapters are, module by module, before they are merged: angle, shared subspaces, and
signs that conflict. Norms and angles come from the factors alone; signs are looked at in rows of the dense updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.core.errors import ShapeMismatch
from registry.merge.low_rank import LowRank, cosine_of, inner_product

MOST_ELEMENTS = 1 << 20
"""Elements of one matrix whose signs are all compared; of a larger one evenly spaced rows are."""
SAMPLED_ELEMENTS = 1 << 19
"""Elements of these rows, about. `compare_updates` and `measured` of both took 63 ms at 4096 x 4096, 109 ms at 11008 x
4096 and 89 ms at 4096 x 11008 for random factors of r=64 on one core of a CPU, which makes 18 s for a pair at 7B."""


@dataclass(frozen=True, eq=False)
class MeasuredUpdate:
    """One update with what every comparison needs of it. Made by `measured`.

    Attributes:
        norm: Frobenius norm; 0 where all that is left of the product is rounding, NaN where it is not finite.
        columns, rows: orthonormal bases of its output and input space, (out, rank) and (in, rank) for each block; of
            rank 0 where it is zero or not finite.
    """

    update: LowRank
    norm: float
    columns: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


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
        of_elements: how many there are.
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
    of_elements: int

    @property
    def cosine(self) -> float | None:
        return cosine_of(self.inner, *self.norms)

    @property
    def sampled(self) -> bool:
        """Whether signs were compared in a part of the elements only."""
        return self.elements < self.of_elements


@dataclass(frozen=True)
class OverallSimilarity:
    """Two adapters: sums over all modules; a module that one of them alone changes counts in its norm.

    Attributes:
        norms: of all updates of each.
        cosine: None where one of them changes nothing.
        writes, reads, by_chance, conflict, weighted_conflict: means over the shared modules, each counted with the
            product of both norms there; None where they share none.
        elements, of_elements: sums over the shared modules.
    """

    norms: tuple[float, float]
    cosine: float | None
    writes: float | None
    reads: float | None
    by_chance: tuple[float, float] | None
    conflict: float | None
    weighted_conflict: float | None
    elements: int
    of_elements: int

    @property
    def kept(self) -> tuple[float, float] | None:
        """What a plain sum has along the direction of each update, 1 being the update itself: <x, x + y> / <x, x>.

        None where one of them is zero or not finite.
        """
        if self.cosine is None or not math.isfinite(self.cosine):
            return None
        one, other = self.norms
        return 1 + self.cosine * (other / one), 1 + self.cosine * (one / other)


def measured(update: LowRank) -> MeasuredUpdate:
    """An update's norm and subspaces, in its numerical rank: QR of both factors, SVD of the small core.

    A direction counts where its singular value is above the rounding of the product in float64; one that is only there
    because the stored factors were rounded counts in full.
    """
    left, right = torch.linalg.qr(update.b), torch.linalg.qr(update.a.mT)
    core = left.R @ right.R.mT
    if not bool(torch.isfinite(core).all()):
        none = [tuple(factor.new_zeros(factor.shape[1], 0) for factor in side) for side in (update.b, update.a.mT)]
        return MeasuredUpdate(update, math.nan, none[0], none[1])
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    # Rounding errors are relative to the terms of the product, which may cancel.
    terms = (update.b.norm(dim=1) * update.a.norm(dim=2)).sum(1, keepdim=True)
    counts = s > torch.finfo(s.dtype).eps * max(update.shape[1:]) * terms
    ranks = counts.sum(1).tolist()
    columns, rows = left.Q @ u, right.Q @ vh.mT
    return MeasuredUpdate(
        update,
        float(torch.linalg.vector_norm(s[counts])),
        tuple(one[:, :rank] for one, rank in zip(columns, ranks, strict=True)),
        tuple(one[:, :rank] for one, rank in zip(rows, ranks, strict=True)),
    )


def compare_updates(path: str, x: MeasuredUpdate, y: MeasuredUpdate) -> ModuleSimilarity:
    """Compares two updates of one module.

    Args:
        path: names the module.

    Raises:
        ShapeMismatch: they are of weights of different sizes.
    """
    shape = x.update.shape
    if shape != y.update.shape:
        raise ShapeMismatch(
            f"{path}: updates of different sizes, (blocks, out, in): {shape} and {y.update.shape}; these adapters are "
            "of different bases"
        )
    rows = _compared_rows(*shape)
    conflict, weighted = _sign_conflict(x.update, y.update, rows) if x.norm > 0 and y.norm > 0 else (None, None)
    writes, writes_by_chance = _overlap(x.columns, y.columns)
    reads, reads_by_chance = _overlap(x.rows, y.rows)
    return ModuleSimilarity(
        path,
        (x.norm, y.norm),
        inner_product(x.update, y.update),
        writes,
        reads,
        (writes_by_chance, reads_by_chance),
        conflict,
        weighted,
        rows.numel() * shape[2],
        math.prod(shape),
    )


def overall(
    shared: Iterable[ModuleSimilarity], alone: tuple[Iterable[float], Iterable[float]] = ((), ())
) -> OverallSimilarity:
    """All modules together.

    Args:
        alone: norms of the updates of modules that only the first, and only the second, changes.
    """
    modules = list(shared)
    norms = (
        math.hypot(*(one.norms[0] for one in modules), *alone[0]),
        math.hypot(*(one.norms[1] for one in modules), *alone[1]),
    )

    def mean(value_of: Callable[[ModuleSimilarity], float | None]) -> float | None:
        pairs = [(value, one.norms[0] * one.norms[1]) for one in modules if (value := value_of(one)) is not None]
        total = math.fsum(weight for _, weight in pairs)
        return math.fsum(value * weight for value, weight in pairs) / total if total else None

    by_chance = mean(lambda one: one.by_chance[0]), mean(lambda one: one.by_chance[1])
    return OverallSimilarity(
        norms,
        cosine_of(math.fsum(one.inner for one in modules), *norms),
        mean(lambda one: one.writes),
        mean(lambda one: one.reads),
        None if by_chance[0] is None or by_chance[1] is None else (by_chance[0], by_chance[1]),
        mean(lambda one: one.conflict),
        mean(lambda one: one.weighted_conflict),
        sum(one.elements for one in modules),
        sum(one.of_elements for one in modules),
    )


def _overlap(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> tuple[float | None, float]:
    """Mean over the blocks of ||Q_1^T Q_2||^2 / min(r_1, r_2), and of what random subspaces have: the projection of a
    direction on r of n dimensions has r / n of its square on the average, so max(r_1, r_2) / n."""
    found, by_chance = [], []
    for one, other in zip(x, y, strict=True):
        ranks = one.shape[1], other.shape[1]
        if min(ranks):
            found.append(float((one.mT @ other).square().sum()) / min(ranks))
        by_chance.append(max(ranks) / max(1, one.shape[0]))
    return (min(1.0, sum(found) / len(found)) if found else None), sum(by_chance) / len(by_chance)


def _compared_rows(blocks: int, rows: int, columns: int) -> Tensor:
    """Numbers of the rows whose signs are compared, counted over all blocks: all, or evenly spaced ones."""
    count = blocks * rows
    if count * columns <= MOST_ELEMENTS:
        return torch.arange(count)
    # An odd step meets every place of what repeats in powers of two, such as the heads of an attention.
    step = min(count, -(-count * columns // SAMPLED_ELEMENTS)) | 1
    return torch.arange(step // 2, count, step)


def _sign_conflict(x: LowRank, y: LowRank, rows: Tensor) -> tuple[float | None, float | None]:
    """Share of conflicting signs in these rows, and the same weighted."""
    both = differing = 0
    magnitude = conflicting = 0.0
    for one, other in _dense_rows(x, y, rows):
        least = torch.minimum(one.abs(), other.abs())
        apart = (least > 0) & (torch.signbit(one) != torch.signbit(other))
        both += int(torch.count_nonzero(least))
        differing += int(torch.count_nonzero(apart))
        magnitude += float(least.sum())
        conflicting += float(least[apart].sum())
    if not both:
        return None, None
    return differing / both, conflicting / magnitude if magnitude else None


def _dense_rows(x: LowRank, y: LowRank, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """These rows of both updates: all at once where that is every row, else block by block."""
    blocks, height, _ = x.shape
    if rows.numel() == blocks * height:
        yield x.b @ x.a, y.b @ y.a
        return
    for block in sorted({row // height for row in rows.tolist()}):
        part = rows[(rows >= block * height) & (rows < (block + 1) * height)] - block * height
        yield x.b[block, part] @ x.a[block], y.b[block, part] @ y.a[block]
