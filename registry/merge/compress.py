"""Cuts a merged update to a rank: from its factors by QR and the SVD of a small core, from a dense matrix by the exact
SVD or, where that would take minutes, by block Krylov iteration. What a cut leaves out is measured on the factors that
are returned, not estimated. Tensors in, tensors out: nothing here knows of names, files or configurations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.core.errors import InvalidInput
from registry.merge.low_rank import LowRank

_SMALL = 256
"""Smaller dimension up to which an exact SVD takes milliseconds, and LAPACK gains nothing by a second thread."""
_WORTH = 6
"""Ranks above this part of the smaller dimension are left to the exact SVD, which is no slower."""
_OVERSAMPLING = 16
_FIRST_RANK = 32
"""That is tried where only the energy is given; doubled until it is enough."""
_MOST_BLOCKS = 8
_GAIN = 2e-3
"""Iterations end once a half of one takes less than this share off the residual's square. Each gain is a tenth of the
one before it, or less (4096 x 4096 TIES merges), so that what is left to gain is a quarter of this share of the
error."""


@dataclass(frozen=True)
class RankChoice:
    """How far a result is cut. Neither given: to what is needed to lose nothing but rounding. Both: to the smaller.

    Attributes:
        rank: the most, from 1 on.
        energy: share of the squared Frobenius norm to keep in the smallest rank, above 0, at most 1.

    Raises:
        InvalidInput: one of them is outside of its range.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise InvalidInput(f"rank {self.rank}: expected 1 or more; leave it out to cut nothing")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InvalidInput(f"energy {self.energy}: expected a share above 0 and at most 1, such as 0.99")

    @property
    def is_lossless(self) -> bool:
        """Whether only rounding may be lost."""
        return self.rank is None and (self.energy is None or self.energy == 1)


@dataclass(frozen=True, eq=False)
class Cut:
    """Matrices in a lower rank: b @ a, with the root of each singular value on both sides.

    Attributes:
        a: (batch, k, in), k being the largest rank that a matrix of the batch needs, at least 1.
        b: (batch, out, k).
        norm: (batch,) Frobenius norm of what was cut, float64.
        error: (batch,) Frobenius norm of what the cut left out, float64.
        ranks: (batch,) the rank that each needs, 0 for a zero matrix; beyond it its factors are zero.
    """

    a: Tensor
    b: Tensor
    norm: Tensor
    error: Tensor
    ranks: Tensor


_Svd = tuple[Tensor, Tensor, Tensor]
"""U (..., out, k), S (..., k), V^T (..., k, in)."""


# ---------------------------------------------------------------- from factors


def cut_low_rank(x: LowRank, choice: RankChoice) -> Cut:
    """The best approximation of an update in a rank, from its factors.

    Args:
        x: float32 or float64, on any device. No dense update is made, and no Gram matrix, whose root would lose half of
            the digits. Terms that cancel (an adapter less itself) leave rank 0, not their rounding.

    Raises:
        InvalidInput: NaN or Inf in it, or numbers too large for its dtype.

    Source: Eckart and Young 1936; the SVD of a product by the QR of both factors, Golub and Van Loan, section 8.6.
    """
    threads = torch.get_num_threads()
    if x.a.device.type != "cpu" or threads == 1 or len(x.a) < 2 * threads:
        svd, largest_term = _svd_of_product(x)
        return _assemble(svd, choice, x.shape, largest_term)
    # LAPACK does the small matrices of a batch one after the other: each thread takes a part of the batch.
    # 48 of 768 x 768 in rank 48: 20.5 ms, against 39 ms with torch's two threads on all of it.
    parts = [LowRank(a, b) for a, b in zip(x.a.tensor_split(threads), x.b.tensor_split(threads), strict=True)]
    with (
        _one_thread(),
        ThreadPoolExecutor(threads, "registry-svd", initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        done = list(pool.map(_svd_of_product, parts))
    u, s, vh = (torch.cat(some) for some in zip(*(svd for svd, _ in done), strict=True))
    return _assemble((u, s, vh), choice, x.shape, torch.cat([largest for _, largest in done]))


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK on one thread. A QR of 4096 x 80 takes 5 ms on one, 3 ms on two, and 200 to 300 ms on two where another
    process has a core: the two wait for each other at each step.

    torch's number is the calling thread's own, and that of threads that start from now on: so it is put back here, and
    not only left to the threads of a pool.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _svd_of_product(x: LowRank) -> tuple[_Svd, Tensor]:
    """And (batch,) the norm of the largest term b_i a_i of each sum: rounding is relative to it where terms cancel."""
    (q_left, r_left), (q_right, r_right) = _qr(x.b), _qr(x.a.mT)
    u, s, vh = _svd(r_left @ r_right.mT)
    # Columns of R are as long as those that they were made of.
    terms = [torch.linalg.vector_norm(one, dim=1, dtype=torch.float64) for one in (r_left, r_right)]
    return (q_left @ u, s, vh @ q_right.mT), (terms[0] * terms[1]).amax(1)


def _threads_for(matrix: Tensor) -> AbstractContextManager[None]:
    return _one_thread() if min(matrix.shape[-2:]) <= _SMALL and torch.get_num_threads() > 1 else nullcontext()


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    with _threads_for(matrix):
        q, r = torch.linalg.qr(matrix)
    return q, r


def _svd(matrix: Tensor) -> _Svd:
    """
    Raises:
        InvalidInput: NaN or Inf, or no convergence.
    """
    try:
        with _threads_for(matrix):
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch documents it there
        raise _not_finite() from error
    if not bool(torch.isfinite(s).all()):
        raise _not_finite()
    return u, s, vh


def _not_finite() -> InvalidInput:
    return InvalidInput(
        "an update has no SVD: expected finite numbers, found NaN, Inf, or products beyond the dtype; leave that "
        "source out, or compute in float64 (--precise)"
    )


def _assemble(svd: _Svd, choice: RankChoice, shape: tuple[int, int, int], largest_term: Tensor | None = None) -> Cut:
    """The cut from exact SVDs."""
    u, s, vh = svd
    squares = s.double().square()
    # left[k]: what rank k + 1 leaves out; summed from the smallest, so that no digits are lost.
    left = squares.flip(1).cumsum(1).flip(1) - squares
    ranks = _ranks(s, left, squares.sum(1), choice, max(shape[1:]), largest_term)
    kept = torch.arange(s.shape[1], device=s.device) < ranks[:, None]
    k = max(1, int(ranks.max()))
    root = (s[:, :k] * kept[:, :k]).sqrt()
    a, b = root[:, :, None] * vh[:, :k], u[:, :, :k] * root[:, None, :]
    return Cut(a, b, squares.sum(1).sqrt(), (squares * ~kept).sum(1).sqrt(), ranks)


def _ranks(
    s: Tensor, left: Tensor, total: Tensor, choice: RankChoice, size: int, largest_term: Tensor | None = None
) -> Tensor:
    """(batch,) the rank that each matrix is cut to.

    Args:
        s: (batch, n) singular values, falling.
        left: (batch, n) the squared norm that rank 1, 2, ... leaves out.
        total: (batch,) squared norm.
        size: the larger dimension.
        largest_term: (batch,) of a sum, float64.
    """
    largest = s[:, 0].double()
    if largest_term is not None:
        largest = torch.maximum(largest, largest_term)
    ranks = (s > _rounding(s.dtype, size) * largest[:, None]).sum(1)
    if choice.energy is not None and choice.energy < 1:
        enough = (left > (1 - choice.energy) * total[:, None]).sum(1) + 1
        ranks = torch.minimum(ranks, enough)
    return ranks if choice.rank is None else ranks.clamp(max=choice.rank)


def _rounding(dtype: torch.dtype, size: int) -> float:
    """Singular values below this share of the largest are rounding. Measured on products of rank 4 and 12 in sizes 512
    and 2048, float32 and float64: 3 to 9 eps. numpy's max(shape) eps is what can be proven, and would take real ones
    away: 5e-4 at 4096 in float32."""
    return torch.finfo(dtype).eps * (8 + math.sqrt(size) / 2)


# ---------------------------------------------------------------- dense


def cut_dense(matrix: Tensor, choice: RankChoice, *, span: Tensor | None = None, seed: int = 0) -> Cut:
    """A near-best approximation of dense matrices in a rank.

    Small ones, and ranks above a sixth of the smaller dimension, by the exact SVD. Others by block Krylov iteration
    from the known span and random vectors, each step two products with the matrix.

    What is certain: `error` is that of the factors that are returned, to rounding. They are B A = M V V^T, V being k
    orthonormal columns, so E = M - B A is orthogonal to them: error^2 = ||M||^2 - ||M V||^2, and
    sigma_i(M)^2 <= sigma_i(M V)^2 + ||E||_2^2 (Weyl, for M^T M = V V^T M^T M V V^T + E^T E). So the best error of rank
    k, squared, is at least error^2 - k ||E||_2^2: whoever doubts a cut can compute that norm. It is not computed here,
    as it takes more passes over M than the cut. An energy is reached, but for rounding.

    What is not certain: that no better rank was missed. Steps end when the last product gained less than `_GAIN` of the
    residual's square. On flat, falling, noisy and TIES-like spectra that left an error of at most 0.8 percent above the
    best, mostly below 0.1 (tests/merge/test_compress.py asserts 1 percent); the rank of an energy is the smallest for
    the singular values found, which are never above the true ones.

    4096 x 4096 in float32, rank 64, a TIES merge of four adapters, two cores: 0.12 to 0.25 s, where one product with 80
    columns takes 0.02 s, and the exact SVD of 1024 x 1024 0.28 s.

    Args:
        matrix: (batch, out, in), float32 or float64; not changed.
        span: (batch, out, s), columns that hold much of the range, such as those of the merged factors.
        seed: of the random vectors, which are drawn on the CPU, so that all devices have the same.

    Raises:
        InvalidInput: NaN or Inf in it.

    Source: Halko, Martinsson and Tropp 2011, sections 4 and 5; Musco and Musco 2015, algorithm 2.
    """
    cuts = [_cut_one(one, choice, None if span is None else span[at], seed) for at, one in enumerate(matrix)]
    if len(cuts) == 1:
        return cuts[0]
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
    rank = choice.rank or _FIRST_RANK
    if smaller > _SMALL and _WORTH * rank <= smaller:
        total = _squared_norm(matrix)
        if not math.isfinite(total):
            raise _not_finite()
        generator = torch.Generator().manual_seed(seed)
        while _WORTH * rank <= smaller:
            left, right = _leading(matrix, total, rank, choice, span, generator)
            cut = _cut_of_leading(matrix, total, left, right, rank, choice)
            if cut is not None:
                return cut
            span = left  # what is known by now
            rank *= 2
    return _assemble(_svd(matrix[None]), choice, (1, *matrix.shape))


def _leading(
    matrix: Tensor, total: float, rank: int, choice: RankChoice, span: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """M V and V^T, V (in, c) being orthonormal and holding the leading right singular vectors, as far as they are
    needed: where the energy is out of reach of the rank, it stops early."""
    columns = rank + _OVERSAMPLING
    basis = _qr(_start(matrix, columns, span, generator))[0]
    image = matrix.mT @ basis
    for block in range(_MOST_BLOCKS):
        # basis^T M = R^T P^T: its singular values are those of R, and never above those of M.
        p, r = _qr(image)
        _, s, vh = _svd(r.mT)
        wide = p @ vh.mT[:, :columns]
        left = matrix @ wide
        before = float(s[:rank].double().square().sum())
        found = _squared_norm(left[:, :rank])
        residual, gained = max(total - found, 0.0), found - before
        missing = 0.0 if choice.rank else (choice.energy or 1.0) * total - found
        # One block may be blind to small directions, whose gain is below the rounding of a difference of squares.
        tells = block > 0 or residual > 1e-3 * total
        settled = tells and gained <= _GAIN * residual + 10 * torch.finfo(matrix.dtype).eps * total
        out_of_reach = missing > 2 * gained + _GAIN * residual
        if settled or out_of_reach or block == _MOST_BLOCKS - 1 or basis.shape[1] + columns > min(matrix.shape):
            break
        more = _qr(torch.cat((basis, left), dim=1))[0][:, basis.shape[1] :]
        basis = torch.cat((basis, more), dim=1)
        image = torch.cat((image, matrix.mT @ more), dim=1)
    return left, wide.mT


def _start(matrix: Tensor, columns: int, span: Tensor | None, generator: torch.Generator) -> Tensor:
    """(out, about `columns`) vectors that hold much of the leading left singular vectors. Some are always random, for
    what is outside of the span."""
    known = 0 if span is None else span.shape[1]
    narrow = known <= columns
    test = torch.randn(
        (matrix.shape[1], max(_OVERSAMPLING, columns - known) if narrow else columns),
        generator=generator,
        dtype=matrix.dtype,
    )
    start = matrix @ test.to(matrix.device)
    if span is None:
        return start
    if narrow:
        return torch.cat((start, span), dim=1)
    # Of a wide span, what the matrix makes of random vectors, without what lies outside.
    return torch.cat((start[:, :_OVERSAMPLING], span @ (span.mT @ start[:, _OVERSAMPLING:])), dim=1)


def _cut_of_leading(
    matrix: Tensor, total: float, left: Tensor, right: Tensor, rank: int, choice: RankChoice
) -> Cut | None:
    """The best cut of `left @ right`, held against the matrix; None where the rank is not enough for the choice.

    Args:
        left: M V.
        right: V^T, (c, in), orthonormal rows.
    """
    q, r = _qr(left)
    u, s, vh = _svd(r)
    squares = s.double().square()
    remains = (total - squares.cumsum(0)).clamp(min=0)
    totals = torch.full((1,), total, dtype=torch.float64, device=matrix.device)
    ranks = _ranks(s[None], remains[None], totals, choice, max(matrix.shape))
    needed = int(ranks[0])
    if choice.rank is None and needed > rank:
        return None
    k = max(1, needed)
    root = s[:k].sqrt() if needed else torch.zeros_like(s[:k])
    a, b = root[:, None] * (vh[:k] @ right), (q @ u[:, :k]) * root
    square = float(remains[k - 1]) if needed else total
    # ||M||^2 - ||M V||^2 has lost its digits where it is this small: M - B A is formed.
    if square <= (1e-2 if matrix.dtype == torch.float32 else 1e-8) * total:
        square = _residual(matrix, b, a)
    if choice.is_lossless and math.sqrt(square) > _rounding(s.dtype, max(matrix.shape)) * math.sqrt(total):
        return None
    return Cut(a[None], b[None], totals.sqrt(), torch.full_like(totals, math.sqrt(square)), ranks)


def _squared_norm(matrix: Tensor) -> float:
    """||M||^2: rows in the matrix's own dtype, their sum in float64. In float32 throughout it is wrong by 1e-3 at
    4096 x 4096, in float64 throughout it costs as much as a product; so, 4e-9 and 10 ms."""
    norms = torch.linalg.vector_norm(matrix, dim=1)
    square = float(norms.double().square().sum())
    if 1e-20 < square < 1e30:
        return square
    # Squares of float32 leave its range where numbers do not.
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _residual(matrix: Tensor, b: Tensor, a: Tensor) -> float:
    """||M - B A||^2, a block of rows at a time."""
    step = max(1, (1 << 22) // matrix.shape[1])
    return math.fsum(
        _squared_norm(torch.addmm(matrix[at : at + step], b[at : at + step], a, alpha=-1))
        for at in range(0, matrix.shape[0], step)
    )
