"""Similarity of updates against the dense matrices that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from registry.core.errors import ShapeMismatch
from registry.merge.low_rank import LowRank
from registry.merge.similarity import compare_updates, overall

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


@given(updates())
def test_angle_subspaces_and_signs_are_those_of_the_dense_matrices(pair: tuple[LowRank, LowRank]) -> None:
    x, y = pair
    one, other = (update.b[0] @ update.a[0] for update in pair)
    found = compare_updates("m", x, y)
    assert found.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()), abs=1e-9)
    ranks = min(int(torch.linalg.matrix_rank(one)), int(torch.linalg.matrix_rank(other)))
    for measured, left, right in ((found.writes, one, other), (found.reads, one.mT, other.mT)):
        expected = float((projector(left) @ projector(right)).trace()) / ranks
        assert measured == pytest.approx(expected, abs=1e-8)
    assert found.conflict == pytest.approx(float((one * other < 0).double().mean()), abs=1e-12)
    least = torch.minimum(one.abs(), other.abs())
    assert found.weighted_conflict == pytest.approx(float(least[one * other < 0].sum() / least.sum()), abs=1e-9)
    assert (found.elements, found.sampled) == (one.numel(), False)


@given(updates())
def test_the_order_of_the_two_does_not_matter_and_other_factors_of_one_update_are_as_good(
    pair: tuple[LowRank, LowRank],
) -> None:
    x, y = pair
    mixing = torch.linalg.qr(normal(3, x.a.shape[1], x.a.shape[1])).Q * 2
    again = LowRank(torch.linalg.inv(mixing) @ x.a, x.b @ mixing)
    found, turned, refactored = compare_updates("m", x, y), compare_updates("m", y, x), compare_updates("m", again, y)
    for name in ("cosine", "writes", "reads"):
        assert getattr(turned, name) == pytest.approx(getattr(found, name), abs=1e-8)
        assert getattr(refactored, name) == pytest.approx(getattr(found, name), abs=1e-8)
    assert turned.conflict == found.conflict


def test_an_update_is_wholly_like_itself_and_opposed_to_its_negative() -> None:
    x = LowRank(normal(1, 2, 3, 20), normal(2, 2, 30, 3))
    same, opposed = compare_updates("m", x, x), compare_updates("m", x, LowRank(x.a, -x.b))
    assert (same.cosine, same.conflict) == (pytest.approx(1), 0)
    assert (opposed.cosine, opposed.conflict, opposed.weighted_conflict) == (pytest.approx(-1), 1, 1)
    assert (same.writes, opposed.reads) == (pytest.approx(1), pytest.approx(1))


def test_a_zero_update_has_no_direction() -> None:
    x = LowRank(normal(1, 1, 3, 20), normal(2, 1, 30, 3))
    found = compare_updates("m", x, LowRank(x.a, torch.zeros_like(x.b)))
    assert (found.cosine, found.writes, found.conflict) == (None, None, None)


def test_of_a_large_matrix_rows_are_sampled_and_the_share_is_near_the_true_one() -> None:
    x, y = (LowRank(normal(i, 1, 4, 2000), normal(i + 5, 1, 3000, 4)) for i in (1, 2))
    found = compare_updates("m", x, y)
    dense = (x.b @ x.a) * (y.b @ y.a)
    assert found.sampled
    assert 500_000 < found.elements < 1_100_000
    assert found.conflict == pytest.approx(float((dense < 0).double().mean()), abs=0.01)
    assert found == compare_updates("m", x, y)


def test_a_module_that_one_adapter_alone_changes_counts_in_the_angle_of_both() -> None:
    x, y = (LowRank(normal(i, 1, 2, 6), normal(i + 5, 1, 5, 2)) for i in (1, 2))
    shared = compare_updates("m", x, y)
    whole = overall([shared], ([4.0], []))
    expected = shared.inner / ((shared.norms[0] ** 2 + 16) ** 0.5 * shared.norms[1])
    assert whole.cosine == pytest.approx(expected)
    assert overall([], ([1.0], [2.0])).cosine == 0


def test_updates_of_other_sizes_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="m: updates of different sizes"):
        compare_updates(
            "m", LowRank(normal(1, 1, 2, 6), normal(2, 1, 5, 2)), LowRank(normal(1, 1, 2, 7), normal(2, 1, 5, 2))
        )
