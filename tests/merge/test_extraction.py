"""Differences of weights as modules of an adapter: the rank and the error are those of the SVD, for each way in which a
weight lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from registry.core.errors import InvalidInput, ShapeMismatch
from registry.core.model_form import Module, Parameter
from registry.merge.compress import RankChoice
from registry.merge.extraction import Extracted, difference, extract_module, update_shape_of


def module(kind: str, shape: tuple[int, ...], *, groups: int = 1) -> Module:
    name = "in_proj_weight" if kind == "attention" else "weight"
    return Module("m", kind, groups=groups, parameters=(Parameter(name, "F32", shape),))


def extracted(one: Module, delta: Tensor, rank: int, **options: object) -> Extracted:
    return extract_module("m", update_shape_of(one), delta, RankChoice(rank=rank), **options)  # type: ignore[arg-type]


KINDS = [
    (module("linear", (6, 8)), "linear"),
    (module("matrix", (6, 8)), "linear"),
    (module("transformers_conv1d", (8, 6)), "linear"),
    (module("embedding", (10, 4)), "embedding"),
    (module("attention", (24, 8)), "attention"),
    (module("conv1d", (6, 4, 3)), "conv1d"),
    (module("conv2d", (6, 4, 3, 2)), "conv2d"),
    (module("conv3d", (6, 2, 3, 1, 2)), "conv3d"),
]


@pytest.mark.parametrize(("one", "kind"), KINDS, ids=[one.kind for one, _ in KINDS])
def test_the_error_of_a_rank_is_that_of_the_svd(one: Module, kind: str) -> None:
    torch.manual_seed(0)
    shape = one.parameters[0].shape
    delta = torch.randn(shape)
    found = extracted(one, delta, 2)
    turned = one.kind in ("transformers_conv1d", "embedding")
    matrix = delta.T if turned else delta.reshape(shape[0], -1)
    values = torch.linalg.svdvals(matrix.double())
    assert (found.module.kind, found.rank) == (kind, 2)
    assert found.norm == pytest.approx(float(matrix.double().norm()))
    assert found.error == pytest.approx(float(values[2:].norm()), rel=1e-5)
    product = (found.module.factors.b @ found.module.factors.a)[0]
    assert float((matrix - product).norm()) == pytest.approx(found.error, rel=1e-4)
    full = extracted(one, delta, min(matrix.shape))
    assert full.error < 1e-5 * full.norm


def test_each_group_of_a_convolution_is_cut_by_itself_and_sees_its_own_channels() -> None:
    torch.manual_seed(0)
    delta = torch.randn(8, 3, 5)  # two groups of 4 rows, with 3 of 6 channels each
    found = extracted(module("conv1d", (8, 3, 5), groups=2), delta, 4)
    assert (found.module.kernel, found.module.rank) == ((6, 5), 8)
    product = (found.module.factors.b @ found.module.factors.a).reshape(2, 4, 6, 5)
    assert float(product[0, :, 3:].abs().max()) == float(product[1, :, :3].abs().max()) == 0
    torch.testing.assert_close(product[0, :, :3], delta[:4])
    torch.testing.assert_close(product[1, :, 3:], delta[4:])


def test_a_product_that_is_added_twice_is_half_as_large() -> None:
    delta = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    shape = update_shape_of(module("linear", (4, 4)), attention_out=True)
    found = extract_module("mha.out_proj", shape, delta, RankChoice(rank=4), times=2)
    assert found.module.kind == "attention_out"
    torch.testing.assert_close(2 * (found.module.factors.b @ found.module.factors.a)[0], delta)
    assert found.error < 1e-5


def test_the_error_has_the_rounding_of_the_factors_in_it() -> None:
    delta = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    found = extracted(module("linear", (16, 16)), delta, 16, dtype=torch.bfloat16)
    assert found.module.factors.a.dtype == torch.bfloat16
    product = found.module.factors.b.float() @ found.module.factors.a.float()
    assert found.error == pytest.approx(float((product[0] - delta).norm()), rel=1e-4)
    assert 1e-4 < found.error / found.norm < 1e-2


def test_what_is_not_finite_is_refused_with_the_side_that_it_is_on() -> None:
    good, bad = torch.zeros(2, 2), torch.full((2, 2), torch.nan)
    arguments = {"dtype": torch.float32, "device": "cpu", "name": "q.weight"}
    with pytest.raises(InvalidInput, match=r"q\.weight holds NaN or Inf in the base"):
        difference(bad, good, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"q\.weight holds NaN or Inf in the checkpoint"):
        difference(good, bad, **arguments)  # type: ignore[arg-type]
    huge = torch.full((2, 2), 3e38)
    with pytest.raises(InvalidInput, match="extract in float64"):
        difference(-huge, huge, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="its factors are beyond float16; ask for f32"):
        extracted(module("linear", (4, 4)), torch.full((4, 4), 1e30), 1, dtype=torch.float16)


def test_a_weight_of_another_shape_than_its_kind_has_is_refused() -> None:
    for one in (module("linear", (4,)), module("conv2d", (4, 4)), module("conv1d", (5, 3, 5), groups=2)):
        with pytest.raises(ShapeMismatch, match="has no weight of the shape"):
            update_shape_of(one)
