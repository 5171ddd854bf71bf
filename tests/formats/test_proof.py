"""Proving: what is the same function, what is another one, and by how much."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from registry.core.errors import Incompatible, InvalidInput
from registry.formats.probe import Probe
from registry.formats.probe_tree import LeftOut
from registry.formats.probing import make_probe
from registry.formats.proof import CODE, EXACT, OTHER_DEVICE, OutputDifference, Proof, allowed, compare, prove
from tests.operations.models import QV, assert_unchanged, lora, state_of, steps, walker


def probe_of(model: nn.Module, wanted: object = True, *, adapter: str | None = None) -> Probe:
    found = make_probe(model, wanted, adapter=adapter)
    assert isinstance(found, Probe), found
    return found


def change(model: nn.Module, name: str, by: float = 0.01) -> nn.Module:
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


# ---------------------------------------------------------------- models


def test_the_same_model_gives_the_same_outputs() -> None:
    proof = prove(walker(), probe_of(walker()))
    assert proof
    assert (proof.difference, proof.output, proof.allowed) == (0.0, "outputs", EXACT)
    proof.require("walk/base@1")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.q_proj.lora_A.default.weight",
        "base_model.model.v_proj.lora_B.default.weight",
        "base_model.model.head.weight",
    ],
)
def test_one_changed_tensor_is_noticed(name: str) -> None:
    probe = probe_of(lora(), adapter="default")
    proof = prove(change(lora(), name), probe)
    assert not proof
    assert 0 < proof.difference < math.inf
    with pytest.raises(Incompatible, match="walk/perturb@1: the function is not the one that was pushed") as refused:
        proof.require("walk/perturb@1")
    assert [(one.code, one.severity, one.subject) for one in refused.value.findings] == [(CODE, "error", "outputs")]


def test_a_wrong_scaling_is_noticed() -> None:
    assert not prove(lora(lora_alpha=9), probe_of(lora(), adapter="default"))
    assert not prove(lora(use_rslora=True), probe_of(lora(), adapter="default"))


def test_a_wrong_base_an_inactive_adapter_and_one_too_many_are_noticed() -> None:
    probe = probe_of(lora(), adapter="default")
    assert not prove(lora(walker(seed=1)), probe)
    off = lora()
    off.base_model.disable_adapter_layers()
    assert not prove(off, probe)
    both = lora()
    both.add_adapter("other", LoraConfig(**QV, init_lora_weights=False))
    assert prove(both, probe)
    both.base_model.set_adapter(["default", "other"])
    assert not prove(both, probe)


def test_a_merged_adapter_is_the_same_function() -> None:
    merged = lora(target_modules=["q_proj"]).merge_and_unload()
    proof = prove(merged, probe_of(lora(target_modules=["q_proj"]), adapter="default"))
    assert proof


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_is_the_same_function_within_what_it_can_tell_apart(dtype: torch.dtype) -> None:
    probe = probe_of(lora(), adapter="default")
    proof = prove(lora().to(dtype), probe)
    assert proof
    assert 0 < proof.worst.relative <= proof.allowed
    assert prove(lora(), probe_of(lora().to(dtype), adapter="default"))
    assert not prove(change(lora(), "base_model.model.head.bias", 0.5).to(dtype), probe)


def test_mixed_dtypes_are_judged_by_the_coarsest() -> None:
    class Mixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self[0].weight.dtype)
            return self[1](self[0](x).to(torch.bfloat16)).to(torch.float32)

    model = Mixed(nn.Linear(16, 4), nn.Linear(4, 4).to(torch.bfloat16))
    probe = probe_of(model)
    assert (probe.dtype, probe.coarsest) == ("float32", "bfloat16")
    assert prove(model, probe).allowed == 8 * 2**-7
    assert prove(model.to(torch.bfloat16), probe).allowed == 20 * 2**-7


def test_the_allowed_difference_follows_from_dtypes_and_devices() -> None:
    def limit(*dtypes: torch.dtype | None, device: bool = True, dtype: bool = True) -> float:
        return allowed(dtypes, same_device=device, same_dtype=dtype)

    assert limit(torch.float32) == limit(torch.float64, None) == limit() == EXACT
    assert limit(torch.float32, device=False) == OTHER_DEVICE
    assert limit(torch.float32, torch.bfloat16) == 8 * 2**-7
    assert limit(torch.bfloat16, torch.float32, dtype=False) == 20 * 2**-7
    assert limit(torch.bfloat16, device=False) == 20 * 2**-7
    assert limit(torch.float16, device=False, dtype=False) == 20 * 2**-10


def test_inputs_that_the_model_does_not_take_are_a_finding() -> None:
    class Narrow(nn.Linear):
        pass

    with pytest.raises(Incompatible, match="raised RuntimeError: mat1 and mat2") as refused:
        prove(Narrow(2, 2), probe_of(walker()), "walk/base@1")
    assert refused.value.findings[0].code == CODE


def test_a_model_is_left_as_it_was() -> None:
    model, probe = lora(), probe_of(lora(), adapter="default")
    model.train()
    before = state_of(model)
    generator = torch.get_rng_state()
    assert prove(model, probe)
    assert_unchanged(model, before)
    assert torch.equal(generator, torch.get_rng_state())
    with pytest.raises(Incompatible):
        prove(model, replace(probe, kwargs={"y": 1}))
    assert_unchanged(model, before)


def test_hooks_of_the_user_are_not_run() -> None:
    model = walker()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(InvalidInput, match="forward hook"):
        prove(model, probe_of(walker()))


def test_a_probe_is_of_use_for_what_stands_around_or_inside_another() -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"y": self.inner(batch["x"])}

    assert prove(Around(lora()), probe_of(lora(), adapter="default"))
    assert prove(lora(), probe_of(Around(lora()), adapter="default"))
    given = probe_of(Around(lora()), {"batch": {"x": steps()}}, adapter="default")
    assert prove(Around(lora()), given)
    with pytest.raises(Incompatible, match="does not take"):
        prove(lora(), given)


def test_a_transformers_adapter_wrapped_anew_is_the_same_function() -> None:
    from transformers import BertConfig, BertModel

    def bert() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return BertModel(BertConfig(vocab_size=32, **sizes)).eval()

    def wrapped() -> nn.Module:
        base = bert()
        base.name_or_path = "tiny"  # PEFT warns where it is empty
        return get_peft_model(base, LoraConfig(target_modules=["query"]))

    inside = bert()
    inside.add_adapter(LoraConfig(target_modules=["query"]))
    assert prove(wrapped(), probe_of(inside, adapter="default"))
    wrong = copy.deepcopy(inside)
    proof = prove(change(wrong, "encoder.layer.0.output.dense.bias"), probe_of(inside, adapter="default"))
    assert not proof
    assert proof.output == "outputs.last_hidden_state"


# ---------------------------------------------------------------- outputs


def of(expected: Any, found: Any) -> OutputDifference:
    comparison = compare(expected, found)
    assert comparison.findings == []
    assert len(comparison.differences) == 1
    return comparison.differences[0]


def test_a_difference_is_relative_to_what_is_typical_for_the_output() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for scale in (1e-3, 1.0, 1e6):
        found = of(values * scale, values * scale + 0.01 * scale)
        assert found.absolute == pytest.approx(0.01 * scale, rel=1e-3)
        assert found.relative == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min, -math.inf, math.nan])
@pytest.mark.parametrize("masked", [10, 700])
def test_masked_values_hide_no_difference(mask: float, masked: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    values[:masked] = mask
    other = values.clone()
    other[-1] += 0.01
    assert of(values, values.clone()).relative == 0.0
    assert of(values, other).relative > 1e-3


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, math.nan]),
        ([1.0, math.inf], [1.0, 2.0]),
        ([1.0, math.inf], [1.0, -math.inf]),
        ([1.0, 2.0], [1.0, math.inf]),
        ([math.nan, math.nan], [math.nan, 0.0]),
    ],
)
def test_nan_and_infinity_must_be_where_they_were(expected: list[float], found: list[float]) -> None:
    difference = of(torch.tensor(expected), torch.tensor(found))
    assert (difference.absolute, difference.relative) == (math.inf, math.inf)
    assert not Proof((difference,), 1.0)


def test_nan_where_it_was_is_no_difference() -> None:
    both = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert of(both, both.clone()) == OutputDifference("outputs", 0.0, 0.0)
    assert of(math.nan, math.nan) == OutputDifference("outputs", 0.0, 0.0)


def test_an_output_of_zeros_allows_only_what_rounding_leaves() -> None:
    assert of(torch.zeros(4), torch.full((4,), 1e-12)).relative < EXACT
    assert of(torch.zeros(4), torch.full((4,), 1e-6)).relative > EXACT


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_every_kind_are_compared(dtype: torch.dtype) -> None:
    one = torch.tensor([0, 1, 1]).to(dtype)
    assert of(one, one.clone()).relative == 0.0
    assert of(one, torch.tensor([1, 1, 1]).to(dtype)).relative > 0.1
    assert of(torch.zeros(0).to(dtype), torch.zeros(0).to(dtype)).relative == 0.0


def test_whole_numbers_count_only_where_nothing_is_rounded_otherwise() -> None:
    found = compare((torch.zeros(2), torch.tensor([3])), (torch.zeros(2), torch.tensor([4])), whole_numbers=False)
    assert [one.output for one in found.differences] == ["outputs.0"]
    assert found.left_out == ["outputs.1: whole numbers, on another device or in another dtype"]


@pytest.mark.parametrize(
    ("expected", "found", "subject"),
    [
        (torch.zeros(2), torch.zeros(3), "outputs"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "outputs"),
        (torch.zeros(2), None, "outputs"),
        ((torch.zeros(2),), [torch.zeros(2)], "outputs"),
        ((torch.zeros(2),), (torch.zeros(2), torch.zeros(2)), "outputs"),
        ({"a": torch.zeros(2)}, (torch.zeros(2),), "outputs"),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, "outputs.a"),
        ({"a": (torch.zeros(2), 3)}, {"a": (torch.zeros(2), 4)}, "outputs.a.1"),
        ({"a": "x"}, {"a": "y"}, "outputs.a"),
        ({"a": True}, {"a": 1}, "outputs.a"),
        (torch.zeros(2), LeftOut("DynamicCache"), "outputs"),
    ],
)
def test_another_structure_is_a_finding_that_names_the_place(expected: Any, found: Any, subject: str) -> None:
    findings = compare(expected, found).findings
    assert [(one.code, one.subject) for one in findings] == [(CODE, subject)]
    assert findings[0].expected != findings[0].found


def test_another_structure_refuses_the_proof() -> None:
    class Pair(nn.Module):
        def __init__(self, give: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.give = give

        def forward(self, x: Tensor) -> Any:
            return self.give(self.layer(x))

    with pytest.raises(Incompatible, match=r"C28 error: outputs\.y: the output is missing"):
        prove(Pair(lambda x: {"x": x}), probe_of(Pair(lambda x: {"x": x, "y": x})))


def test_what_was_not_recorded_is_not_compared_and_said_so() -> None:
    comparison = compare({"a": torch.zeros(1), "b": LeftOut("Cache")}, {"a": torch.zeros(1), "b": 1, "c": 2})
    assert comparison.findings == []
    assert comparison.left_out == ["outputs.b: a Cache is not kept", "outputs.c: was not recorded"]


def test_a_proof_tells_the_largest_difference_and_where_it_is() -> None:
    proof = Proof((OutputDifference("outputs.a", 2.0, 1e-9), OutputDifference("outputs.b", 0.1, 0.5)), 1e-5)
    assert (proof.difference, proof.output, proof.worst.output) == (2.0, "outputs.a", "outputs.b")
    with pytest.raises(Incompatible) as refused:
        proof.require("walk/perturb@1")
    assert [one.subject for one in refused.value.findings] == ["outputs.b"]
