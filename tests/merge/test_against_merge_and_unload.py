"""PEFT's own merge on real layers is the truth where it is right; where it is not, plain algebra and the model's own
forward are, and what PEFT does instead is shown."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from registry.core.errors import InvalidInput
from registry.merge.lora_modules import update_of
from registry.merge.model_weights import merged_weight
from tests.merge.updates import adapted, base_tensors, merged_tensors, updates_of
from tests.operations.models import zoo

RIGHT: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["lin"]},
    "Conv1D of transformers": {"target_modules": ["transposed"], "fan_in_fan_out": True},
    "conv1d, conv2d, conv3d": {"target_modules": ["conv1", "conv2", "conv3"]},
    "embedding": {"target_modules": ["emb"]},
    "DoRA of a linear": {"target_modules": ["lin"], "use_dora": True},
    "DoRA of a Conv1D": {"target_modules": ["transposed"], "use_dora": True, "fan_in_fan_out": True},
    "DoRA of convolutions": {"target_modules": ["conv1", "conv2", "conv3"], "use_dora": True},
    "DoRA of an embedding": {"target_modules": ["emb"], "use_dora": True},
    "rsLoRA": {"target_modules": ["lin", "conv2", "emb"], "use_rslora": True},
    "patterns": {
        "target_modules": ["lin", "conv2", "emb"],
        "rank_pattern": {"^lin": 2, r"conv\d": 3},
        "alpha_pattern": {"l.n": 10, "^emb$": 7},
    },
    "lora_bias": {"target_modules": ["lin", "conv2", "transposed"], "lora_bias": True, "fan_in_fan_out": True},
    "experts": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "parameter of two dimensions": {"target_modules": [], "target_parameters": ["lin.weight"]},
}
PRECISION = {torch.float64: 1e-10, torch.float32: 2e-6}


def unloaded(model: PeftModel, **options: Any) -> dict[str, Tensor]:
    """What PEFT makes of a copy."""
    return copy.deepcopy(model).merge_and_unload(**options).state_dict()


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("kind", RIGHT)
def test_the_merged_base_is_that_of_peft(kind: str, dtype: torch.dtype) -> None:
    model = adapted(zoo().to(dtype), **RIGHT[kind])
    expected, base = unloaded(model), base_tensors(model)
    found = merged_tensors(base, [updates_of(model)], dtype=dtype)
    assert found.keys() == expected.keys()
    assert any(not torch.equal(found[name], base[name]) for name in base)
    for name, one in expected.items():
        assert found[name].dtype == one.dtype
        assert torch.allclose(found[name], one, atol=PRECISION[dtype], rtol=0), name


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", RIGHT)
def test_in_bf16_the_truth_is_rounded_once_and_peft_is_never_nearer_to_it(kind: str, safe_merge: bool) -> None:
    model = adapted(zoo().bfloat16(), **RIGHT[kind])
    of_peft, base, updates = unloaded(model, safe_merge=safe_merge), base_tensors(model), [updates_of(model)]
    wide = {name: one.double() for name, one in base.items()}
    truth = merged_tensors(wide, updates, dtype=torch.float64)
    for name, one in merged_tensors(base, updates).items():
        # Float32 may turn a tie of the last rounding.
        assert (one == truth[name].bfloat16()).double().mean() > 0.99, name
        assert (one - truth[name]).norm() <= (of_peft[name] - truth[name]).norm() * (1 + 1e-4), name


def test_several_adapters_are_added_as_peft_adds_them() -> None:
    options = {"target_modules": ["lin", "conv2", "emb"]}
    model = adapted(zoo().double(), names=("a", "b", "c"), **options)
    base = base_tensors(model)
    model.base_model.set_adapter(["a", "c"])
    found = merged_tensors(base, [updates_of(model, name) for name in ("a", "c")], dtype=torch.float64)
    expected = unloaded(model)
    assert all(torch.allclose(found[name], one, atol=1e-10, rtol=0) for name, one in expected.items())
    named = unloaded(model, adapter_names=["b"])
    alone = merged_tensors(base, [updates_of(model, "b")], dtype=torch.float64)
    assert all(torch.allclose(alone[name], one, atol=1e-10, rtol=0) for name, one in named.items())


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_lie_as_peft_has_them_whatever_the_module_says_of_its_weights(transposed: bool) -> None:
    """PEFT 0.21 lays A along the last dimension of (experts, d1, d2), and along d1 where the module says
    `is_transposed`; the shapes show which."""
    base = zoo().double()
    base.experts.is_transposed = transposed
    model = adapted(base, target_modules=[], target_parameters=["experts.up_proj"])
    before = base_tensors(model)
    (update,) = updates_of(model).values()
    assert update.tensors[update.module.a].shape[1] == (16 if transposed else 8)
    found = merged_tensors(before, [{"experts.up_proj": update}], dtype=torch.float64)
    assert torch.allclose(found["experts.up_proj"], unloaded(model)["experts.up_proj"], atol=1e-10, rtol=0)


# ---------------------------------------------------------------- where PEFT is wrong


def naive(base: Tensor, model: PeftModel, path: str, name: str = "default", times: float = 1.0) -> Tensor:
    """W + times * s B A, written out."""
    update = updates_of(model, name)[path]
    factors = update_of(update.module, update.tensors)
    return base + times * (factors.b[0] @ factors.a[0]).reshape(base.shape)


def test_peft_adds_the_update_of_an_attentions_out_proj_twice() -> None:
    torch.manual_seed(0)
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, batch_first=True)}).double()
    model = adapted(attention, target_modules=["mha"])
    base, updates = base_tensors(model), updates_of(model)
    inner, outer = "mha.in_proj_weight", "mha.out_proj.weight"
    once, twice = (merged_tensors(base, [updates], attention_out_times=one, dtype=torch.float64) for one in (1, 2))
    assert torch.allclose(once[inner], naive(base[inner], model, "mha"), atol=1e-10)
    assert torch.allclose(once[outer], naive(base[outer], model, "mha.out_proj"), atol=1e-10)
    assert torch.allclose(twice[outer], naive(base[outer], model, "mha.out_proj", times=2), atol=1e-10)
    of_peft = unloaded(model)
    assert torch.allclose(of_peft[inner], once[inner], atol=1e-10)
    assert torch.allclose(of_peft[outer], twice[outer], atol=1e-10)
    assert not torch.allclose(of_peft[outer], once[outer], atol=1e-3)
    # What the adapter computes in PEFT is the double as well, so that is what a merge is asked for.
    plain = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    plain.load_state_dict({name.removeprefix("mha."): one for name, one in twice.items()})
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(plain(x, x, x)[0], model.base_model.model["mha"](x, x, x)[0], atol=1e-10)


def test_a_bias_of_an_attentions_out_proj_is_added_once_by_peft_too() -> None:
    model = adapted(zoo().double(), target_modules=["mha"], lora_bias=True)
    expected = unloaded(model)
    base, updates = base_tensors(model), updates_of(model)
    with torch.no_grad():  # nothing trains it in PEFT
        updates["mha"].tensors["base_model.model.mha.lora_B.bias"].zero_()
    found = merged_tensors(base, [updates], attention_out_times=2, dtype=torch.float64)
    assert all(torch.allclose(found[name], one, atol=1e-10, rtol=0) for name, one in expected.items())
    with torch.no_grad():
        updates["mha"].tensors["base_model.model.mha.lora_B.bias"].fill_(1.0)
    with pytest.raises(InvalidInput, match="mha: PEFT never uses the bias of an attention's in_proj"):
        merged_tensors(base, [updates], dtype=torch.float64)


def test_a_grouped_convolution_is_refused_with_the_reason_where_peft_has_no_answer() -> None:
    model = adapted(zoo(), target_modules=["grouped"])
    with pytest.raises(NotImplementedError, match="groups > 1"):
        unloaded(model)
    with pytest.raises(InvalidInput, match=r"grouped cannot be merged into a base: .* the channels of all groups"):
        merged_tensors(base_tensors(model), [updates_of(model)])


def test_a_lora_bias_on_a_module_without_bias_names_the_module_where_peft_stops_in_the_middle() -> None:
    model = adapted(nn.ModuleDict({"q": nn.Linear(8, 6, bias=False)}), target_modules=["q"], lora_bias=True)
    weight = base_tensors(model)["q.weight"]
    broken = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="Impossible to merge"):
        broken.merge_and_unload()
    assert not torch.equal(base_tensors(broken)["q.weight"], weight)  # changed all the same
    with pytest.raises(InvalidInput, match=r"q: the adapter has a bias .* expected a bias of 6 elements, found none"):
        merged_tensors(base_tensors(model), [updates_of(model)])


def test_an_overflow_in_half_precision_is_named_where_peft_writes_infinities() -> None:
    base = nn.ModuleDict({"q": nn.Linear(8, 6)}).half()
    model = adapted(base, target_modules=["q"])
    with torch.no_grad():
        model.base_model.model["q"].lora_B["default"].weight.fill_(1e6)
    assert unloaded(model)["q.weight"].isinf().any()
    with pytest.raises(InvalidInput, match=r"q: the merged weight does not fit float16: an element is beyond 65504"):
        merged_tensors(base_tensors(model), [updates_of(model)])


def test_pefts_safe_merge_in_bf16_rounds_twice_and_is_further_from_the_truth() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"q": nn.Linear(256, 256, bias=False)})
    nn.init.normal_(base["q"].weight, std=0.02)
    model = adapted(base.bfloat16(), target_modules=["q"])
    with torch.no_grad():
        model.base_model.model["q"].lora_B["default"].weight.mul_(0.05)
    weight = base_tensors(model)["q.weight"]
    delta = naive(torch.zeros(256, 256, dtype=torch.float64), model, "q")

    def error(tensor: Tensor) -> float:
        return float(((tensor.double() - weight.double()) - delta).norm() / delta.norm())

    found = merged_weight(weight, [updates_of(model)["q"]])
    assert error(found.tensor) == pytest.approx(found.relative_error, rel=1e-4)
    assert error(found.tensor) < error(unloaded(model, safe_merge=True)["q.weight"])
    assert error(found.tensor) <= error(unloaded(model)["q.weight"]) * (1 + 1e-6)


def test_two_doras_add_up_in_any_order_where_peft_applies_one_to_the_other() -> None:
    model = adapted(
        nn.ModuleDict({"q": nn.Linear(8, 6)}).double(), names=("a", "b"), target_modules=["q"], use_dora=True
    )
    base = base_tensors(model)
    both = [
        merged_tensors(base, [updates_of(model, one) for one in order], dtype=torch.float64) for order in ("ab", "ba")
    ]
    assert torch.allclose(both[0]["q.weight"], both[1]["q.weight"], atol=1e-12)
    alone = [unloaded(model, adapter_names=[name])["q.weight"] - base["q.weight"] for name in ("a", "b")]
    assert torch.allclose(both[0]["q.weight"], base["q.weight"] + alone[0] + alone[1], atol=1e-10)
    of_peft = [unloaded(model, adapter_names=list(order))["q.weight"] for order in ("ab", "ba")]
    assert not torch.allclose(of_peft[0], of_peft[1], atol=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_changed_the_base_is_merged_into_what_it_left_and_refused_elsewhere(init: str) -> None:
    model = adapted(zoo(), target_modules=["lin"], init_lora_weights=init)
    base, updates = base_tensors(model), updates_of(model)
    expected = unloaded(model)
    found = merged_tensors(base, [updates], own_base=True)
    assert all(torch.allclose(found[name], one, atol=2e-6, rtol=0) for name, one in expected.items())
    with pytest.raises(InvalidInput, match=f"lin cannot be merged into a base: init_lora_weights {init} changed"):
        merged_tensors(base, [updates])
