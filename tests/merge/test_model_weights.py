"""One weight with updates in it, against algebra written out; what the rounding takes; and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from registry.core.errors import InvalidInput, ShapeMismatch
from registry.merge import adding
from registry.merge.low_rank import LowRank
from registry.merge.model_weights import WeightUpdate, added_update, merged_bias, merged_weight
from tests.merge.updates import linear, update

F64 = torch.float64


def rand(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def factors(one: WeightUpdate) -> tuple[Tensor, Tensor]:
    return one.tensors[one.module.a], one.tensors[one.module.b]


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-10, rtol=0)


# ---------------------------------------------------------------- what is computed


def test_weights_and_scalings_multiply_each_adapters_product_and_all_are_added() -> None:
    base = rand(6, 8)
    updates = [
        replace(linear(6, 8, 2, seed=1, lora_alpha=6), weight=0.5),
        replace(linear(6, 8, 4, seed=2, lora_alpha=3, use_rslora=True), weight=-2.0),
        replace(linear(6, 8, 3, seed=3), weight=0.0),
    ]
    (a, b), (c, d) = factors(updates[0]), factors(updates[1])
    before = base.clone()
    found = merged_weight(base, updates, dtype=F64)
    assert close(found.tensor, base + 0.5 * (6 / 2) * (b @ a) - 2 * (3 / math.sqrt(4)) * (d @ c))
    assert torch.equal(base, before)
    assert (found.elements, found.moving, found.unmoved) == (48, 48, 0)


def test_a_weight_stored_the_other_way_round_gets_the_transpose() -> None:
    one = linear(6, 8, 2)
    a, b = factors(one)
    base = rand(8, 6)
    assert close(merged_weight(base, [one], dtype=F64).tensor, base + (b @ a).T)


@pytest.mark.parametrize(
    ("turned", "flag", "transposed"),
    [(True, False, True), (False, True, False), (None, True, True), (None, False, False)],
)
def test_a_square_weight_is_turned_where_its_module_or_else_the_configuration_says_so(
    turned: bool | None, flag: bool, transposed: bool
) -> None:
    one = linear(6, 6, 2, fan_in_fan_out=flag)
    a, b = factors(one)
    base = rand(6, 6)
    expected = base + ((b @ a).T if transposed else b @ a)
    assert close(merged_weight(base, [one], turned=turned, dtype=F64).tensor, expected)


def test_a_convolutions_update_is_a_sum_over_ranks_of_kernels() -> None:
    a, b = rand(3, 4, 2, 5, seed=1), rand(6, 3, 1, 1, seed=2)
    one = update(("lora_A.weight", a), ("lora_B.weight", b), r=3, lora_alpha=6)
    base = rand(6, 4, 2, 5)
    expected = base + 2 * torch.einsum("or,ricd->oicd", b[:, :, 0, 0], a)
    assert close(merged_weight(base, [one], dtype=F64).tensor, expected)


def test_an_embeddings_update_is_the_transpose_of_its_product() -> None:
    a, b = rand(2, 10, seed=1), rand(8, 2, seed=2)
    one = update(("lora_embedding_A", a), ("lora_embedding_B", b), r=2, lora_alpha=2)
    base = rand(10, 8)
    assert close(merged_weight(base, [one], dtype=F64).tensor, base + (b @ a).T)
    square = update(("lora_embedding_A", a[:, :8]), ("lora_embedding_B", b), r=2, lora_alpha=2)
    assert close(merged_weight(base[:8], [square], dtype=F64).tensor, base[:8] + (b @ a[:, :8]).T)


def dora(base: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
    """Row by row, as the paper has it; all of (out, in)."""
    rows = []
    for row, out in enumerate(base):
        moved = out + scaling * (b[row] @ a)
        rows.append(magnitude[row] * moved / moved.square().sum().sqrt())
    return torch.stack(rows)


def with_magnitude(kind: str, weight: float, seed: int) -> tuple[WeightUpdate, Callable[[Tensor], Tensor]]:
    """A DoRA, and what it makes of a base of (out, in) = (6, 8)."""
    a, b, magnitude = rand(2, 8, seed=seed), rand(6, 2, seed=seed + 1), rand(6, seed=seed + 2).abs() + 1
    names = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    parts = (names[0], a), (names[1], b), ("lora_magnitude_vector", magnitude)
    one = update(*parts, weight=weight, r=2, lora_alpha=3, use_dora=True)
    return one, lambda base: dora(base, a, b, magnitude, 1.5)


@pytest.mark.parametrize("kind", ["linear", "turned", "embedding"])
def test_doras_are_scaled_by_the_norm_of_the_base_as_it_is_and_add_up_with_any_weight(kind: str) -> None:
    base = rand(6, 8)
    stored = base if kind == "linear" else base.T.contiguous()
    (first, of_first), (second, of_second) = with_magnitude(kind, 0.7, 1), with_magnitude(kind, -0.4, 20)
    expected = base + 0.7 * (of_first(base) - base) - 0.4 * (of_second(base) - base)
    updates = [first, second]
    if kind != "embedding":
        plain = linear(6, 8, 3, seed=40)
        a, b = factors(plain)
        updates.append(replace(plain, weight=2.0))
        expected = expected + 2 * (b @ a)
    found = merged_weight(stored, updates, dtype=F64)
    assert close(found.tensor if kind == "linear" else found.tensor.T, expected)
    assert found.norm == pytest.approx(float((expected - base).norm()))


def test_a_doras_kernel_counts_in_its_norm() -> None:
    a, b, magnitude = rand(2, 4, 3, 3, seed=1), rand(6, 2, 1, 1, seed=2), rand(6, seed=3)
    parts = ("lora_A.weight", a), ("lora_B.weight", b), ("lora_magnitude_vector", magnitude.reshape(1, 6, 1, 1))
    one = update(*parts, r=2, lora_alpha=2, use_dora=True)
    base = rand(6, 4, 3, 3)
    expected = dora(base.flatten(1), a.flatten(1), b.flatten(1), magnitude, 1.0).reshape(base.shape)
    assert close(merged_weight(base, [one], dtype=F64).tensor, expected)


def experts(d1: int, d2: int, *, first: bool, version: str | None) -> tuple[WeightUpdate, Tensor]:
    """Factors of three experts, and what PEFT makes of them; `first`: A takes d1."""
    inputs, out = (d1, d2) if first else (d2, d1)
    a, b = rand(6, inputs, seed=1), rand(out, 6, seed=2)
    parts = ("lora_A.weight", a), ("lora_B.weight", b)
    settings: dict[str, Any] = {"target_parameters": ["ex.down"], "target_modules": []}
    one = update(*parts, module="ex", r=2, lora_alpha=4, peft_version=version, **settings)
    into = "e i o" if first else "e o i"
    by_expert = a.reshape(3, 2, inputs), b.reshape(out, 2, 3)
    return one, 2 * torch.einsum(f"o r e, e r i -> {into}", by_expert[1], by_expert[0])


@pytest.mark.parametrize("first", [True, False])
def test_experts_of_two_sizes_show_which_of_them_a_takes(first: bool) -> None:
    one, expected = experts(5, 8, first=first, version=None)
    base = rand(3, 5, 8)
    assert close(merged_weight(base, [one], dtype=F64).tensor, base + expected)


@pytest.mark.parametrize(
    ("version", "is_transposed", "first"),
    [
        ("0.18.0", None, True),
        ("0.18.0", False, True),
        ("0.19.0", True, False),
        ("0.19.0", False, True),
        ("0.19.1", False, False),
        ("0.21.0", True, True),
        ("0.21.0.dev0", False, False),
    ],
)
def test_square_experts_lie_as_the_peft_that_wrote_them_has_it(
    version: str, is_transposed: bool | None, first: bool
) -> None:
    one, expected = experts(8, 8, first=first, version=version)
    base = rand(3, 8, 8)
    assert close(merged_weight(base, [one], turned=is_transposed, dtype=F64).tensor, base + expected)


@pytest.mark.parametrize(("version", "is_transposed"), [(None, True), ("0.21.0", None)])
def test_square_experts_of_which_nothing_is_known_are_refused(version: str | None, is_transposed: bool | None) -> None:
    one, _ = experts(8, 8, first=False, version=version)
    with pytest.raises(InvalidInput, match=r"ex\.down: the experts are square.* is not known"):
        merged_weight(rand(3, 8, 8), [one], turned=is_transposed)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_an_update_that_is_merged_already_lies_as_its_sources_do(dense: bool, shape: tuple[int, int]) -> None:
    like = linear(6, 8, 2)
    a, b = rand(1, 2, 8, seed=1), rand(1, 6, 2, seed=2)
    base = rand(*shape)
    merged = b @ a if dense else LowRank(a, b)
    found = added_update(base, merged, module=like.module, config=like.config, dtype=F64)
    expected = (b @ a)[0] if shape == (6, 8) else (b @ a)[0].T
    assert close(found.tensor, base + expected)
    assert found.norm == pytest.approx(float(expected.norm()))


def test_a_merged_update_of_a_convolution_has_its_kernel_in_the_columns() -> None:
    like = update(("lora_A.weight", rand(3, 4, 2, 5)), ("lora_B.weight", rand(6, 3, 1, 1)), r=3)
    base, dense = rand(6, 4, 2, 5), rand(1, 6, 40, seed=3)
    found = added_update(base, dense, module=like.module, config=like.config, dtype=F64)
    assert close(found.tensor, base + dense.reshape(6, 4, 2, 5))
    with pytest.raises(ShapeMismatch, match="q: the adapter changes a weight of"):
        added_update(base, dense[:, :, :20], module=like.module, config=like.config)


def test_biases_of_b_are_added_to_the_modules_own() -> None:
    bias, own = rand(6), rand(6, seed=2)
    parts = ("lora_A.weight", rand(2, 8)), ("lora_B.weight", rand(6, 2)), ("lora_B.bias", own)
    one = update(*parts, weight=0.5, r=2, lora_alpha=8, lora_bias=True)
    found = merged_bias(bias, [one, linear(6, 8, 2)], dtype=F64)
    assert close(found.tensor, bias + 0.5 * 4 * own)
    with pytest.raises(ShapeMismatch, match=r"the adapter's bias has the shape \[6\], the base's \[5\]"):
        merged_bias(bias[:5], [one])


# ---------------------------------------------------------------- precision and memory


@pytest.mark.parametrize(("std", "unmoved", "error"), [(1e-5, 0.89, 0.89), (1e-4, 0.35, 0.32), (1e-3, 0.039, 0.033)])
def test_what_bf16_takes_of_a_small_update_is_reported(std: float, unmoved: float, error: float) -> None:
    """The table of registry's notes on merging: a base of standard deviation 0.02 in bfloat16."""
    base = (rand(512, 512) * 0.02).bfloat16()
    one = linear(512, 512, 16, std=std / 4)  # a sum of 16 products
    found = merged_weight(base, [one])
    assert found.unmoved_share == pytest.approx(unmoved, rel=0.1)
    assert found.relative_error == pytest.approx(error, rel=0.1)
    a, b = factors(one)
    exact = b @ a
    applied = found.tensor.double() - base.double()
    assert found.unmoved == int(torch.eq(found.tensor, base).sum())
    assert found.relative_error == pytest.approx(float((applied - exact).norm() / exact.norm()), rel=1e-4)
    assert found.norm == pytest.approx(float(exact.norm()), rel=1e-5)


def test_an_element_that_no_update_reaches_does_not_count_as_unmoved() -> None:
    one = linear(6, 8, 2)
    factors(one)[1][3:] = 0
    found = merged_weight(rand(6, 8).bfloat16(), [one])
    assert (found.elements, found.moving, found.unmoved) == (48, 24, 0)
    nothing = merged_weight(rand(6, 8).bfloat16(), [replace(one, weight=0.0)])
    assert (nothing.moving, nothing.unmoved_share, nothing.relative_error) == (0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_the_result_has_the_bases_dtype_and_is_rounded_once(dtype: torch.dtype) -> None:
    base = rand(64, 64).to(dtype)
    updates = [linear(64, 64, 4, seed=seed, std=0.01) for seed in range(3)]
    exact = base.double() + sum(b @ a for a, b in map(factors, updates))
    found = merged_weight(base, updates, dtype=F64).tensor
    assert found.dtype == dtype
    assert torch.allclose(found, exact.to(dtype), atol=1e-14 if dtype == F64 else 0.0, rtol=0)


def test_a_float64_base_loses_nothing_to_float32() -> None:
    base, one = rand(6, 8), linear(6, 8, 2)
    assert torch.equal(merged_weight(base, [one]).tensor, merged_weight(base, [one], dtype=F64).tensor)


@pytest.mark.parametrize("kind", ["linear", "turned", "embedding"])
def test_how_many_rows_are_worked_on_at_a_time_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = rand(6, 8) if kind == "linear" else rand(8, 6)
    updates = [with_magnitude(kind, 0.7, 1)[0], with_magnitude(kind, 0.2, 5)[0]]
    whole = merged_weight(base, updates, dtype=F64)
    monkeypatch.setattr(adding, "BLOCK_ELEMENTS", 2 * base.shape[1])
    pieces = merged_weight(base, updates, dtype=F64)
    assert torch.allclose(pieces.tensor, whole.tensor, atol=1e-14)
    assert (pieces.moving, pieces.norm) == (whole.moving, pytest.approx(whole.norm))


def test_a_view_of_a_larger_tensor_is_merged_into_as_any_other() -> None:
    one = linear(6, 8, 2)
    wide = rand(6, 16)
    assert close(
        merged_weight(wide[:, ::2], [one], dtype=F64).tensor,
        merged_weight(wide[:, ::2].clone(), [one], dtype=F64).tensor,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["linear", "turned", "embedding"])
def test_a_gpu_gives_what_the_cpu_gives(kind: str) -> None:
    base = rand(6, 8) if kind == "linear" else rand(8, 6)
    updates = [with_magnitude(kind, 0.7, 1)[0], with_magnitude(kind, 0.2, 5)[0]]
    here, there = (merged_weight(base, updates, dtype=F64, device=device) for device in ("cpu", "cuda"))
    assert there.tensor.device == base.device
    assert close(there.tensor, here.tensor)
    assert (there.moving, there.norm) == (here.moving, pytest.approx(here.norm))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["a factor (adapter 2 of 2)", "the base's tensor"])
def test_what_is_not_finite_is_named(value: float, place: str) -> None:
    base, updates = rand(6, 8), [linear(6, 8, 2), replace(linear(6, 8, 2, seed=1), weight=0.0)]
    (base if place.startswith("the base") else factors(updates[1])[0])[1, 1] = value
    with pytest.raises(InvalidInput) as caught:
        merged_weight(base, updates)
    assert f"q: {place} holds NaN or Inf" in str(caught.value)


def test_a_result_that_a_dtype_cannot_hold_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"q: the merged weight does not fit float16: an element is beyond 65504"):
        merged_weight(rand(6, 8).half(), [replace(linear(6, 8, 2), weight=1e6)])
    assert merged_weight(rand(6, 8).bfloat16(), [replace(linear(6, 8, 2), weight=1e6)]).tensor.isfinite().all()


def test_a_dora_without_a_norm_or_a_magnitude_is_refused() -> None:
    one, _ = with_magnitude("linear", 1.0, 1)
    base = rand(6, 8)
    base[2] = factors(one)[1][2] = 0
    with pytest.raises(InvalidInput, match="q: DoRA divides by the norm"):
        merged_weight(base, [one], dtype=F64)
    name = one.module.tensors[2]
    one.tensors[name][0] = math.nan
    with pytest.raises(InvalidInput, match="q: the magnitude holds NaN or Inf"):
        merged_weight(rand(6, 8), [one])
    without = linear(6, 8, 2, use_dora=True)
    with pytest.raises(InvalidInput, match="q has no lora_magnitude_vector, and use_dora is True"):
        merged_weight(rand(6, 8), [without])


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changed the base weight as well"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights lora_ga changed the base weight as well"),
        ({"kasa_config": {"beta": 1}}, "KaSA changes the base weight as well"),
        ({"arrow_config": {"top_k": 2}}, "Arrow routes between several adapters"),
        ({"use_qalora": True}, "QA-LoRA pools the input"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA works after certain tokens alone"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication has several layers of one weight"),
        ({"of_the_future": True}, "the option of_the_future"),
        ({"lora_alpha": None}, "lora_alpha is unknown"),
    ],
)
def test_a_variant_that_is_no_change_of_the_weight_says_so(option: dict[str, Any], reason: str) -> None:
    one, base = linear(6, 8, 2, **option), rand(6, 8)
    with pytest.raises(InvalidInput, match=f"q cannot be merged into a base: {reason}"):
        merged_weight(base, [one])
    if "init_lora_weights" in option:
        a, b = factors(one)
        assert close(merged_weight(base, [one], own_base=True, dtype=F64).tensor, base + b @ a)
    else:
        with pytest.raises(InvalidInput, match=reason):
            merged_weight(base, [one], own_base=True)


def test_a_grouped_convolution_is_refused() -> None:
    one = update(("lora_A.weight", rand(4, 4, 3, 3)), ("lora_B.weight", rand(8, 2, 1, 1)), r=4)
    for weight in (rand(8, 2, 3, 3), rand(8, 4, 3, 3)):
        with pytest.raises(InvalidInput, match="it is a grouped convolution, and PEFT's A takes the channels of all"):
            merged_weight(weight, [one])
    with pytest.raises(InvalidInput, match="it is a grouped convolution"):
        added_update(rand(8, 2, 3, 3), rand(2, 4, 36), module=one.module, config=one.config)


@pytest.mark.parametrize("shape", [(6, 9), (8,), (2, 6, 8), (6, 8, 1)])
def test_a_weight_of_another_shape_is_named_with_what_was_expected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match=r"q: the adapter changes a weight of \[6, 8\] or \[8, 6\], and the base's"):
        merged_weight(rand(*shape), [linear(6, 8, 2)])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_weight_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidInput, match="dequantise the base first"):
        merged_weight(torch.zeros(6, 8).to(dtype), [linear(6, 8, 2)])


def test_numbers_that_make_no_sense_are_named() -> None:
    one = linear(6, 8, 2)
    with pytest.raises(InvalidInput, match="the weight of an adapter is nan"):
        merged_weight(rand(6, 8), [replace(one, weight=math.nan)])
    with pytest.raises(InvalidInput, match="attention_out_times is 3"):
        merged_weight(rand(6, 8), [one], attention_out_times=3)
    with pytest.raises(InvalidInput, match="float32 or float64, not in"):
        merged_weight(rand(6, 8), [one], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected at least one"):
        merged_weight(rand(6, 8), [])
