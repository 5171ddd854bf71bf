"""Each method against its published definition, written out on small dense matrices with loops where it has loops, and
the laws that they all keep."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from registry.core.errors import InvalidInput, ShapeMismatch
from registry.merge import elementwise
from registry.merge.elementwise import drop_, elected_mean_, kth_largest, random_masks, trim_
from registry.merge.group import Group, Inner, Majority, Options
from registry.merge.low_rank import LowRank
from registry.merge.methods import DENSE, INNER, MAJORITIES, METHODS, OPTIONS, find_method

FACTOR_WISE = ("linear", "ties_factors", "dare_linear_factors", "dare_ties_factors", "magnitude_prune_factors")
SEEDS = st.integers(0, 2**31)
DENSITIES = st.sampled_from([0.05, 0.3, 0.5, 0.8, 1.0])
OUT, IN = 7, 9
GOLDEN_MASK = "0011001011010111010110011010001011100100"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group(
    number: int = 0,
    ranks: Sequence[int] = (2, 3, 1),
    *,
    batch: int = 2,
    out: int = OUT,
    columns: int = IN,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Group:
    """Random updates of unequal ranks, with scalings and weights that differ by source and by matrix."""
    n = len(ranks)
    updates = tuple(
        LowRank(normal(number + 10 * i, batch, r, columns), normal(number + 10 * i + 1, batch, out, r))
        for i, r in enumerate(ranks)
    )
    scalings = 0.5 + normal(number + 2, n, batch).abs()
    given_weights = (
        normal(number + 3, n, batch) if weights is None else torch.tensor(weights, dtype=torch.float64)[:, None]
    )
    keys = tuple(f"layers.{matrix}.q#0" for matrix in range(batch))
    made = Options(**options)
    return Group(updates, scalings, given_weights.expand(n, batch).contiguous(), keys, tuple(range(n)), made)


def group_for(name: str, number: int = 0, **options: Any) -> Group:
    """A group that the method takes, of as many sources as can be."""
    if name == "slerp":
        return group(number, (2, 3), weights=(0.3, 0.9), **options)
    return group(number, (2, 2, 2) if name in FACTOR_WISE else (2, 3, 1), **options)


def matrices_of(whole: Group, which: Sequence[int]) -> Group:
    chosen = list(which)
    return replace(
        whole,
        updates=tuple(LowRank(one.a[chosen], one.b[chosen]) for one in whole.updates),
        scalings=whole.scalings[:, chosen],
        weights=whole.weights[:, chosen],
        keys=tuple(whole.keys[matrix] for matrix in chosen),
    )


def sources_of(whole: Group, which: Sequence[int]) -> Group:
    chosen = list(which)
    return replace(
        whole,
        updates=tuple(whole.updates[source] for source in chosen),
        scalings=whole.scalings[chosen],
        weights=whole.weights[chosen],
        sources=tuple(whole.sources[source] for source in chosen),
    )


def merged(name: str, of: Group) -> Tensor:
    """(batch, out, in)"""
    found = find_method(name).function(of)
    return found if isinstance(found, Tensor) else found.b @ found.a


def deltas(of: Group, matrix: int) -> list[Tensor]:
    """Scaled, not weighted, of one matrix."""
    return [of.scalings[i, matrix] * update.b[matrix] @ update.a[matrix] for i, update in enumerate(of.updates)]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    assert float((found - expected).norm()) <= tolerance * max(1.0, float(expected.norm()))


# ---------------------------------------------------------------- definitions, element by element


def trimmed(x: Tensor, density: float) -> Tensor:
    if density == 1:
        return x
    kept = max(1, int(density * x.numel()))
    least = sorted((abs(one) for one in x.flatten().tolist()), reverse=True)[kept - 1]
    return torch.where(x.abs() >= least, x, 0)


def mask(stream: str, density: float, count: int) -> list[bool]:
    """Both halves of each 64-bit word of the generator, the lower first, against the density."""
    words = np.random.SFC64(int.from_bytes(hashlib.sha256(stream.encode()).digest(), "big")).random_raw(count)
    halves = [half for word in words.tolist() for half in (word % 2**32, word // 2**32)]
    return [half < round(density * 2**32) for half in halves[:count]]


def dropped(x: Tensor, density: float, stream: str) -> Tensor:
    if density == 1:
        return x
    return x * torch.tensor(mask(stream, density, x.numel())).view_as(x) / density


def elected_means(values: Sequence[Tensor], weights: Sequence[float], majority: Majority) -> Tensor:
    found = torch.zeros_like(values[0])
    for place in np.ndindex(*found.shape):
        elements = [float(one[place]) for one in values]
        votes = sum(elements) if majority == "total" else sum(math.copysign(1, x) for x in elements if x != 0)
        sign = 1 if votes >= 0 else -1
        agreeing = [(x, w) for x, w in zip(elements, weights, strict=True) if x * sign > 0]
        found[place] = sum(w * x for x, w in agreeing) / max(1, len(agreeing))
    return found


def elementwise_merge(
    how: str, values: Sequence[Tensor], of: Group, matrix: int, part: str = "", weights: Tensor | None = None
) -> Tensor:
    """What a method of this name does to one matrix of each source, by its definition."""
    options, numbers = of.options, (of.weights if weights is None else weights)[:, matrix].tolist()
    if how in ("ties", "magnitude_prune"):
        values = [trimmed(one, options.density) for one in values]
    if how.startswith("dare"):
        streams = [f"{options.seed} {source} {part} {of.keys[matrix]}" for source in of.sources]
        values = [dropped(one, options.density, stream) for one, stream in zip(values, streams, strict=True)]
    if how in ("ties", "dare_ties"):
        return elected_means(values, numbers, options.majority)
    return sum((w * one for w, one in zip(numbers, values, strict=True)), torch.zeros_like(values[0]))


# ---------------------------------------------------------------- methods that are exact on factors


@pytest.mark.parametrize("name", ["cat", "svd"])
def test_cat_and_svd_are_the_true_weighted_sum(name: str) -> None:
    of = group(batch=3)
    for matrix, found in enumerate(merged(name, of)):
        expected = sum(w * d for w, d in zip(of.weights[:, matrix], deltas(of, matrix), strict=True))
        assert_close(found, torch.as_tensor(expected), 1e-14)


def dense_slerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Shoemake 1985, on the flattened matrices."""
    cosine = float((x / x.norm() * (y / y.norm())).sum())
    if not abs(cosine) <= 0.9995:
        return (1 - t) * x + t * y
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


@given(SEEDS, st.floats(0, 3), st.floats(0.01, 3), st.sampled_from([1.0, -1.0, 0.0]))
def test_slerp_is_that_of_the_dense_updates(seed: int, first: float, second: float, scaling: float) -> None:
    of = group(seed, (2, 4), weights=(first, second))
    of.scalings[1] *= scaling
    for matrix, found in enumerate(merged("slerp", of)):
        x, y = deltas(of, matrix)
        assert_close(found, dense_slerp(x, y, second / (first + second)))


def test_slerp_keeps_the_norm_on_the_arc_and_cat_does_not() -> None:
    of = group(3, (2, 2), batch=1, weights=(0.5, 0.5))
    x, y = deltas(of, 0)
    of = replace(of, scalings=of.scalings / torch.stack((x.norm(), y.norm()))[:, None])
    assert float(merged("slerp", of).norm()) == pytest.approx(1, abs=1e-12)
    assert float(merged("cat", of).norm()) < 0.95


def test_slerp_goes_straight_between_parallel_opposite_and_zero_updates() -> None:
    of = group(4, (2, 2), batch=4, weights=(0.25, 0.75))
    a, b = of.updates[0].a, of.updates[0].b
    # Matrices: the same twice, its opposite, nearly the same, and zero as a difference of equal products.
    factors = torch.tensor([2.0, -1.0, 1.0, 0.0]).double()[:, None, None]
    second_b = b * factors
    second_b[2] += 1e-3 * normal(5, OUT, 2)
    second_b[3], second_a = torch.stack((b[3, :, 0], -b[3, :, 0]), dim=1), a.clone()
    second_a[3] = a[3, :1]
    of = replace(of, updates=(of.updates[0], LowRank(second_a, second_b)))
    for matrix, found in enumerate(merged("slerp", of)):
        x, y = deltas(of, matrix)
        assert_close(found, 0.25 * x + 0.75 * y, 1e-14)


@pytest.mark.parametrize("seed", range(8))
def test_slerp_takes_an_update_that_is_only_rounding_for_zero(seed: int) -> None:
    of = group(seed, (2, 3), weights=(0.25, 0.75))
    a, b = normal(seed, 2, 1, IN).expand(-1, 3, -1), of.updates[1].b / 3
    b[:, :, 2] = -(b[:, :, 0] + b[:, :, 1])
    of = replace(of, updates=(of.updates[0], LowRank(a, b)))
    for matrix, found in enumerate(merged("slerp", of)):
        x, y = deltas(of, matrix)
        assert float(y.norm()) < 1e-14
        assert_close(found, 0.25 * x, 1e-13)


def test_slerp_of_one_source_is_its_share() -> None:
    of = group(5, (2, 2), weights=(0.3, 0.7))
    alone = sources_of(of, [1])
    expected = torch.stack([0.7 * deltas(of, matrix)[1] for matrix in range(2)])
    assert_close(merged("slerp", alone), expected, 1e-14)
    assert float(merged("slerp", replace(alone, weights=0 * alone.weights)).abs().max()) == 0
    nothing = replace(of, updates=(LowRank(of.updates[0].a, 0 * of.updates[0].b), of.updates[1]))
    assert_close(merged("slerp", nothing), expected, 1e-14)


@pytest.mark.parametrize("weights", [(-0.1, 1.0), (0.0, 0.0), (0.5, -0.5)])
def test_slerp_refuses_weights_that_are_no_shares(weights: tuple[float, float]) -> None:
    with pytest.raises(InvalidInput, match=r"layers\.0\.q#0: slerp takes weights .* found \[.*use cat or svd"):
        merged("slerp", group(0, (2, 2), weights=weights))


def test_slerp_refuses_three_sources_and_a_negative_share_alone() -> None:
    with pytest.raises(InvalidInput, match="expected 2, found 3"):
        merged("slerp", group(0, (2, 2, 2), weights=(1, 1, 1)))
    with pytest.raises(InvalidInput, match="slerp takes weights"):
        merged("slerp", sources_of(group(0, (2, 2), weights=(-1, 2)), [0]))


def dense_knots(of: Group, matrix: int) -> Tensor:
    """Stoica et al. 2024: SVD of the dense updates side by side, the inner method on each V_i^T."""
    parts = deltas(of, matrix)
    u, s, vh = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    rank = int((s > 1e-9).sum())
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    for column in range(rank):  # the convention for a sign that an SVD leaves open
        if float(u[:, column][u[:, column].abs().argmax()]) < 0:
            u[:, column], vh[column] = -u[:, column], -vh[column]
    aligned = vh.split(parts[0].shape[1], dim=1)
    return u * s @ elementwise_merge(of.options.inner, aligned, of, matrix)


@given(SEEDS, st.sampled_from(INNER), st.sampled_from(MAJORITIES), DENSITIES, st.booleans())
def test_knots_is_that_of_the_dense_svd(
    seed: int, inner: Inner, majority: Majority, density: float, wide: bool
) -> None:
    # Ranks whose sum is above the number of rows, too.
    ranks = (4, 3, 5) if wide else (2, 1, 3)
    of = group(seed, ranks, inner=inner, majority=majority, density=density, seed=seed)
    for matrix, found in enumerate(merged("knots", of)):
        assert_close(found, dense_knots(of, matrix))


def test_knots_counts_no_vectors_of_zero_singular_values() -> None:
    of = group(6, (2, 2, 3), batch=3, density=0.4)
    twice = of.updates[0].a.clone(), of.updates[0].b.clone()
    twice[0][1], twice[1][1] = (
        of.updates[1].a[1],
        of.updates[1].b[1],
    )  # of the second matrix alone no update is repeated
    nothing = LowRank(of.updates[2].a, of.updates[2].b.clone())
    nothing.b[2] = 0
    of = replace(of, updates=(of.updates[0], LowRank(*twice), nothing))
    for matrix, found in enumerate(merged("knots", of)):
        assert_close(found, dense_knots(of, matrix))


def test_knots_of_zero_updates_is_zero() -> None:
    of = group(6, (2, 2))
    of = replace(of, updates=tuple(LowRank(one.a, 0 * one.b) for one in of.updates))
    assert_close(merged("knots", of), torch.zeros(2, OUT, IN).double(), 0)


def dense_tsv(of: Group, matrix: int) -> Tensor:
    """Gargiulo et al. 2024, with all r_i singular values of a source."""
    us, ss, vs = [], [], []
    for one, update, weight in zip(deltas(of, matrix), of.updates, of.weights[:, matrix], strict=True):
        u, s, vh = torch.linalg.svd(one, full_matrices=False)
        rank = min(update.a.shape[1], len(s))
        us.append(u[:, :rank])
        ss.append(weight * s[:rank])
        vs.append(vh[:rank].T)
    sides = []
    for side in (us, vs):
        p, _, qh = torch.linalg.svd(torch.cat(side, dim=1), full_matrices=False)
        sides.append(p @ qh)
    return sides[0] * torch.cat(ss) @ sides[1].T


@given(SEEDS, st.sampled_from([(2, 3), (1, 2, 3), (4, 3, 5), (8, 2)]))
def test_tsv_is_that_of_the_dense_svds(seed: int, ranks: tuple[int, ...]) -> None:
    of = group(seed, ranks)
    for matrix, found in enumerate(merged("tsv", of)):
        assert_close(found, dense_tsv(of, matrix))


def test_tsv_of_updates_in_orthogonal_directions_is_their_sum() -> None:
    of = group(7, (2, 2))
    left, right = torch.linalg.qr(normal(8, 2, OUT, 4)).Q, torch.linalg.qr(normal(9, 2, IN, 4)).Q
    updates = tuple(LowRank(right[:, :, part].mT, left[:, :, part]) for part in (slice(0, 2), slice(2, 4)))
    of = replace(of, updates=updates)
    assert_close(merged("tsv", of), merged("cat", of))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tsv_of_one_update_twice_is_the_mean_of_its_weights(dtype: torch.dtype) -> None:
    of = group(8, (3, 3), weights=(0.5, 2.0))
    of = replace(of, updates=(of.updates[0],) * 2, scalings=of.scalings[:1].expand(2, -1))
    expected = 1.25 * torch.stack([deltas(of, matrix)[0] for matrix in range(2)])
    assert_close(merged("tsv", in_dtype(of, dtype)).double(), expected, 1e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_tsv_a_zero_update_takes_no_direction_from_others(dtype: torch.dtype) -> None:
    of = group(9)
    rank_one = LowRank(of.updates[1].a, of.updates[1].b[:, :, :1].expand(-1, -1, 3))  # of the rank 1, factors of 3
    of = replace(of, updates=(of.updates[0], rank_one, LowRank(of.updates[2].a, 0 * of.updates[2].b)))
    found = merged("tsv", in_dtype(of, dtype)).double()
    product = LowRank(rank_one.a.sum(1, keepdim=True), rank_one.b[:, :, :1])
    plain = replace(sources_of(of, [0, 1]), updates=(of.updates[0], product))
    for matrix in range(2):
        assert_close(found[matrix], dense_tsv(plain, matrix), 1e3 * torch.finfo(dtype).eps)


# ---------------------------------------------------------------- methods on the elements


@given(SEEDS, st.sampled_from(DENSE), st.sampled_from(MAJORITIES), DENSITIES)
def test_methods_on_dense_updates_are_their_definitions(
    seed: int, name: str, majority: Majority, density: float
) -> None:
    of = group(seed, majority=majority, density=density, seed=seed)
    for matrix, found in enumerate(merged(name, of)):
        assert_close(found, elementwise_merge(name, deltas(of, matrix), of, matrix), 1e-13)


@given(SEEDS, st.sampled_from(FACTOR_WISE), st.sampled_from(MAJORITIES), DENSITIES)
def test_methods_on_factors_are_their_definitions(seed: int, name: str, majority: Majority, density: float) -> None:
    of = group(seed, (3, 3, 3), majority=majority, density=density, seed=seed)
    how = name.removesuffix("_factors")
    found = find_method(name).function(of)
    assert isinstance(found, LowRank)
    root = of.coefficients.abs().sqrt()
    for matrix in range(2):
        a, b = ([getattr(one, letter)[matrix] for one in of.updates] for letter in ("a", "b"))
        signed = root * of.coefficients.sign()
        assert_close(found.a[matrix], elementwise_merge(how, a, of, matrix, "A", signed), 1e-13)
        assert_close(found.b[matrix], elementwise_merge(how, b, of, matrix, "B", root), 1e-13)


@pytest.mark.parametrize("name", FACTOR_WISE)
def test_methods_on_factors_refuse_two_ranks_and_name_both(name: str) -> None:
    of = replace(group(0, (2, 4)), sources=(1, 4))
    with pytest.raises(ShapeMismatch, match=r"layers\.0\.q#0.*source 2 has 2, source 5 has 4; .*cat"):
        merged(name, of)


def test_ties_votes_without_weights_and_counts_those_that_agree() -> None:
    values = [
        torch.tensor([[[3.0, -1.0, 0.0]]]),
        torch.tensor([[[-2.0, -1.0, 0.0]]]),
        torch.tensor([[[1.0, 4.0, -5.0]]]),
    ]
    weights = torch.tensor([[1.0], [10.0], [-1.0]])
    # 3 - 2 + 1 is +: (3 - 1) / 2. -1 - 1 + 4 is +: -4. 0 + 0 - 5 is -: 5.
    assert elected_mean_([one.clone() for one in values], weights, "total").tolist() == [[[1.0, -4.0, 5.0]]]
    # Two of three are -: (-1 - 10) / 2.
    assert elected_mean_([one.clone() for one in values], weights, "frequency").tolist() == [[[1.0, -5.5, 5.0]]]


@pytest.mark.parametrize("majority", MAJORITIES)
def test_an_even_vote_is_decided_for_plus(majority: Majority) -> None:
    values = [torch.tensor([[[2.0, -2.0, 0.0]]]), torch.tensor([[[-2.0, 2.0, 0.0]]])]
    assert elected_mean_(values, torch.tensor([[3.0], [5.0]]), majority).tolist() == [[[6.0, 10.0, 0.0]]]


def test_trim_keeps_all_that_tie_and_never_nothing() -> None:
    values = torch.tensor(
        [[[1.0, -2.0, 2.0, 0.5], [2.0, 0.1, -0.2, 3.0]], [[0.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, -6.0]]]
    )
    assert trim_(values.clone(), 0.25).tolist() == [
        [[0.0, -2.0, 2.0, 0.0], [2.0, 0.0, 0.0, 3.0]],
        [[0.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, -6.0]],
    ]
    assert trim_(values.clone(), 1e-9)[0].tolist() == [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]]
    assert torch.equal(trim_(values.clone(), 1.0), values)


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5]) | st.floats(0, 9, width=32), min_size=1, max_size=400),
    st.data(),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_kth_largest_is_that_of_a_sort(
    values: list[float], data: st.DataObject, samples: int, dtype: torch.dtype
) -> None:
    k = data.draw(st.integers(1, len(values)) | st.just(1) | st.just(len(values)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise, "_WORTH_SAMPLING", 1)
        patch.setattr(elementwise, "_SAMPLES", samples)
        patch.setattr(elementwise, "CHUNK", 64)
        found = kth_largest(torch.tensor(values, dtype=dtype), k)
    assert float(found) == sorted(values, reverse=True)[k - 1]


@pytest.mark.parametrize("k", [1, 2, 1000, 250_000, 499_999, 500_000])
@pytest.mark.parametrize("kind", ["product", "constant", "half zeros", "few values"])
def test_the_kth_largest_of_many_is_that_of_a_sort(kind: str, k: int) -> None:
    values = (normal(1, 500, 4) @ normal(2, 4, 1000)).abs().flatten()
    if kind == "constant":
        values = torch.full_like(values, 0.25)
    if kind == "half zeros":
        values[::2] = 0
    if kind == "few values":
        values = values.round()
    assert torch.equal(kth_largest(values, k), values.sort(descending=True).values[k - 1])


@pytest.mark.parametrize("bracket", [(50.0, 60.0), (-2.0, -1.0), (0.5, 0.6), (0.0, 0.0)])
def test_a_sample_that_misleads_costs_time_alone(bracket: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_bracket", lambda values, k: tuple(map(torch.tensor, bracket)))
    values = normal(1, 300_000).abs()
    assert torch.equal(kth_largest(values, 290_000), values.sort(descending=True).values[289_999])


@pytest.mark.parametrize("first", [-3, -2, -1, 0, 1])
@pytest.mark.parametrize("width", [0, 1, 2])
def test_a_bracket_may_end_at_what_is_looked_for(first: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, k = normal(2, 300_000).abs(), 1000
    ranked = values.sort(descending=True).values
    at = k - 1 + first
    monkeypatch.setattr(elementwise, "_bracket", lambda values, k: (ranked[at + width], ranked[at]))
    assert torch.equal(kth_largest(values, k), ranked[k - 1])


def test_the_kth_largest_is_selected_from_few(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    kthvalue = Tensor.kthvalue
    monkeypatch.setattr(Tensor, "kthvalue", lambda self, k: sizes.append(len(self)) or kthvalue(self, k))
    values = (normal(1, 800, 4) @ normal(2, 4, 1250)).abs().flatten()
    for k in (1, 200_000, 500_000, 999_999):
        kth_largest(values, k)
    assert len(sizes) == 4
    assert max(sizes) < 50_000


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in METHODS if "density" in OPTIONS[name]]
    groups = {name: group_for(name, 11, density=0.5) for name in names}
    whole = {name: merged(name, of) for name, of in groups.items()}
    monkeypatch.setattr(elementwise, "CHUNK", 4)
    for name, of in groups.items():
        assert torch.equal(merged(name, of), whole[name])


# ---------------------------------------------------------------- random masks


def test_masks_are_the_same_for_ever() -> None:
    (found,) = random_masks("0 1  layers.0.q#0", 0.5, [40])
    assert "".join("01"[bit] for bit in found.tolist()) == GOLDEN_MASK
    assert found.tolist() == mask("0 1  layers.0.q#0", 0.5, 40)


def test_masks_keep_the_share_that_is_asked_for() -> None:
    for density in (0.001, 0.2, 0.9, 1 - 2**-40):
        (found,) = random_masks("any", density, [400_000])
        assert float(found.mean()) == pytest.approx(density, abs=4 * math.sqrt(density * (1 - density) / 400_000))


def test_masks_differ_by_seed_source_part_and_key() -> None:
    streams = ["0 0  k", "1 0  k", "0 1  k", "0 0 A k", "0 0 B k", "0 0  l", "0 0  k\udc80"]
    found = {next(random_masks(stream, 0.5, [64])).tobytes() for stream in streams}
    assert len(found) == len(streams)


def test_what_is_dropped_is_made_up_for() -> None:
    x = normal(1, 1, 5, 6)
    mean = sum(drop_(x.clone(), 0.5, [f"{seed}"]) for seed in range(4000)) / 4000
    assert_close(torch.as_tensor(mean), x, 0.05)
    kept = drop_(x.clone(), 0.5, ["0"])
    assert torch.equal(kept[kept != 0], (x * 2)[kept != 0])
    assert 0 < int((kept == 0).sum()) < 30


def test_dare_draws_by_number_of_source_and_by_key() -> None:
    of = group(1, (2,), batch=1, weights=[1.0], density=0.5)
    first = merged("dare_linear", of)
    assert torch.equal(merged("dare_linear", of), first)
    others = (
        replace(of, sources=(3,)),
        replace(of, keys=("layers.7.q#0",)),
        replace(of, options=replace(of.options, seed=1)),
    )
    for other in others:
        assert not torch.equal(merged("dare_linear", other) == 0, first == 0)


# ---------------------------------------------------------------- laws of all methods


def test_the_table_of_methods_says_what_they_are() -> None:
    for name in METHODS:
        method = find_method(name)
        assert method.name == name
        assert method.options == OPTIONS[name]
        assert (method.form == "dense") == (name in DENSE)
        assert method.factor_wise == (name in FACTOR_WISE)
        assert isinstance(method.function(group_for(name)), Tensor) == (name in DENSE)


@given(SEEDS, st.sampled_from(sorted(METHODS)), st.sampled_from(INNER), st.sampled_from(MAJORITIES))
def test_one_source_of_weight_one_is_itself(seed: int, name: str, inner: Inner, majority: Majority) -> None:
    of = group(seed, (3,), weights=[1.0], inner=inner, majority=majority)
    expected = torch.stack([deltas(of, matrix)[0] for matrix in range(2)])
    assert_close(merged(name, of), expected, 1e-12)


@given(SEEDS, st.sampled_from(sorted(METHODS)), st.sampled_from(INNER), st.sampled_from([-2.0, 0.0, 0.7, 3.0]))
def test_a_factor_of_all_weights_is_a_factor_of_the_result(seed: int, name: str, inner: Inner, factor: float) -> None:
    of = group_for(name, seed, density=0.5, inner=inner)
    scaled = replace(of, weights=of.weights * factor)
    if name != "slerp":
        assert_close(merged(name, scaled), factor * merged(name, of), 1e-12)
    elif factor > 0:  # a share of the way, whatever the scale
        assert_close(merged(name, scaled), merged(name, of), 1e-12)


@given(
    SEEDS,
    st.sampled_from(sorted(METHODS)),
    st.sampled_from(INNER),
    st.sampled_from(MAJORITIES),
    st.permutations(range(3)),
)
def test_the_order_of_sources_does_not_matter(
    seed: int, name: str, inner: Inner, majority: Majority, order: list[int]
) -> None:
    of = group_for(name, seed, density=0.5, inner=inner, majority=majority)
    order = [source for source in order if source < len(of.sources)]
    assert_close(merged(name, sources_of(of, order)), merged(name, of), 1e-11)


@given(SEEDS, st.sampled_from(sorted(METHODS)), st.sampled_from(INNER))
def test_a_batch_is_as_many_batches_of_one(seed: int, name: str, inner: Inner) -> None:
    of = group_for(name, seed, density=0.5, inner=inner, batch=3)
    found = merged(name, of)
    for matrix in range(3):
        assert_close(merged(name, matrices_of(of, [matrix])), found[matrix : matrix + 1], 1e-11)
    assert_close(merged(name, matrices_of(of, [2, 0])), found[[2, 0]], 1e-11)


def in_dtype(of: Group, dtype: torch.dtype) -> Group:
    updates = tuple(LowRank(one.a.to(dtype), one.b.to(dtype)) for one in of.updates)
    return replace(of, updates=updates, scalings=of.scalings.to(dtype), weights=of.weights.to(dtype))


@pytest.mark.parametrize("name", METHODS)
def test_float32_gives_float32_and_nearly_the_same(name: str) -> None:
    of = group_for(name, 12, density=0.5)
    found = merged(name, in_dtype(of, torch.float32))
    assert found.dtype == torch.float32
    assert_close(found.double(), merged(name, of), 1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("transposed", [False, True])
def test_inputs_are_not_changed_however_they_lie_in_memory(name: str, transposed: bool) -> None:
    of = group_for(name, 13, density=0.5)
    expected = merged(name, of)
    if transposed:
        laid_out = [LowRank(one.a.mT.contiguous().mT, one.b.mT.contiguous().mT) for one in of.updates]
        of = replace(of, updates=tuple(laid_out))
    before = [(one.a.clone(), one.b.clone()) for one in of.updates], of.scalings.clone(), of.weights.clone()
    assert_close(merged(name, of), expected, 1e-12)
    assert all(
        torch.equal(one.a, a) and torch.equal(one.b, b) for one, (a, b) in zip(of.updates, before[0], strict=True)
    )
    assert torch.equal(of.scalings, before[1])
    assert torch.equal(of.weights, before[2])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_updates_and_the_same_update_twice_give_finite_results(name: str, dtype: torch.dtype) -> None:
    of = in_dtype(group_for(name, 14, density=0.5), dtype)
    zero = replace(of, updates=tuple(LowRank(one.a, 0 * one.b) for one in of.updates))
    assert float(merged(name, zero).abs().max()) == 0
    one_zero = replace(of, updates=(zero.updates[0], *of.updates[1:]))
    same = replace(of, updates=(of.updates[0],) * len(of.updates))
    for case in (one_zero, same):
        found = merged(name, case)
        assert torch.isfinite(found).all()
        assert float(found.abs().max()) > 0


@pytest.mark.parametrize("name", [name for name in METHODS if name != "slerp"])
def test_weights_of_zero_give_zero(name: str) -> None:
    of = group_for(name, 15, density=0.5)
    assert float(merged(name, replace(of, weights=0 * of.weights)).abs().max()) == 0


@pytest.mark.parametrize("name", [name for name in METHODS if "density" in OPTIONS[name]])
def test_density_prunes(name: str) -> None:
    whole = group_for(name, 16)
    half = replace(whole, options=replace(whole.options, density=0.5))
    assert float((merged(name, whole) - merged(name, half)).norm()) > 0.05 * float(merged(name, whole).norm())
