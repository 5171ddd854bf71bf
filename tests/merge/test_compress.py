"""Cuts against the singular values of the dense matrix, which say what the best cut is (Eckart and Young)."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from registry.core.errors import InvalidInput
from registry.merge.compress import Cut, RankChoice, cut_dense, cut_low_rank
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
    for dtype in (torch.float32, torch.float64):
        a, b = normal(1, 1, 3, 20, dtype=dtype), normal(2, 1, 30, 3, dtype=dtype)
        twice = LowRank(torch.cat((a, a), 1), torch.cat((b, b), 2))
        cut = cut_low_rank(twice, RankChoice())
        assert cut.ranks.tolist() == [3]
        torch.testing.assert_close(cut.b @ cut.a, 2 * b @ a, rtol=1e-4, atol=1e-5)


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
        cut_dense(torch.zeros(1, 300, 400), RankChoice()),
        cut_dense(torch.zeros(1, 300, 400), RankChoice(energy=0.5)),
    ):
        assert cut.a.shape[1] == 1
        assert (float(cut.a.abs().sum()), float(cut.norm.sum()), float(cut.error.sum())) == (0, 0, 0)


def ties_like() -> Tensor:
    """Three updates, of each the fifth of the elements that are largest, summed."""
    total = torch.zeros(512, 768, dtype=torch.float64)
    for source in range(3):
        falling = torch.arange(1, 17, dtype=torch.float64).rsqrt()
        delta = (normal(20 + source, 512, 16) * falling) @ normal(30 + source, 16, 768)
        total += torch.where(delta.abs() >= delta.abs().quantile(0.8), delta, 0)
    return total


def with_spectrum(values: Tensor) -> Tensor:
    left, right = (torch.linalg.qr(normal(seed, size, 512)).Q for seed, size in ((7, 512), (8, 768)))
    return torch.mm(left * values, right.mT)


NUMBERS = torch.arange(1, 513, dtype=torch.float64)
KINDS = {
    "low rank and noise": normal(7, 512, 16) @ normal(8, 16, 768) + 0.3 * normal(9, 512, 768),
    "elements left out": (normal(7, 512, 48) @ normal(8, 48, 768)) * (normal(9, 512, 768) > 0),
    "like ties": ties_like(),
    "only noise": normal(10, 512, 768),
    "slowly falling": with_spectrum(NUMBERS.rsqrt()),
    "hardly falling": with_spectrum(NUMBERS**-0.1),
    "two heights, a percent apart": with_spectrum(1 - 0.01 * (NUMBERS > 16)),
}
VALUES = {kind: torch.linalg.svdvals(matrix) for kind, matrix in KINDS.items()}
SPANS = {
    "unknown": None,
    "narrow": slice(0, 24),
    "wide": slice(0, 90),
}


def apart(cut: Cut, matrix: Tensor) -> float:
    return float((cut.b[0].double() @ cut.a[0].double() - matrix.double()).norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span", SPANS)
def test_a_cut_of_a_large_matrix_is_within_a_hundredth_of_the_best_and_its_error_is_measured(
    kind: str, span: str
) -> None:
    matrix, best = KINDS[kind].float(), float(VALUES[kind][16:].norm())
    columns = SPANS[span]
    known = None if columns is None else matrix[None, :, columns]
    cut = cut_dense(matrix[None], RankChoice(16), span=known)
    assert cut.a.dtype == cut.b.dtype == torch.float32
    assert best * (1 - 1e-6) <= apart(cut, matrix) <= 1.01 * best
    assert float(cut.error) == pytest.approx(apart(cut, matrix), rel=1e-4)
    assert float(cut.norm) == pytest.approx(float(matrix.double().norm()), rel=1e-6)
    assert torch.equal(cut_dense(matrix[None], RankChoice(16), span=known).a, cut.a)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_best_cut_can_be_is_bounded_by_the_returned_factors(kind: str) -> None:
    matrix = KINDS[kind]
    cut = cut_dense(matrix[None], RankChoice(16))
    rest = matrix - cut.b[0] @ cut.a[0]
    widest = float(torch.linalg.matrix_norm(rest, 2))
    assert float(VALUES[kind][16:].square().sum()) >= float(cut.error) ** 2 - 16 * widest**2
    # The bound needs B A = M V V^T, V being the rows of A: nothing is left along them.
    assert float((rest @ cut.a[0].mT).norm()) <= 1e-9 * float(cut.norm)


def test_a_span_that_is_wrong_does_no_harm() -> None:
    matrix, values = KINDS["slowly falling"], VALUES["slowly falling"]
    least = torch.linalg.svd(matrix).U[:, -90:]
    for span in (least[:, :24], least, torch.zeros_like(least), torch.zeros_like(least[:, :24])):
        cut = cut_dense(matrix[None], RankChoice(16), span=span[None])
        assert float(cut.error) <= 1.01 * float(values[16:].norm())


def test_small_directions_beside_large_ones_are_found() -> None:
    values = torch.where(NUMBERS <= 8, 10, 1e-5 / NUMBERS.sqrt())
    cut = cut_dense(with_spectrum(values)[None], RankChoice(16))
    assert cut.ranks.tolist() == [16]
    assert float(cut.error) <= 1.01 * float(values[16:].norm())


@pytest.mark.parametrize("energy", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("kind", ["like ties", "slowly falling", "low rank and noise"])
def test_an_energy_of_a_large_matrix_is_reached_in_nearly_the_smallest_rank(kind: str, energy: float) -> None:
    matrix, squares = KINDS[kind], VALUES[kind].square()
    cut = cut_dense(matrix[None], RankChoice(energy=energy))
    smallest = int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
    assert smallest <= int(cut.ranks) <= 1.02 * smallest + 1
    assert apart(cut, matrix) ** 2 <= (1 - energy + 1e-9) * float(squares.sum())
    both = cut_dense(matrix[None], RankChoice(3, energy))
    assert int(both.ranks) == min(3, smallest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("choice", [RankChoice(), RankChoice(energy=1), RankChoice(80)])
def test_a_matrix_of_low_rank_is_cut_without_loss(dtype: torch.dtype, choice: RankChoice) -> None:
    matrix = normal(7, 1, 512, 40, dtype=dtype) @ normal(8, 1, 40, 768, dtype=dtype)
    cut = cut_dense(matrix, choice)
    rounding = 1e-10 if dtype == torch.float64 else 1e-5
    assert cut.ranks.tolist() == [40]
    assert apart(cut, matrix[0]) <= rounding * float(matrix.norm())
    assert float(cut.error) <= rounding * float(matrix.norm())


def test_without_a_choice_a_matrix_of_full_rank_keeps_it() -> None:
    matrix = KINDS["slowly falling"][:300, :300]
    cut = cut_dense(matrix[None], RankChoice())
    assert cut.ranks.tolist() == [300]
    assert apart(cut, matrix) <= 1e-12 * float(matrix.norm())


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 12))
def test_a_small_dense_cut_is_that_of_its_factors(seed: int, rows: int, columns: int, rank: int) -> None:
    x = LowRank(normal(seed, 2, 3, columns), normal(seed + 1, 2, rows, 3))
    dense, factors = cut_dense(x.b @ x.a, RankChoice(rank)), cut_low_rank(x, RankChoice(rank))
    size = float(factors.norm.max())
    torch.testing.assert_close(dense.b @ dense.a, factors.b @ factors.a, rtol=1e-6, atol=1e-9 * size)
    torch.testing.assert_close(dense.error, factors.error, rtol=1e-6, atol=1e-9 * size)


def test_the_root_of_each_singular_value_is_on_either_side() -> None:
    for cut in (
        cut_dense(KINDS["like ties"][None], RankChoice(16)),
        cut_low_rank(LowRank(normal(1, 1, 9, 40), normal(2, 1, 30, 9)), RankChoice(5)),
    ):
        inside = cut.b[0].mT @ cut.b[0]
        torch.testing.assert_close(inside, torch.diag(inside.diag()), rtol=0, atol=1e-10 * float(inside.max()))
        torch.testing.assert_close(cut.a[0] @ cut.a[0].mT, inside, rtol=0, atol=1e-10 * float(inside.max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_that_cancel_leave_no_rank(dtype: torch.dtype) -> None:
    a, b = normal(1, 2, 6, 200, dtype=dtype), normal(2, 2, 300, 6, dtype=dtype)
    less_itself = LowRank(torch.cat((a, a, a), 1), torch.cat((b, b, -2 * b), 2))
    cut = cut_low_rank(less_itself, RankChoice(4))
    assert cut.ranks.tolist() == [0, 0]
    assert float(cut.b.abs().max()) == 0


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_numbers_whose_squares_leave_float32_are_cut_as_others(size: float) -> None:
    matrix = KINDS["like ties"].float() / 100
    plain, scaled = (cut_dense(one[None], RankChoice(16)) for one in (matrix, matrix * size))
    assert float(scaled.norm) == pytest.approx(size * float(plain.norm), rel=1e-5)
    assert float(scaled.error) == pytest.approx(size * float(plain.error), rel=1e-3)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_share_a_batch_and_torch_has_its_threads_back() -> None:
    x = LowRank(normal(1, 7, 4, 30), normal(2, 7, 20, 4))
    cut = cut_low_rank(x, RankChoice(2))
    cut_dense(KINDS["like ties"][None], RankChoice(4))
    assert torch.get_num_threads() == 2
    # A number that one thread sets becomes that of all threads that start later.
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]
    torch.set_num_threads(1)
    alone = cut_low_rank(x, RankChoice(2))
    torch.testing.assert_close(cut.b @ cut.a, alone.b @ alone.a)
    torch.testing.assert_close(cut.error, alone.error)


@pytest.mark.usefixtures("two_threads")
def test_torch_has_its_threads_back_after_a_refusal() -> None:
    bad = LowRank(normal(1, 4, 2, 8) * math.nan, normal(2, 4, 8, 2))
    with pytest.raises(InvalidInput):
        cut_low_rank(bad, RankChoice(1))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("choice", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"energy": math.nan}])
def test_a_choice_outside_of_its_range_is_refused(choice: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(choice))):
        RankChoice(**choice)  # type: ignore[arg-type]  # a rank of int or an energy of float


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    matrix = normal(1, 1, 300, 300)
    matrix[0, 1, 1] = bad
    with pytest.raises(InvalidInput, match=r"NaN"):
        cut_dense(matrix, RankChoice(4))
    with pytest.raises(InvalidInput, match=r"NaN"):
        cut_low_rank(LowRank(matrix[:, :2], matrix[:, :, :2]), RankChoice(1))
