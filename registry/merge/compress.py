"""Cuts a merged update to a rank: from its factors by QR and the SVD of a small core, from a dense matrix by the exact
SVD or, where that would take minutes, by a randomised one. What a cut leaves out is measured, not estimated."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.core.errors import InvalidInput
from registry.merge.low_rank import LowRank

_SMALL = 256
"""Smaller dimension up to which the exact SVD of a dense matrix takes milliseconds."""
_OVERSAMPLING = 16
_MOST_ITERATIONS = 12
_GAIN = 1e-3
"""Iterations end once one of them takes less than this share off the residual's square."""
_WORTH_THREADS = 8
_DIRECT = 1e-4
"""Relative residual below which ||M||^2 - ||Q^T M||^2 has no digits left, and M - B A is formed."""


@dataclass(frozen=True)
class RankChoice:
    """How far a result is cut. Neither given: to what is needed to lose nothing but rounding. Both: to the smaller.

    Attributes:
        rank: the most, from 1 on.
        energy: share of the squared Frobenius norm to keep in the smallest rank, above 0, at most 1.
    """

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True, eq=False)
class Cut:
    """Matrices in a lower rank: b @ a, with the root of each singular value on both sides.

    Attributes:
        a: (batch, k, in), k being the largest rank that a matrix of the batch needs, at least 1.
        b: (batch, out, k).
        norm: (batch,) Frobenius norm of what was cut, float64.
        error: (batch,) Frobenius norm of what the cut left out, float64.
        ranks: (batch,) the rank that each needs; beyond it its factors are zero.
    """

    a: Tensor
    b: Tensor
    norm: Tensor
    error: Tensor
    ranks: Tensor


def cut_low_rank(x: LowRank, choice: RankChoice) -> Cut:
    """The best approximation of an update in a rank, from its factors.

    Args:
        x: float32 or float64, on any device. No dense update is made, and no Gram matrix, whose root would lose half of
            the digits.

    Raises:
        InvalidInput: NaN or Inf in it.

    Source: Eckart and Young 1936; the SVD of a product by the QR of both factors, Golub and Van Loan, section 8.6.
    """
    batch = len(x.a)
    if batch < _WORTH_THREADS or x.a.device.type != "cpu" or torch.get_num_threads() == 1:
        return _assemble([_svd_of_product(x)], choice, x.shape)
    # LAPACK does the small matrices of a batch one after the other, on one core.
    half = batch // 2
    halves = [LowRank(x.a[part], x.b[part]) for part in (slice(half), slice(half, None))]
    with ThreadPoolExecutor(2, "registry-svd", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return _assemble(list(pool.map(_svd_of_product, halves)), choice, x.shape)


_Svd = tuple[Tensor, Tensor, Tensor]
"""U (batch, out, k), S (batch, k), V^T (batch, k, in)."""


def _svd_of_product(x: LowRank) -> _Svd:
    left, right = torch.linalg.qr(x.b), torch.linalg.qr(x.a.mT)
    u, s, vh = _svd(left.R @ right.R.mT)
    return left.Q @ u, s, vh @ right.Q.mT


def _svd(matrix: Tensor) -> _Svd:
    """
    Raises:
        InvalidInput: NaN or Inf, or no convergence.
    """
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch documents it there
        raise InvalidInput(
            "the SVD of an update does not converge: it holds NaN, Inf, or numbers that are too large; leave the "
            "source "
            "out, or compute with --precise"
        ) from error
    if not bool(torch.isfinite(s).all()):
        raise InvalidInput("an update holds NaN or Inf, so it has no SVD; leave the source out")
    return u, s, vh


def _assemble(parts: list[_Svd], choice: RankChoice, shape: tuple[int, int, int]) -> Cut:
    """The cut from exact SVDs of parts of the batch."""
    u, s, vh = (torch.cat(some) if len(parts) > 1 else some[0] for some in zip(*parts, strict=True))
    squares = s.double().square()
    total = squares.sum(1)
    ranks = _ranks(s, squares, total, choice, max(shape[1:]))
    kept = torch.arange(s.shape[1], device=s.device) < ranks[:, None]
    error = (squares * ~kept).sum(1).sqrt()
    k = max(1, int(ranks.max()))
    root = (s[:, :k] * kept[:, :k]).sqrt()
    return Cut(root[:, :, None] * vh[:, :k], u[:, :, :k] * root[:, None, :], total.sqrt(), error, ranks)


def _ranks(s: Tensor, squares: Tensor, total: Tensor, choice: RankChoice, size: int) -> Tensor:
    """(batch,) the rank that each matrix is cut to."""
    # What is below is rounding: it counts for no rank.
    rounding = torch.finfo(s.dtype).eps * size * s[:, :1]
    ranks = (s > rounding).sum(1)
    if choice.energy is not None:
        ranks = torch.minimum(ranks, _rank_of_energy(squares, total, choice.energy))
    if choice.rank is not None:
        ranks = ranks.clamp(max=choice.rank)
    return ranks


def _rank_of_energy(squares: Tensor, total: Tensor, energy: float) -> Tensor:
    """The smallest rank that keeps the share; more than there are where none does."""
    left = total[:, None] - squares.cumsum(1)
    return (left > (1 - energy) * total[:, None] + 1e-15 * total[:, None]).sum(1) + 1


# ---------------------------------------------------------------- dense


def cut_dense(matrix: Tensor, choice: RankChoice, *, span: Tensor | None = None, seed: int = 0) -> Cut:
    """A near-best approximation of dense matrices in a rank.

    Small ones, and ranks above a quarter of the smaller dimension, by the exact SVD. Others by subspace iteration from
    the known span and random vectors, each pass two products with the matrix. `error` is measured on the factors that
    are returned. How far that is from the best there is can be said afterwards: with Q the basis and E = M - Q Q^T M,
    sigma_i(M)^2 <= sigma_i(Q^T M)^2 + ||E||_2^2 (Weyl), so the best error squared is at least error^2 - k ||E||_2^2;
    and iterations end only when one has gained less than a thousandth of the residual.

    Args:
        matrix: (batch, out, in), float32 or float64; not changed.
        span: (batch, out, s), columns that hold much of the range, such as those of the merged factors.
        seed: of the random vectors, which are drawn on the CPU, so that all devices have the same.

    Raises:
        InvalidInput: NaN or Inf in it.

    Source: Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1; Musco and Musco 2015 on the number of iterations.
    """
    cuts = [_cut_one(one, choice, None if span is None else span[at], seed) for at, one in enumerate(matrix)]
    k = max(one.a.shape[1] for one in cuts)
    pad = torch.nn.functional.pad
    return Cut(
        torch.cat([pad(one.a, (0, 0, 0, k - one.a.shape[1])) for one in cuts]),
        torch.cat([pad(one.b, (0, k - one.b.shape[2])) for one in cuts]),
        torch.cat([one.norm for one in cuts]),
        torch.cat([one.error for one in cuts]),
        torch.cat([one.ranks for one in cuts]),
    )


def _cut_one(matrix: Tensor, choice: RankChoice, span: Tensor | None, seed: int) -> Cut:
    smaller = min(matrix.shape)
    rank = choice.rank
    if rank is None and choice.energy is not None:
        rank = 32
    while rank is not None and smaller > _SMALL and 4 * rank <= smaller:
        cut, enough = _randomised(matrix, RankChoice(rank, choice.energy), span, seed)
        if enough or choice.rank is not None:
            return cut
        rank *= 2
    u, s, vh = _svd(matrix)
    return _assemble([(u[None], s[None], vh[None])], choice, (1, *matrix.shape))


def _randomised(matrix: Tensor, choice: RankChoice, span: Tensor | None, seed: int) -> tuple[Cut, bool]:
    """The cut, and whether its rank reaches the energy that was asked for."""
    rank = choice.rank or 1
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    if not math.isfinite(total):
        raise InvalidInput("an update holds NaN or Inf, so it has no SVD; leave the source out")
    generator = torch.Generator().manual_seed(seed)
    columns = rank + _OVERSAMPLING
    test = torch.randn((matrix.shape[1], columns), generator=generator, dtype=matrix.dtype)
    start = matrix @ test.to(matrix.device)
    if span is not None and span.shape[1] + columns <= min(matrix.shape) // 2:
        # The span is a good guess: one pass turns it to what the matrix makes of it.
        start = torch.cat((start, span), dim=1)
    basis = torch.linalg.qr(start).Q
    captured = -1.0
    for _ in range(_MOST_ITERATIONS):
        right = torch.linalg.qr(matrix.mT @ basis)
        # Q^T M = R^T right^T: its singular values are those of R.
        u, s, vh = _svd(right.R.mT)
        found = float(s[:rank].double().square().sum())
        if found - captured <= _GAIN * max(total - found, 0.0) or total - found <= 1e-12 * total:
            break
        captured = found
        # Of the span only the leading directions go on: the rest has served.
        basis = torch.linalg.qr(matrix @ (right.Q @ vh.mT[:, :columns])).Q
    values, left, wide = s[:rank], basis @ u[:, :rank], (right.Q @ vh.mT[:, :rank]).mT
    squares = values.double().square()
    all_of_it = torch.tensor([total], dtype=torch.float64, device=matrix.device)
    ranks = _ranks(values[None], squares[None], all_of_it, choice, max(matrix.shape))
    k = max(1, int(ranks[0]))
    root = values[:k].sqrt()
    root = torch.where(torch.arange(k, device=root.device) < ranks[0], root, 0)
    a, b = root[:, None] * wide[:k], left[:, :k] * root
    square = total - float(squares[: int(ranks[0])].sum())
    if square <= _DIRECT**2 * total:
        square = _residual(matrix, b, a)
    reached = choice.energy is None or float(squares.sum()) >= choice.energy * total
    error = torch.tensor([math.sqrt(max(square, 0.0))], dtype=torch.float64, device=matrix.device)
    return Cut(a[None], b[None], all_of_it.sqrt(), error, ranks), reached


def _residual(matrix: Tensor, b: Tensor, a: Tensor) -> float:
    """||M - B A||^2, a block of rows at a time."""
    step = max(1, (1 << 22) // matrix.shape[1])
    square = 0.0
    for begin in range(0, matrix.shape[0], step):
        rest = torch.addmm(matrix[begin : begin + step], b[begin : begin + step], a, alpha=-1)
        square += float(torch.linalg.vector_norm(rest, dtype=torch.float64)) ** 2
    return square
