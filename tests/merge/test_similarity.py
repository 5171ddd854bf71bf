"""Similarity of updates against the dense matrices that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from registry.core.errors import ShapeMismatch
from registry.merge.low_rank import LowRank
from registry.merge.similarity import ModuleSimilarity, compare_updates, measured, overall

SIZES = st.integers(1, 8)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def updates(draw: st.DrawFn) -> tuple[LowRank, LowRank]:
    rows, columns, seed = draw(SIZES), draw(SIZES), draw(st.integers(0, 2**31))
    one, two = (
        LowRank(normal(seed + i, 1, r, columns), normal(seed + i + 2, 1, rows, r))
        for i, r in enumerate((draw(SIZES), draw(SIZES)))
    )
    return one, two


def projector(matrix: Tensor) -> Tensor:
    """Onto the column space."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    u = u[:, s > 1e-10 * s[0]]
    return u @ u.mT


def compared(x: LowRank, y: LowRank) -> ModuleSimilarity:
    return compare_updates("m", measured(x), measured(y))


def flat(update: LowRank) -> Tensor:
    return (update.b @ update.a).flatten()


@given(updates())
def test_angle_subspaces_and_signs_are_those_of_the_dense_matrices(pair: tuple[LowRank, LowRank]) -> None:
    x, y = pair
    one, other = (update.b[0] @ update.a[0] for update in pair)
    found = compared(x, y)
    assert found.norms == pytest.approx((float(one.norm()), float(other.norm())), rel=1e-10)
    assert found.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()), abs=1e-10)
    ranks = min(int(torch.linalg.matrix_rank(one)), int(torch.linalg.matrix_rank(other)))
    for measure, left, right in ((found.writes, one, other), (found.reads, one.mT, other.mT)):
        expected = float((projector(left) @ projector(right)).trace()) / ranks
        assert measure == pytest.approx(expected, abs=1e-10)
    assert found.conflict == pytest.approx(float((one * other < 0).double().mean()), abs=1e-12)
    least = torch.minimum(one.abs(), other.abs())
    assert found.weighted_conflict == pytest.approx(float(least[one * other < 0].sum() / least.sum()), abs=1e-10)
    assert (found.elements, found.of_elements, found.sampled) == (one.numel(), one.numel(), False)


@given(updates())
def test_every_share_is_between_0_and_1_and_a_cosine_between_its_signs(pair: tuple[LowRank, LowRank]) -> None:
    found = compared(*pair)
    assert found.cosine is not None
    assert -1 <= found.cosine <= 1
    for share in (found.writes, found.reads, found.conflict, found.weighted_conflict, *found.by_chance):
        assert share is not None
        assert 0 <= share <= 1


@given(updates())
def test_the_order_of_the_two_does_not_matter_and_other_factors_of_one_update_are_as_good(
    pair: tuple[LowRank, LowRank],
) -> None:
    x, y = pair
    rank = x.a.shape[1]
    mixing = torch.linalg.qr(normal(3, rank, rank)).Q * torch.linspace(0.5, 4, rank, dtype=torch.float64)
    again = LowRank(torch.linalg.inv(mixing) @ x.a, x.b @ mixing)
    found, turned, refactored = compared(x, y), compared(y, x), compared(again, y)
    for name in ("cosine", "writes", "reads"):
        assert getattr(turned, name) == pytest.approx(getattr(found, name), abs=1e-10)
        assert getattr(refactored, name) == pytest.approx(getattr(found, name), abs=1e-8)
    assert turned.conflict == found.conflict
    assert turned.by_chance == found.by_chance == refactored.by_chance


def test_an_update_is_wholly_like_itself_and_opposed_to_its_negative() -> None:
    x = LowRank(normal(1, 2, 3, 20), normal(2, 2, 30, 3))
    same, opposed = compared(x, x), compared(x, LowRank(x.a, -x.b))
    assert (same.cosine, same.conflict) == (pytest.approx(1), 0)
    assert (opposed.cosine, opposed.conflict, opposed.weighted_conflict) == (pytest.approx(-1), 1, 1)
    assert (same.writes, opposed.reads) == (pytest.approx(1), pytest.approx(1))


def test_updates_in_other_rows_and_of_other_columns_share_nothing() -> None:
    x = LowRank(normal(1, 1, 2, 6), normal(2, 1, 8, 2))
    y = LowRank(normal(3, 1, 2, 6), normal(4, 1, 8, 2))
    x.b[:, 4:], y.b[:, :4] = 0, 0
    x.a[:, :, 3:], y.a[:, :, :3] = 0, 0
    found = compared(x, y)
    assert found.cosine == 0
    assert (found.writes, found.reads) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))
    assert (found.conflict, found.weighted_conflict) == (None, None)  # no element is changed by both


def test_a_rank_that_is_only_written_down_is_not_counted() -> None:
    x, y = (LowRank(normal(i, 1, 2, 20), normal(i + 5, 1, 30, 2)) for i in (1, 2))
    padded = LowRank(torch.cat((x.a, x.a, normal(9, 1, 3, 20)), 1), torch.cat((x.b, x.b, torch.zeros(1, 30, 3)), 2))
    found = compared(padded, y)
    assert [one.shape for one in measured(padded).columns] == [(30, 2)]
    assert found.by_chance == (2 / 30, 2 / 20)
    for name in ("cosine", "writes", "reads", "conflict"):
        assert getattr(found, name) == pytest.approx(getattr(compared(x, y), name), abs=1e-10)


def test_chance_is_what_random_subspaces_have_on_the_average() -> None:
    found = [
        compared(
            LowRank(normal(i, 1, 2, 12), normal(i + 300, 1, 24, 2)),
            LowRank(normal(i + 600, 1, 4, 12), normal(i + 900, 1, 24, 4)),
        )
        for i in range(300)
    ]
    assert found[0].by_chance == (4 / 24, 4 / 12)
    assert sum(one.writes or 0.0 for one in found) / 300 == pytest.approx(4 / 24, abs=0.01)
    assert sum(one.reads or 0.0 for one in found) / 300 == pytest.approx(4 / 12, abs=0.015)


@pytest.mark.parametrize("zero", ["factor", "cancelling terms"])
def test_a_zero_update_has_no_direction(zero: str) -> None:
    x = LowRank(normal(1, 1, 3, 20), normal(2, 1, 30, 3))
    none = LowRank(x.a, torch.zeros_like(x.b))
    if zero == "cancelling terms":
        none = LowRank(torch.cat((x.a / 3, x.a), 1), torch.cat((x.b, -x.b / 3), 2))
    found = compared(x, none)
    assert (found.norms[1], found.cosine, found.writes, found.reads) == (0, None, None, None)
    assert (found.conflict, found.weighted_conflict) == (None, None)
    assert overall([found]).cosine is None


def test_blocks_are_compared_each_with_its_own() -> None:
    x, y = (LowRank(normal(i, 3, 2, 9), normal(i + 5, 3, 7, 2)) for i in (1, 2))
    parts = [
        compared(LowRank(x.a[i : i + 1], x.b[i : i + 1]), LowRank(y.a[i : i + 1], y.b[i : i + 1])) for i in range(3)
    ]
    found = compared(x, y)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(flat(x), flat(y), dim=0)), abs=1e-10)
    assert found.writes == pytest.approx(sum(one.writes or 0.0 for one in parts) / 3, abs=1e-10)
    assert found.conflict == pytest.approx(float((flat(x) * flat(y) < 0).double().mean()), abs=1e-12)


@pytest.mark.parametrize(("blocks", "rows"), [(1, 3000), (6, 500)])
def test_of_a_large_matrix_rows_are_sampled_and_the_share_is_near_the_true_one(blocks: int, rows: int) -> None:
    x, y = (LowRank(normal(i, blocks, 4, 1000), normal(i + 5, blocks, rows, 4)) for i in (1, 2))
    found = compared(x, y)
    product = flat(x) * flat(y)
    assert found.sampled
    assert found.of_elements == product.numel() == 3_000_000
    assert 400_000 < found.elements < 600_000
    assert found.conflict == pytest.approx(float((product < 0).double().mean()), abs=0.01)
    least = torch.minimum(flat(x).abs(), flat(y).abs())
    assert found.weighted_conflict == pytest.approx(float(least[product < 0].sum() / least.sum()), abs=0.02)
    assert found == compared(x, y)


def test_a_sample_is_not_of_one_place_in_each_head() -> None:
    x, y = (LowRank(normal(i, 1, 1, 1024), normal(i + 5, 1, 4096, 1)) for i in (1, 2))
    x.a.abs_(), y.a.abs_(), x.b.abs_(), y.b.abs_()
    y.b[0].view(-1, 8)[:, 4] *= -1  # every 8th row is opposed, in the place where an even step would begin
    found = compared(x, y)
    assert found.sampled
    assert found.conflict == pytest.approx(1 / 8, abs=0.01)


@pytest.mark.parametrize(("blocks", "rows"), [(1, 1), (5, 2), (2, 3)])
def test_of_few_but_long_rows_at_least_one_is_compared(blocks: int, rows: int) -> None:
    x = LowRank(normal(1, blocks, 1, 1_100_000), normal(2, blocks, rows, 1))
    found = compared(x, x)
    assert found.conflict == 0
    assert 0 < found.elements <= found.of_elements


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_of_what_is_not_finite_no_number_is_made_up(value: float) -> None:
    x = LowRank(normal(1, 1, 2, 6), normal(2, 1, 5, 2))
    bad = LowRank(torch.full_like(x.a, value), torch.full_like(x.b, value))
    found = compared(x, bad)
    assert found.cosine is not None
    assert math.isnan(found.cosine)
    assert (found.writes, found.reads, found.conflict) == (None, None, None)
    whole = overall([found])
    assert whole.cosine is not None
    assert math.isnan(whole.cosine)
    assert whole.kept is None


def test_a_module_that_one_adapter_alone_changes_counts_in_the_angle_of_both() -> None:
    x, y = (LowRank(normal(i, 1, 2, 6), normal(i + 5, 1, 5, 2)) for i in (1, 2))
    shared = compared(x, y)
    whole = overall([shared], ([4.0], []))
    expected = shared.inner / ((shared.norms[0] ** 2 + 16) ** 0.5 * shared.norms[1])
    assert whole.cosine == pytest.approx(expected)
    assert (whole.writes, whole.by_chance) == (pytest.approx(shared.writes), pytest.approx(shared.by_chance))
    assert overall([], ([1.0], [2.0])).cosine == 0
    assert overall([]).cosine is None


def test_all_modules_together_have_the_angle_of_the_stacked_updates_and_what_a_sum_keeps_of_each() -> None:
    pairs = [[LowRank(normal(10 * i + j, 1, 2, 6), normal(10 * i + j + 5, 1, 5, 2)) for j in (1, 2)] for i in range(3)]
    whole = overall([compared(x, y) for x, y in pairs])
    one, other = (torch.cat([flat(pair[side]) for pair in pairs]) for side in (0, 1))
    assert whole.cosine == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-10)
    assert whole.norms == pytest.approx((float(one.norm()), float(other.norm())), rel=1e-10)
    together = one + other
    assert whole.kept == pytest.approx((float(one @ together / (one @ one)), float(other @ together / (other @ other))))


def test_updates_of_other_sizes_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="m: updates of different sizes"):
        compared(LowRank(normal(1, 1, 2, 6), normal(2, 1, 5, 2)), LowRank(normal(1, 1, 2, 7), normal(2, 1, 5, 2)))
