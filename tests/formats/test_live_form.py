"""The form of live models: rows, kinds, ties, and that wrappers change nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from registry.core.errors import InvalidInput
from registry.core.model_form import ROLE, Module, Parameter, read_model_form
from registry.formats import live_form as module_under_test
from registry.formats.live_form import live_form
from registry.formats.source import Source
from registry.operations.forms import add_form
from registry.operations.opening import Opening, open_source

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **more}))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 12, 3, groups=4, bias=False)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 4, 3)
        self.head = nn.Linear(8, 10, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.arange(4))
        self.register_buffer("not_kept", torch.arange(4), persistent=False)


def test_each_kind_has_its_sizes() -> None:
    rows = live_form(Net()).by_path
    assert (rows["embed"].kind, rows["embed"].in_features, rows["embed"].out_features) == ("embedding", 10, 8)
    assert rows["embed"].bias is None
    conv = Module(
        "conv", "conv1d", "Conv1d", 8, 12, bias=False, groups=4, parameters=(Parameter("weight", "F32", (12, 2, 3)),)
    )
    assert rows["conv"] == conv
    attention = rows["attention"]
    assert (attention.kind, attention.in_features, attention.out_features, attention.bias) == ("attention", 8, 8, True)
    assert [one.name for one in attention.parameters] == ["in_proj_bias", "in_proj_weight"]
    assert (rows["attention.out_proj"].kind, rows["attention.out_proj"].type_name) == (
        "linear",
        "NonDynamicallyQuantizableLinear",
    )
    assert rows["norm"].kind == "other"
    assert [one.name for one in rows["norm"].parameters] == [
        *("bias", "num_batches_tracked", "running_mean", "running_var", "weight")
    ]
    assert rows["up"].kind == "other"
    assert [one.dtype for one in rows["head"].parameters] == ["BF16", "BF16"]


def test_the_model_itself_has_a_row_with_persistent_buffers_alone() -> None:
    rows = live_form(Net()).by_path
    assert rows[""].parameters == (Parameter("kept", "I64", (4,)), Parameter("scale", "F32", (3,)))


@pytest.mark.parametrize(("dimensions", "kind"), [(2, nn.Conv2d), (3, nn.Conv3d)])
def test_convolutions_of_more_dimensions(dimensions: int, kind: type[nn.Module]) -> None:
    (row,) = live_form(kind(4, 6, 1, groups=2)).modules
    assert (row.kind, row.in_features, row.out_features, row.groups) == (f"conv{dimensions}d", 4, 6, 2)


def test_conv1d_of_transformers_is_turned() -> None:
    model = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    row = live_form(model).by_path["h.0.attn.c_attn"]
    assert (row.kind, row.in_features, row.out_features, row.bias) == ("transformers_conv1d", 8, 24, True)


def test_fused_experts_are_experts() -> None:
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SMALL, num_key_value_heads=1, head_dim=8, num_local_experts=3)
        )
    row = live_form(model).by_path["model.layers.1.mlp.experts"]
    assert row.kind == "experts"
    assert row.parameter("gate_up_proj") == Parameter("gate_up_proj", "F32", (3, 48, 16))
    assert row.parameter("down_proj") is not None


# ---------------------------------------------------------------- quantised


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: by name, and with packed bytes."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)


class TorchQuantLinear(nn.Module):
    """As GPTQModel has it."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = 8, 4, None
        self.register_buffer("qweight", torch.zeros(1, 4, dtype=torch.int32))


class Packed(torch.Tensor):
    """As torchao and quanto have it: a tensor that shows another one than it stores."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...]) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "detach":
            return cls(tuple(args[0].shape))
        raise NotImplementedError(func)


def packed_linear() -> nn.Module:
    linear = nn.Linear(8, 4, bias=False)
    linear.weight = nn.Parameter(Packed((4, 8)), requires_grad=False)
    return linear


def integer_linear() -> nn.Module:
    linear = nn.Linear(8, 4, bias=False)
    linear.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    return linear


def dynamic() -> nn.Module:
    from torch.ao.nn.quantized.dynamic import Linear

    return Linear(8, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make", [Linear4bit, TorchQuantLinear, packed_linear, integer_linear, dynamic])
def test_quantised_modules_are_known_without_their_library(make: Any) -> None:
    row = live_form(nn.ModuleDict({"q": make()})).by_path["q"]
    assert (row.kind, row.in_features, row.out_features) == ("quantised", 8, 4)


def test_a_packed_weight_has_no_dtype() -> None:
    row = live_form(nn.ModuleDict({"q": packed_linear()})).by_path["q"]
    assert row.parameters == (Parameter("weight", "", (4, 8)),)


def test_a_float_attention_output_is_not_quantised() -> None:
    # The class is called NonDynamicallyQuantizableLinear.
    assert "quantised" not in {row.kind for row in live_form(nn.MultiheadAttention(8, 2)).modules}


# ---------------------------------------------------------------- ties


def test_a_shared_parameter_ties_the_later_module() -> None:
    form = live_form(llama(tie_word_embeddings=True))
    assert form.by_path["lm_head"].tied_to == "model.embed_tokens"
    assert form.ties["lm_head"] == ("model.embed_tokens", "lm_head")
    assert live_form(llama()).by_path["lm_head"].tied_to is None


def test_two_parameters_in_one_place_are_tied() -> None:
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert model[1].weight is not model[0].weight
    assert live_form(model).by_path["1"].tied_to == "0"


def test_ties_are_seen_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = llama(tie_word_embeddings=True)
    assert live_form(model).by_path["lm_head"].tied_to == "model.embed_tokens"
    assert not any(row.tied_to for row in live_form(nn.Sequential(*[nn.Linear(2, 2, device="meta")] * 1)).modules)


def test_a_module_under_two_names_has_two_rows() -> None:
    shared = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    form = live_form(nn.ModuleDict({"a": shared, "b": shared}))
    assert {row.path: row.tied_to for row in form.modules} == {"a.0": None, "a.1": None, "b.0": "a.0", "b.1": "a.1"}


def test_equal_modules_are_not_tied() -> None:
    assert not any(row.tied_to for row in live_form(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))).modules)


def test_a_model_that_contains_itself_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    inner = nn.Sequential(nn.Linear(2, 2))
    model.add_module("inner", inner)
    inner.add_module("back", model)
    with pytest.raises(InvalidInput, match=r"contains itself: inner\.back is the same module as the model above it"):
        live_form(model)


def test_a_module_that_wraps_itself_is_refused() -> None:
    model = nn.DataParallel(nn.Linear(2, 2))
    model.module = model
    with pytest.raises(InvalidInput, match="contains itself"):
        live_form(model)


def test_modules_shared_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "MAX_MODULES", 1000)
    module: nn.Module = nn.Linear(2, 2)
    for _ in range(40):
        module = nn.ModuleList([module, module])
    with pytest.raises(InvalidInput, match="over 1000 paths"):
        live_form(module)


def test_a_name_that_cannot_be_printed_is_refused() -> None:
    with pytest.raises(InvalidInput, match="control character"):
        live_form(nn.ModuleDict({"a\nb": nn.Linear(2, 2)}))


def test_deep_trees_are_walked_without_recursion() -> None:
    module: nn.Module = nn.Linear(2, 2)
    for _ in range(450):
        module = nn.ModuleList([module])
    (row,) = live_form(module).modules
    assert row.path == ".".join("0" * 450)


def test_lazy_modules_have_rows_without_sizes() -> None:
    rows = live_form(nn.Sequential(nn.LazyLinear(3), nn.LazyConv2d(4, 1))).modules
    assert [(row.kind, row.in_features, row.out_features) for row in rows] == [("linear", None, 3), ("conv2d", None, 4)]


# ---------------------------------------------------------------- wrappers


LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
}


@pytest.mark.parametrize("name", LORA)
def test_an_adapter_changes_nothing(name: str) -> None:
    plain = live_form(llama())
    model = get_peft_model(llama(), LoraConfig(**LORA[name]))
    assert live_form(model) == plain
    assert live_form(model).document == plain.document


def test_wrapped_experts_and_attention_change_nothing() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.ones(2, 4, 4)), nn.Parameter(torch.ones(2, 4, 4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.attention = Experts(), nn.MultiheadAttention(8, 2)
            self.config = {"model_type": "custom"}

    plain = live_form(Model())
    config = LoraConfig(target_modules=["attention"], target_parameters=["experts.first", "experts.second"])
    model = get_peft_model(Model(), config)
    assert type(model.base_model.model.experts).__name__ == "ParamWrapper"
    assert live_form(model) == plain


def test_an_adapter_that_is_put_in_changes_nothing() -> None:
    model = llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert live_form(model) == live_form(llama())


def test_the_base_within_a_policy_is_meant_once_it_has_an_adapter() -> None:
    class Policy(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.normalizer = net, nn.Linear(1, 1)

    adapted = Policy(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    assert live_form(adapted) == live_form(llama())
    assert "normalizer" in live_form(Policy(llama())).by_path


def test_two_adapted_models_are_too_many() -> None:
    two = nn.ModuleList([get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])) for _ in range(2)])
    with pytest.raises(InvalidInput, match="2 models with adapters"):
        live_form(two)


def test_wrappers_of_torch_change_nothing() -> None:
    plain = live_form(llama())
    compiled = partial(torch.compile, backend="eager")
    assert live_form(compiled(llama())) == plain
    assert live_form(nn.DataParallel(llama())) == plain
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    assert live_form(compiled(nn.DataParallel(adapted))) == plain
    inner = llama()
    inner.model.layers[0] = compiled(inner.model.layers[0])
    assert live_form(inner) == plain


def test_a_base_layer_that_is_not_of_peft_stays() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(2, 2)

    assert [row.path for row in live_form(Backbone()).modules] == ["base_layer"]


# ---------------------------------------------------------------- what else decides


def test_a_model_of_transformers_says_its_configuration() -> None:
    form = live_form(llama())
    assert form.class_name == "transformers.models.llama.modeling_llama.LlamaForCausalLM"
    assert form.arguments is not None
    assert form.arguments["num_attention_heads"] == 2
    assert form.arguments["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert not {"_name_or_path", "transformers_version", "architectures", "dtype"} & form.arguments.keys()
    assert form.prefix == "model"
    assert form.has == ("config", "get_input_embeddings", "prepare_inputs_for_generation")
    assert form.packages == {"transformers": transformers.__version__}
    assert form.fingerprint is not None


def test_a_saved_and_loaded_model_has_the_same_form(tmp_path: Any) -> None:
    llama().save_pretrained(tmp_path)
    assert live_form(transformers.LlamaForCausalLM.from_pretrained(tmp_path)) == live_form(llama())


def test_a_model_of_diffusers_says_its_configuration() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.UNet2DModel(
            block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        )
    form = live_form(model)
    assert form.arguments is not None
    assert form.arguments["block_out_channels"] == [32, 64]
    assert not any(name.startswith("_") for name in form.arguments)


def test_constructor_arguments_become_plain_json() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constructor_arguments = {
                "kernel": (3, 3),
                "n_head": 4,
                "limit": float("inf"),
                "lowest": float("nan"),
                "data": "/home/someone/data.h5",
                "act": "relu",
                "seed": 2**60,
            }

    assert live_form(Model()).arguments == {
        "kernel": [3, 3],
        "n_head": 4,
        "limit": "Infinity",
        "lowest": "NaN",
        "act": "relu",
        "seed": str(2**60),
    }


def test_what_is_no_json_is_left_out_of_a_configuration() -> None:
    model = nn.Module()
    vars(model)["config"] = {
        "heads": 2,
        "made": object(),
        "kinds": {"b", "a"},
        "nested": {"path": "~/x", "keep": [1, None, True]},
    }
    assert live_form(model).arguments == {"heads": 2, "kinds": ["a", "b"], "nested": {"keep": [1, None, True]}}


def test_a_model_that_says_nothing_has_no_arguments() -> None:
    form = live_form(nn.Linear(2, 2))
    assert (form.arguments, form.source, form.prefix, form.has) == (None, {}, "", ())
    assert form.class_name == "torch.nn.modules.linear.Linear"


def test_a_property_that_fails_is_no_failure() -> None:
    class Model(nn.Module):
        @property
        def config(self) -> Any:
            raise RuntimeError("not yet")

    assert (live_form(Model()).arguments, live_form(Model()).has) == (None, ())


def test_a_form_is_read_back_as_it_was() -> None:
    form = live_form(Net())
    again = read_model_form(form.document, "it")
    assert replace(again, source=form.source) == form


def test_seven_billion_parameters_take_well_under_a_second() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    begin = time.perf_counter()
    form = live_form(model)
    assert time.perf_counter() - begin < 1  # 0.03 s
    assert len(form.modules) == 291


# ---------------------------------------------------------------- beside a version


def test_a_live_model_is_described_by_its_form() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with open_source(model, kind=None, how=Opening()) as source:
        add_form(source, model)
        assert read_model_form(source.described[ROLE], "it") == live_form(llama())
        assert source.notes == ()


def test_a_form_that_cannot_be_made_is_a_note() -> None:
    model = nn.ModuleDict({"a\nb": nn.Linear(2, 2)})
    source = Source("live module", "base", ())
    add_form(source, model)
    assert source.described == {}
    (note,) = source.notes
    assert note.startswith("no list of modules is kept: InvalidInput: the module a")
    assert "\n" not in note


@pytest.mark.parametrize("source", ["a/path", {"w": torch.ones(1)}])
def test_what_is_not_live_has_no_form(source: object) -> None:
    opened = Source("it", "base", ())
    add_form(opened, source)
    assert (opened.described, opened.notes) == ({}, ())
