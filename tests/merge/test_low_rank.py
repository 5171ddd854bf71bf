"""Factors against the dense matrices that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from registry.core.errors import ShapeMismatch
from registry.merge.low_rank import LowRank, cosine, delta_weight, distance, inner_product, low_rank, norm

SIZES = st.integers(1, 7)
SCALINGS = st.sampled_from([2.0, 0.5, 1 / math.sqrt(3), -1.0, 0.0])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def updates(draw: st.DrawFn) -> tuple[LowRank, LowRank]:
    """Two updates of one weight: of any ranks, also above the sizes, of one block or several."""
    blocks, rows, columns, seed = draw(st.integers(1, 3)), draw(SIZES), draw(SIZES), draw(st.integers(0, 2**32))
    one, two = (
        low_rank(normal(seed + i, blocks, r, columns), normal(seed + i + 2, blocks, rows, r), scaling=draw(SCALINGS))
        for i, r in enumerate((draw(SIZES), draw(SIZES)))
    )
    return one, two


def dense(x: LowRank) -> Tensor:
    return x.b @ x.a


def size(x: LowRank) -> float:
    return float(x.a.norm() * x.b.norm())


@given(updates())
def test_norms_products_and_distances_are_those_of_the_dense_matrices(pair: tuple[LowRank, LowRank]) -> None:
    x, y = pair
    close = 1e-13 * (size(x) + size(y))
    assert norm(x) == pytest.approx(float(dense(x).norm()), abs=close)
    assert distance(x, y) == pytest.approx(float((dense(x) - dense(y)).norm()), abs=close)
    assert inner_product(x, y) == pytest.approx(float((dense(x) * dense(y)).sum()), abs=1e-13 * size(x) * size(y))
    angle = cosine(x, y)
    if norm(x) > 1e-6 * size(x) and norm(y) > 1e-6 * size(y):
        expected = float((dense(x) * dense(y)).sum() / dense(x).norm() / dense(y).norm())
        assert angle == pytest.approx(expected, abs=1e-6)


@given(updates())
def test_the_laws_of_a_distance_hold(pair: tuple[LowRank, LowRank]) -> None:
    x, y = pair
    assert distance(x, x) == distance(y, y) == 0
    assert distance(x, y) == pytest.approx(distance(y, x), abs=1e-13 * (size(x) + size(y)))
    assert distance(x, y) <= (norm(x) + norm(y)) * (1 + 1e-12)
    angle = cosine(x, y)
    assert angle is None or -1 <= angle <= 1


@pytest.mark.parametrize("step", [1e-3, 1e-8, 1e-12])
@pytest.mark.parametrize("moved", ["a", "b"])
def test_nearly_equal_updates_lose_no_digits(step: float, moved: str) -> None:
    a, b = normal(1, 8, 300), normal(2, 200, 8)
    nudged = {"a": a, "b": b}
    nudged[moved] = nudged[moved] * (1 + step * normal(3, *nudged[moved].shape))
    exact = float((b @ (nudged["a"] - a)).norm() if moved == "a" else ((nudged["b"] - b) @ a).norm())
    x, y = low_rank(a, b, scaling=2.0), low_rank(nudged["a"], nudged["b"], scaling=2.0)
    assert distance(x, y) == pytest.approx(2 * exact, rel=1e-9)
    if step < 1e-7:
        squares = norm(x) ** 2 + norm(y) ** 2 - 2 * inner_product(x, y)
        assert math.sqrt(max(squares, 0.0)) != pytest.approx(2 * exact, rel=0.1)  # why it is not computed so


@pytest.mark.parametrize("factor", [-1.0, 1e6, 1e-6])
def test_the_same_update_in_other_factors_is_at_no_distance(factor: float) -> None:
    a, b = normal(1, 4, 30), normal(2, 20, 4)
    x, other = low_rank(a, b, scaling=1.0), low_rank(a / factor, b * factor, scaling=1.0)
    wider = low_rank(torch.cat((a, a)), torch.cat((b, b), dim=1) / 2, scaling=1.0)
    for y in (other, wider):
        assert distance(x, y) < 1e-13 * norm(x)
        assert distance(y, x) < 1e-13 * norm(x)
        assert cosine(x, y) == pytest.approx(1)


def test_factors_that_cancel_have_no_norm() -> None:
    a, b = normal(1, 1, 30), normal(2, 20, 1)
    x = low_rank(torch.cat((a, a)), torch.cat((b, -b), dim=1), scaling=1.0)
    assert norm(x) < 1e-14 * size(x)


def test_zero_updates_have_no_angle() -> None:
    a, b = normal(1, 4, 30), normal(2, 20, 4)
    x, fresh = low_rank(a, b, scaling=1.0), low_rank(a, torch.zeros(20, 4), scaling=1.0)
    assert norm(fresh) == 0
    assert cosine(x, fresh) is None
    assert cosine(fresh, fresh) is None
    assert distance(x, fresh) == pytest.approx(norm(x), rel=1e-13)


def test_nan_stays_nan() -> None:
    a, b = normal(1, 4, 30), normal(2, 20, 4)
    x, broken = (
        low_rank(a, b, scaling=1.0),
        low_rank(a.clone().index_fill_(0, torch.tensor(1), math.nan), b, scaling=1.0),
    )
    assert math.isnan(norm(broken))
    assert math.isnan(distance(x, broken))
    assert math.isnan(cosine(x, broken) or 0)


def test_half_precision_is_computed_in_double() -> None:
    a, b = normal(1, 4, 30).bfloat16(), normal(2, 20, 4).bfloat16()
    x = low_rank(a, b, scaling=0.5)
    assert norm(x) == pytest.approx(float(0.5 * (b.double() @ a.double()).norm()), rel=1e-14)


def test_the_dense_update_is_float32_and_leaves_its_factors_alone() -> None:
    a, b = normal(1, 4, 30).bfloat16(), normal(2, 20, 4).bfloat16()
    before = a.clone(), b.clone()
    made = delta_weight(a, b, scaling=0.5)
    assert (made.dtype, tuple(made.shape)) == (torch.float32, (20, 30))
    torch.testing.assert_close(made.double(), 0.5 * (b.double() @ a.double()), rtol=1e-5, atol=1e-5)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"A \[4, 30\] and B \[20, 5\]"):
        delta_weight(torch.zeros(4, 30), torch.zeros(20, 5), scaling=1.0)
    with pytest.raises(ShapeMismatch):
        low_rank(torch.zeros(2, 4, 30), torch.zeros(3, 20, 4), scaling=1.0)
    x = low_rank(torch.zeros(4, 30), torch.zeros(20, 4), scaling=1.0)
    y = low_rank(torch.zeros(4, 31), torch.zeros(20, 4), scaling=1.0)
    for between in (distance, inner_product, cosine):
        with pytest.raises(ShapeMismatch, match="different sizes"):
            between(x, y)
