"""Cuts against the singular values of the dense matrix, which say what the best cut is (Eckart and Young)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from registry.core.errors import InvalidInput
from registry.merge.compress import RankChoice, cut_dense, cut_low_rank
from registry.merge.low_rank import LowRank


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(
    batch=st.integers(1, 10),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    inner=st.integers(1, 12),
    rank=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_factors_are_cut_to_the_best_there_is(
    batch: int, rows: int, columns: int, inner: int, rank: int, seed: int
) -> None:
    x = LowRank(normal(seed, batch, inner, columns), normal(seed + 1, batch, rows, inner))
    dense = x.b @ x.a
    values = torch.linalg.svdvals(dense)
    cut = cut_low_rank(x, RankChoice(rank))
    size = float(values.max())
    assert cut.a.shape[1] == cut.b.shape[2] == max(1, min(rank, inner, rows, columns))
    torch.testing.assert_close(cut.norm, values.norm(dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut.error, values[:, rank:].norm(dim=1), rtol=1e-10, atol=1e-12 * size)
    apart = torch.linalg.vector_norm(cut.b @ cut.a - dense, dim=(1, 2))
    torch.testing.assert_close(apart, cut.error, rtol=1e-10, atol=1e-12 * size)


def test_without_a_choice_nothing_is_lost_and_repeated_factors_are_counted_once() -> None:
    a, b = normal(1, 1, 3, 20), normal(2, 1, 30, 3)
    twice = LowRank(torch.cat((a, a), 1), torch.cat((b, b), 2))
    cut = cut_low_rank(twice, RankChoice())
    assert cut.ranks.tolist() == [3]
    torch.testing.assert_close(cut.b @ cut.a, 2 * b @ a)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_energy_takes_the_smallest_rank_that_keeps_it(dense: bool, energy: float) -> None:
    x = LowRank(normal(3, 4, 8, 30), normal(4, 4, 40, 8))
    matrix = x.b @ x.a
    cut = cut_dense(matrix, RankChoice(energy=energy)) if dense else cut_low_rank(x, RankChoice(energy=energy))
    for square, rank in zip(torch.linalg.svdvals(matrix).square(), cut.ranks.tolist(), strict=True):
        assert float(square[:rank].sum()) >= (energy - 1e-12) * float(square.sum())
        assert rank == 1 or float(square[: rank - 1].sum()) < energy * float(square.sum())


def test_matrices_of_one_batch_have_each_their_own_rank() -> None:
    a, b = normal(5, 2, 4, 12), normal(6, 2, 10, 4)
    b[1, :, 1:] = 0
    cut = cut_low_rank(LowRank(a, b), RankChoice())
    assert cut.ranks.tolist() == [4, 1]
    assert float(cut.b[1, :, 1:].abs().max()) == 0
    torch.testing.assert_close(cut.b @ cut.a, b @ a)


def test_a_zero_update_has_factors_of_one_rank() -> None:
    for cut in (
        cut_low_rank(LowRank(torch.zeros(2, 3, 5), torch.zeros(2, 4, 3)), RankChoice(2)),
        cut_dense(torch.zeros(2, 4, 5), RankChoice(2)),
        cut_dense(torch.zeros(1, 300, 400), RankChoice(2)),
    ):
        assert cut.a.shape[1] == 1
        assert (float(cut.a.abs().sum()), float(cut.norm.sum()), float(cut.error.sum())) == (0, 0, 0)


KINDS = {
    "low rank and noise": normal(7, 512, 16) @ normal(8, 16, 768) + 0.3 * normal(9, 512, 768),
    "elements left out": (normal(7, 512, 48) @ normal(8, 48, 768)) * (normal(9, 512, 768) > 0),
    "slowly falling": torch.linalg.qr(normal(7, 512, 512)).Q
    @ torch.diag(1 / torch.arange(1, 513, dtype=torch.float64).sqrt())
    @ torch.linalg.qr(normal(8, 768, 512)).Q.mT,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [False, True])
def test_a_randomised_cut_is_within_a_hundredth_of_the_best_and_its_error_is_measured(kind: str, known: bool) -> None:
    matrix = KINDS[kind].float()
    best = float(torch.linalg.svdvals(KINDS[kind])[16:].norm())
    span = matrix[None, :, :40].contiguous() if known else None
    cut = cut_dense(matrix[None], RankChoice(16), span=span)
    apart = float((cut.b[0].double() @ cut.a[0].double() - matrix.double()).norm())
    assert best * 0.9999 <= apart <= 1.01 * best
    assert float(cut.error) == pytest.approx(apart, rel=1e-4)
    again = cut_dense(matrix[None], RankChoice(16), span=span)
    assert torch.equal(cut.a, again.a)


def test_a_matrix_of_low_rank_is_cut_without_loss() -> None:
    matrix = normal(7, 1, 512, 12) @ normal(8, 1, 12, 768)
    cut = cut_dense(matrix, RankChoice(16))
    assert cut.ranks.tolist() == [12]
    assert float((cut.b @ cut.a - matrix).norm()) <= 1e-10 * float(matrix.norm())
    assert float(cut.error) <= 1e-10 * float(matrix.norm())


def test_threads_of_the_process_are_what_they_were() -> None:
    before = torch.get_num_threads()
    cut_low_rank(LowRank(normal(1, 16, 2, 8), normal(2, 16, 8, 2)), RankChoice(1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    matrix = normal(1, 1, 300, 300)
    matrix[0, 1, 1] = bad
    with pytest.raises(InvalidInput, match=r"NaN"):
        cut_dense(matrix, RankChoice(4))
    with pytest.raises(InvalidInput, match=r"NaN"):
        cut_low_rank(LowRank(matrix[:, :2], matrix[:, :, :2]), RankChoice(1))
