"""Loading: what PEFT gives for the same adapter is the truth, and a model that does not fit stays as it was."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from registry import Registry
from registry.core.errors import (
    BlobNotFound,
    Corrupt,
    DigestMismatch,
    Incompatible,
    InvalidInput,
    NotFound,
)
from tests.formats.test_live import TwoTensors
from tests.operations.models import (
    QV,
    Walker,
    assert_same_bits,
    assert_unchanged,
    lora,
    output,
    state_of,
    steps,
    train,
    walker,
    zoo,
)
from tests.operations.test_push_live import Policy, tiny_llama

A, B = ".lora_A.weight", ".lora_B.weight"


def refusal(registry: Registry, reference: str, model: nn.Module, **options: Any) -> Incompatible:
    """The error of a load that must leave the model as it was."""
    before = state_of(model)
    with pytest.raises(Incompatible) as caught:
        registry.load(reference, model, **options)
    assert_unchanged(model, before)
    assert all(str(finding) in str(caught.value) for finding in caught.value.findings)
    return caught.value


def found(error: Incompatible) -> list[tuple[str, str, str, str]]:
    return [(one.code, one.subject, one.expected, one.found) for one in error.findings]


def blob_path(root: Path, digest: str) -> Path:
    return root / "blobs" / "sha256" / digest[:2] / digest


def tensors_blob(registry: Registry, root: Path, reference: str, role: str) -> Path:
    return blob_path(root, registry.show(reference).contents.components[role].places[0][0])


# ---------------------------------------------------------------- what fits


def test_into_a_model_with_an_adapter_of_the_same_form(registry: Registry) -> None:
    trained = lora()
    registry.push(trained, "walk/perturb")
    model = lora(seed=2)
    before = {name: (id(value), value.data_ptr()) for name, value in model.named_parameters()}
    assert not torch.equal(model(steps()), trained(steps()))
    assert registry.load("walk/perturb", model) is model
    assert torch.equal(model(steps()), trained(steps()))
    assert before == {name: (id(value), value.data_ptr()) for name, value in model.named_parameters()}
    assert {value.requires_grad for name, value in model.named_parameters() if "lora_" in name} == {True}


def test_into_a_plain_base_as_peft_would_wrap_it(registry: Registry, tmp_path: Path) -> None:
    trained = lora(modules_to_save=["head"])
    registry.push(trained, "walk/perturb")
    base = walker()
    weight = base.q_proj.weight
    model = registry.load("walk/perturb", base)
    assert isinstance(model, PeftModel)
    assert model.get_base_model() is base
    assert model.get_base_model().q_proj.base_layer.weight is weight
    assert torch.equal(model(steps()), trained(steps()))
    registry.pull("walk/perturb", tmp_path / "pulled", format="peft")
    theirs = PeftModel.from_pretrained(walker(), tmp_path / "pulled")
    assert {name: value.requires_grad for name, value in model.named_parameters()} == {
        name: value.requires_grad for name, value in theirs.named_parameters()
    }
    assert model.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()
    # Pushed again it is the version that it came from.
    assert not registry.push(model, "walk/perturb").created


def test_each_module_stays_in_its_own_mode(registry: Registry) -> None:
    registry.push(lora(lora_dropout=0.5, modules_to_save=["head"]), "walk/perturb")
    base = walker().train()
    base.norm.eval()
    model = registry.load("walk/perturb", base)
    assert base.training
    assert not base.norm.training
    assert base.drop.training
    layer = model.get_submodule("base_model.model.q_proj")
    assert layer.training
    assert layer.lora_dropout["default"].training
    loaded = registry.load("walk/perturb", walker())
    assert not any(module.training for module in loaded.modules())


def test_into_an_adapter_of_another_name(registry: Registry) -> None:
    trained = lora(adapter="walk")
    registry.push(trained, "walk/perturb")
    model = registry.load("walk/perturb", walker(), adapter_name="run")
    assert list(model.peft_config) == ["run"]
    assert torch.equal(model(steps()), trained(steps()))

    several = lora(adapter="one", seed=2)
    several.add_adapter("two", LoraConfig(**QV))
    one = {name: value.clone() for name, value in several.state_dict().items() if ".one." in name}
    registry.load("walk/perturb", several, adapter_name="two")
    assert all(torch.equal(several.state_dict()[name], value) for name, value in one.items())
    several.set_adapter("two")
    assert torch.equal(several(steps()), trained(steps()))
    with pytest.raises(InvalidInput, match="no adapter 'three'; it has one, two"):
        registry.load("walk/perturb", several, adapter_name="three")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_into_a_model_of_another_dtype(dtype: torch.dtype, registry: Registry) -> None:
    trained = lora()
    registry.push(trained, "walk/perturb")
    model = get_peft_model(walker().to(dtype), LoraConfig(**QV), autocast_adapter_dtype=False)
    registry.load("walk/perturb", model)
    for name, value in model.named_parameters():
        if "lora_" in name:
            assert value.dtype == dtype
            assert torch.equal(value, trained.get_parameter(name).to(dtype)), name
    # A plain base of that dtype is wrapped as PEFT does it, which keeps half precision out of adapters.
    wrapped = registry.load("walk/perturb", walker().to(dtype))
    theirs = get_peft_model(walker().to(dtype), LoraConfig(**QV))
    assert {n: p.dtype for n, p in wrapped.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}


def test_what_holds_the_model_is_given_back(registry: Registry) -> None:
    trained = lora()
    registry.push(trained, "walk/perturb")
    inner = lora(seed=2)
    policy = Policy(inner)
    assert registry.load("walk/perturb", policy) is policy
    assert torch.equal(inner(steps()), trained(steps()))
    compiled = torch.compile(lora(seed=2), backend="eager")
    assert registry.load("walk/perturb", compiled) is compiled
    with pytest.raises(InvalidInput, match="holds 2 models with adapters"):
        registry.load("walk/perturb", Policy(lora(), lora()))


def test_into_layers_that_were_injected(registry: Registry) -> None:
    trained = lora()
    registry.push(trained, "walk/perturb")
    model = inject_adapter_in_model(LoraConfig(**QV), walker())
    assert registry.load("walk/perturb", model) is model
    assert torch.equal(model(steps()), trained(steps()))
    error = refusal(registry, "walk/perturb", inject_adapter_in_model(LoraConfig(**(QV | {"lora_alpha": 3})), walker()))
    assert {one.code for one in error.findings} == {"C10"}


def test_into_an_adapter_of_transformers(registry: Registry) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
    trained = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **options))
    train(trained)
    registry.push(trained, "walk/perturb")
    model = tiny_llama()
    model.add_adapter(LoraConfig(**options), adapter_name="walk")
    registry.load("walk/perturb", model)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, trained.eval()(tokens).logits)


def test_into_a_classifier_with_its_head(registry: Registry) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def classifier() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes)).eval()

    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    trained = get_peft_model(classifier(), config)
    train(trained)
    trained.eval()
    registry.push(trained, "walk/classes")
    assert "base_model.model.classifier.weight" in registry.load("walk/classes")
    tokens = torch.tensor([[1, 2, 3]])
    loaded = registry.load("walk/classes", classifier())
    assert type(loaded) is type(trained)
    assert torch.equal(loaded(tokens).logits, trained(tokens).logits)


def test_a_prompt_is_loaded_into_its_encoder(registry: Registry) -> None:
    from peft import PromptTuningConfig

    def prompted() -> PeftModel:
        return get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))

    trained = prompted()
    train(trained)
    registry.push(trained, "walk/prompt")
    model = prompted()
    registry.load("walk/prompt", model)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens).logits, trained(tokens).logits)


def test_a_prompt_that_the_model_computes_is_refused(registry: Registry) -> None:
    """PEFT saves the prompt, and not the network that gives it in training; loading it there would change it."""
    from peft import PrefixTuningConfig, PromptEncoderConfig

    for number, config in enumerate(
        [
            PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True),
        ]
    ):
        trained = get_peft_model(tiny_llama(), config)
        train(trained)
        registry.push(trained, f"walk/prompt{number}")
        assert "PeftModel.from_pretrained" in str(refusal(registry, f"walk/prompt{number}", trained)) or number == 1
        model = registry.load(f"walk/prompt{number}", tiny_llama())
        tokens = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, trained.eval()(tokens).logits)


def test_a_state_dict_without_a_configuration(registry: Registry) -> None:
    trained = lora(adapter="walk")
    bare = {name: value for name, value in trained.state_dict().items() if ".lora_" in name}
    registry.push(bare, "walk/bare")
    assert "base_model.model.q_proj.lora_A.walk.weight" in bare
    model = lora(seed=2)
    with pytest.warns(UserWarning, match="C10 warning: the version has no configuration") as noticed:
        registry.load("walk/bare", model)
    assert [Path(one.filename) for one in noticed] == [Path(__file__)]
    assert torch.equal(model(steps()), trained(steps()))
    with pytest.raises(InvalidInput, match=r"has no configuration.*get_peft_model first"):
        registry.load("walk/bare", walker())


def test_two_adapters_in_one_state_dict_are_refused(registry: Registry) -> None:
    model = lora(adapter="one")
    model.add_adapter("two", LoraConfig(**QV))
    registry.push({name: value for name, value in model.state_dict().items() if ".lora_" in name}, "walk/bare")
    error = refusal(registry, "walk/bare", lora())
    assert [one.code for one in error.findings] == ["C23"]


# ---------------------------------------------------------------- what does not fit

Difference = tuple[str, str, str, str]
MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], set[Difference]]] = {
    "rank": (
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "r": 8, "lora_alpha": 16},
        {("C08", f"q_proj{A}", "(8, 16)", "(4, 16)"), ("C08", f"q_proj{B}", "(16, 8)", "(16, 4)")},
    ),
    "rank_pattern": (
        {},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4}},
        {("C08", f"v_proj{A}", "(2, 16)", "(4, 16)"), ("C08", f"v_proj{B}", "(16, 2)", "(16, 4)")},
    ),
    "a module that the model's adapter lacks": (
        {},
        {"target_modules": ["q_proj"]},
        {("C05", f"v_proj{A}", "none", "(4, 16)"), ("C05", f"v_proj{B}", "none", "(16, 4)")},
    ),
    "a module that the version lacks": (
        {"target_modules": ["q_proj"]},
        {},
        {("C06", f"v_proj{A}", "(4, 16)", ""), ("C06", f"v_proj{B}", "(16, 4)", "")},
    ),
    "alpha": ({}, {"lora_alpha": 16}, {("C10", "q_proj", "2", "4"), ("C10", "v_proj", "2", "4")}),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 6}}, {}, {("C10", "q_proj", "1.5", "2")}),
    "rsLoRA": ({"use_rslora": True}, {}, {("C10", "q_proj", "4", "2"), ("C10", "v_proj", "4", "2")}),
    "no rsLoRA": ({}, {"use_rslora": True}, {("C10", "q_proj", "2", "4"), ("C10", "v_proj", "2", "4")}),
    "DoRA": (
        {"use_dora": True, "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"]},
        {("C05", "q_proj.lora_magnitude_vector", "none", "(16,)"), ("C10", "use_dora", "True", "False")},
    ),
    "no DoRA": (
        {"target_modules": ["q_proj"]},
        {"use_dora": True, "target_modules": ["q_proj"]},
        {("C06", "q_proj.lora_magnitude_vector", "(16,)", ""), ("C10", "use_dora", "False", "True")},
    ),
    "modules_to_save": (
        {"modules_to_save": ["head"]},
        {},
        {("C05", "head.weight", "none", "(4, 16)"), ("C05", "head.bias", "none", "(4,)")},
    ),
    "no modules_to_save": (
        {},
        {"modules_to_save": ["head"]},
        {("C06", "head.weight", "(4, 16)", ""), ("C06", "head.bias", "(4,)", "")},
    ),
    "biases": (
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"]},
        {("C05", "q_proj.base_layer.bias", "none", "(16,)")},
    ),
    "lora_bias": (
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"]},
        {("C05", "q_proj.lora_B.bias", "none", "(16,)")},
    ),
    "all at once": (
        {"target_modules": ["q_proj", "head"], "lora_alpha": 8},
        {"target_modules": ["q_proj", "v_proj"], "r": 2, "modules_to_save": ["norm"]},
        {
            *(("C08", f"q_proj{A}", "(2, 16)", "(4, 16)"), ("C08", f"q_proj{B}", "(16, 2)", "(16, 4)")),
            *(("C05", f"head{A}", "none", "(4, 16)"), ("C05", f"head{B}", "none", "(4, 4)")),
            *(("C06", f"v_proj{A}", "(2, 16)", ""), ("C06", f"v_proj{B}", "(16, 2)", "")),
            *(("C06", "norm.weight", "(16,)", ""), ("C06", "norm.bias", "(16,)", "")),
            ("C10", "q_proj", "2", "4"),
        },
    ),
}


@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("difference", MISFITS)
def test_a_model_that_differs_is_refused_with_all_differences(difference: str, registry: Registry) -> None:
    pushed, built, expected = MISFITS[difference]
    registry.push(lora(**pushed), "walk/perturb")
    error = refusal(registry, "walk/perturb", lora(seed=2, **built))
    assert set(found(error)) == expected
    assert len(error.findings) == len(expected)
    assert str(error).startswith("walk/perturb@1 does not fit this PeftModel; nothing was changed")


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        (
            {"target_modules": ["emb", "lin", "conv1", "conv2", "conv3", "grouped", "transposed"]},
            ["emb", "lin", "conv1", "conv2", "grouped", "conv3", "transposed"],
        ),
        ({"target_modules": ["lin"], "target_parameters": ["experts.up_proj"]}, ["lin", "experts.up_proj"]),
        (
            {"target_modules": [], "target_parameters": ["experts.up_proj", "experts.down_proj"]},
            ["experts", "experts.base_layer"],
        ),
    ],
)
def test_the_scaling_of_every_kind_of_layer_is_compared(
    options: dict[str, Any], modules: list[str], registry: Registry
) -> None:
    def build(alpha: int) -> PeftModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(zoo(), LoraConfig(r=4, lora_alpha=alpha, **options))

    registry.push(build(8), "walk/perturb")
    assert found(refusal(registry, "walk/perturb", build(4))) == [("C10", module, "2", "1") for module in modules]


def test_the_scaling_of_attention_is_compared(registry: Registry) -> None:
    registry.push(lora(zoo(), target_modules=["mha"]), "walk/perturb")
    model = lora(zoo(), target_modules=["mha"], lora_alpha=4, seed=2)
    expected = output(model)
    # Not `refusal`: PEFT makes new parameters of this layer whenever anybody lists its modules.
    with pytest.raises(Incompatible) as caught:
        registry.load("walk/perturb", model)
    assert found(caught.value) == [("C10", "mha", "2", "1"), ("C10", "mha.out_proj", "2", "1")]
    assert torch.equal(output(model), expected)


def test_options_that_no_tensor_shows_are_compared(registry: Registry) -> None:
    def tokens(indices: list[int]) -> PeftModel:
        config = LoraConfig(r=4, target_modules=["lin"], trainable_token_indices={"emb": indices})
        return get_peft_model(zoo(), config)

    registry.push(tokens([1, 2]), "walk/tokens")
    error = refusal(registry, "walk/tokens", tokens([1, 3]))
    assert found(error) == [("C10", "trainable_token_indices", "{'emb': [1, 2]}", "{'emb': [1, 3]}")]

    def loha(**options: Any) -> PeftModel:
        return get_peft_model(walker(), LoHaConfig(**({"r": 4, "alpha": 8, "target_modules": ["q_proj"]} | options)))

    registry.push(loha(), "walk/loha")
    assert found(refusal(registry, "walk/loha", loha(alpha=4))) == [("C10", "alpha", "8", "4")]
    registry.load("walk/loha", loha(module_dropout=0.5, init_weights=False))
    assert {one[:2] for one in found(refusal(registry, "walk/loha", lora(target_modules=["q_proj"])))} >= {
        ("C10", "peft_type")
    }


class Narrow(Walker):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 16)
        self.head = nn.Linear(16, 2)


class Renamed(Walker):
    def __init__(self) -> None:
        super().__init__()
        self.query = self.q_proj
        del self.q_proj


class Unsupported(Walker):
    """PEFT has replaced one module when it comes to the other, which it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.v_proj = nn.Bilinear(16, 16, 16)


def test_a_base_without_the_module_is_refused(registry: Registry) -> None:
    registry.push(lora(modules_to_save=["head"]), "walk/perturb")
    error = refusal(registry, "walk/perturb", Renamed())
    assert found(error) == [("C05", "q_proj", "a module", "none")]
    assert "is this the base that the adapter was trained on?" in str(error)
    error = refusal(registry, "walk/perturb", nn.Sequential(nn.Linear(2, 2)))
    assert {one.subject for one in error.findings} == {"head", "q_proj", "target_modules", "v_proj"}


def test_a_base_of_other_sizes_is_refused(registry: Registry) -> None:
    registry.push(lora(target_modules=["q_proj", "head"]), "walk/perturb")
    error = refusal(registry, "walk/perturb", Narrow())
    assert found(error) == [("C08", "head", "(16, 2)", "(16, 4)"), ("C08", "q_proj", "(12, 16)", "(16, 16)")]


def as_if_it_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rules cannot see is left to PEFT and to the copying."""
    monkeypatch.setattr("registry.operations.load_check.findings_first", lambda *_, **__: ())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_base_that_peft_stops_at_halfway_is_put_back(
    seed: int, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_it_fitted(monkeypatch)
    registry.push(lora(), "walk/perturb")
    torch.manual_seed(seed)
    model = Unsupported().train()
    model.norm.eval()
    model.norm.weight.requires_grad_(False)
    calls: list[str] = []
    handle = model.q_proj.register_forward_hook(lambda *_: calls.append("hook"))
    error = refusal(registry, "walk/perturb", model)
    assert "Bilinear" in str(error)
    assert error.findings == ()
    model.q_proj(torch.zeros(1, 16))
    handle.remove()
    model.q_proj(torch.zeros(1, 16))
    assert calls == ["hook"]


def without_one_tensor(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.v_proj.lora_B.weight"]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_a_version_that_lacks_a_tensor_is_refused_after_peft_has_wrapped(
    init: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_it_fitted(monkeypatch)
    registry.push(without_one_tensor(lora(init_lora_weights=init), tmp_path / "saved"), "walk/perturb")
    base = walker()
    expected = base(steps())
    error = refusal(registry, "walk/perturb", base)
    assert found(error) == [("C06", f"v_proj{B}", "(16, 4)", "")]
    assert torch.equal(base(steps()), expected)
    assert not hasattr(base, "peft_config")


def test_a_configuration_that_this_peft_does_not_know_is_refused(registry: Registry, tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "adapter_config.json"
    known = json.loads(path.read_bytes())
    for number, (change, code) in enumerate(
        [({"use_hyperlora": True}, "C02"), ({"peft_type": "HYPERTUNE"}, "C01"), ({"task_type": "WALKING"}, None)]
    ):
        path.write_text(json.dumps(known | change))
        registry.push(tmp_path / "saved", f"walk/n{number}")
        error = refusal(registry, f"walk/n{number}", walker())
        assert [one.code for one in error.findings] == ([code] if code else [])
        if code:
            refusal(registry, f"walk/n{number}", lora())


def test_a_merged_model_takes_no_adapter(registry: Registry) -> None:
    registry.push(lora(), "walk/perturb")
    model = lora()
    model.merge_adapter()
    before = state_of(model)
    with pytest.raises(InvalidInput, match=r"merged into its base.*unmerge_adapter\(\)"):
        registry.load("walk/perturb", model)
    assert_unchanged(model, before)


def test_a_model_without_memory_is_refused(registry: Registry) -> None:
    registry.push(walker(), "walk/base")
    registry.push(lora(), "walk/perturb")
    with torch.device("meta"):
        base, adapted = Walker(), get_peft_model(Walker(), LoraConfig(**QV))
    for reference, model in (("walk/base", base), ("walk/perturb", adapted), ("walk/perturb", base)):
        with pytest.raises(Incompatible) as caught:
            registry.load(reference, model)
        assert {(one.code, one.found) for one in caught.value.findings} == {("C21", "a meta tensor without data")}
    assert not hasattr(base, "peft_config")


# ---------------------------------------------------------------- not strict


def test_not_strict_warns_of_each_difference_and_loads_the_rest(registry: Registry) -> None:
    trained = lora(target_modules=["q_proj", "head"])
    registry.push(trained, "walk/perturb")
    model = lora(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4}, seed=2)
    before = model.get_parameter("base_model.model.v_proj.lora_A.default.weight").clone()
    with pytest.warns(UserWarning, match="C0") as noticed:
        assert registry.load("walk/perturb", model, strict=False) is model
    said = [str(one.message) for one in noticed]
    assert [text[:9] for text in said] == ["C05 error", "C05 error", "C06 error", "C06 error"]
    for name in ("lora_A", "lora_B"):
        path = f"base_model.model.q_proj.{name}.default.weight"
        assert torch.equal(model.get_parameter(path), trained.get_parameter(path))
    assert torch.equal(model.get_parameter("base_model.model.v_proj.lora_A.default.weight"), before)


def test_not_strict_wraps_a_base_with_what_it_has(registry: Registry) -> None:
    trained = lora(modules_to_save=["head"])
    registry.push(trained, "walk/perturb")
    base = Walker()
    base.v_proj = nn.Identity()
    refusal(registry, "walk/perturb", base)
    less = Renamed()
    with pytest.warns(UserWarning, match="q_proj") as noticed:
        model = registry.load("walk/perturb", less, strict=False)
    assert [str(one.message)[:9] for one in noticed] == ["C05 error"] * 3  # the module, then its two tensors
    path = "base_model.model.v_proj.lora_A.default.weight"
    assert torch.equal(model.get_parameter(path), trained.get_parameter(path))


def test_not_strict_never_lets_another_scaling_pass(registry: Registry) -> None:
    registry.push(lora(), "walk/perturb")
    refusal(registry, "walk/perturb", lora(lora_alpha=16), strict=False)


def test_not_strict_loads_a_base_as_far_as_it_fits(registry: Registry) -> None:
    registry.push(walker(), "walk/base")
    model = Narrow()
    head = model.head.weight.detach().clone()
    with pytest.warns(UserWarning, match="C08 error: .*: the shapes differ") as noticed:
        registry.load("walk/base", model, strict=False)
    assert len(noticed) == 3
    assert torch.equal(model.v_proj.weight, walker().v_proj.weight)
    assert torch.equal(model.head.weight, head)


# ---------------------------------------------------------------- bases and checkpoints


def test_a_base_comes_back_into_a_module(registry: Registry) -> None:
    registry.push(walker(), "walk/base")
    model = walker(1).train()
    pointers = [value.data_ptr() for value in model.parameters()]
    assert registry.load("walk/base", model) is model
    assert all(torch.equal(value, walker().state_dict()[name]) for name, value in model.state_dict().items())
    assert pointers == [value.data_ptr() for value in model.parameters()]
    assert model.training
    assert all(value.requires_grad for value in model.parameters())


def test_a_checkpoint_comes_back_into_the_same_peft_model(registry: Registry) -> None:
    trained = lora(modules_to_save=["head"])
    registry.push(trained, "walk/full", kind="checkpoint")
    model = lora(walker(1), modules_to_save=["head"], seed=2)
    registry.load("walk/full", model)
    assert torch.equal(model(steps()), trained(steps()))
    error = refusal(registry, "walk/full", walker())
    assert {one.code for one in error.findings} == {"C05", "C06"}
    assert len(error.findings) == len(trained.state_dict()) + len(walker().state_dict())


def test_a_checkpoint_knows_the_scaling_of_its_adapter(registry: Registry) -> None:
    registry.push(lora(), "walk/full", kind="checkpoint")
    assert (registry.get("walk/full").r, registry.get("walk/full").lora_alpha) == (QV["r"], QV["lora_alpha"])
    other = lora(lora_alpha=2 * QV["lora_alpha"], seed=2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert {(one.code, one.subject) for one in refusal(registry, "walk/full", other).findings} == {
        ("C10", "q_proj"),
        ("C10", "v_proj"),
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_every_difference_of_a_base_is_named(registry: Registry) -> None:
    registry.push(walker().state_dict() | {"extra": torch.zeros(2), "other": torch.zeros(())}, "walk/base")
    model = Narrow()
    model.register_buffer("own", torch.zeros(3))
    assert found(refusal(registry, "walk/base", model)) == [
        ("C05", "extra", "none", "(2,)"),
        ("C05", "other", "none", "()"),
        ("C06", "own", "(3,)", ""),
        ("C08", "q_proj.weight", "(16, 12)", "(16, 16)"),
        ("C08", "head.weight", "(2, 16)", "(4, 16)"),
        ("C08", "head.bias", "(2,)", "(4,)"),
    ]


def holding(**tensors: Tensor) -> nn.Module:
    """A module of buffers."""
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    return model


CASTS: list[tuple[Tensor, torch.dtype, str | None]] = [
    (torch.tensor([1.5]), torch.int64, "floating point would be cut"),
    (torch.tensor([1.0]), torch.bool, "floating point would be cut"),
    (torch.tensor([1 + 2j]), torch.float32, "the imaginary part would be cut"),
    (torch.tensor([1 + 2j]), torch.int32, "the imaginary part would be cut"),
    (torch.tensor([300]), torch.int8, "whole numbers would change"),
    (torch.tensor([-1]), torch.uint8, "whole numbers would change"),
    (torch.tensor([2]), torch.bool, "whole numbers would change"),
    (torch.tensor([2**24 + 1]), torch.float32, "whole numbers would change"),
    (torch.tensor([1e6]), torch.float16, "values over 65504"),
    (torch.tensor([1e300], dtype=torch.float64), torch.float32, "values over 3.40282e\\+38"),
    (torch.tensor([1e3]), torch.float8_e4m3fn, "values over 448"),
    (torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), torch.float32, "no conversion"),
    (torch.zeros(2), torch.float4_e2m1fn_x2, "no conversion"),
    (torch.tensor([100]), torch.int8, None),
    (torch.tensor([True, False]), torch.float16, None),
    (torch.tensor([1 << 20]), torch.float32, None),
    (torch.tensor([float("inf"), float("nan"), 0.1]), torch.float16, None),
    (torch.tensor([1.1, -1e-30]), torch.bfloat16, None),
    (torch.tensor([1.1]), torch.complex64, None),
    (torch.tensor([1.1], dtype=torch.bfloat16), torch.float64, None),
    (torch.tensor([2**40], dtype=torch.uint64), torch.int64, None),
]


@pytest.mark.parametrize(("tensor", "dtype", "words"), CASTS, ids=[f"{t.dtype}-{d}-{w}" for t, d, w in CASTS])
def test_a_cast_takes_precision_and_nothing_else(
    tensor: Tensor, dtype: torch.dtype, words: str | None, registry: Registry
) -> None:
    registry.push({"w": tensor, "v": torch.ones(3)}, "walk/base")
    model = holding(w=torch.zeros(tensor.shape, dtype=torch.uint8).to(torch.uint8).repeat(dtype.itemsize).view(dtype))
    model.register_buffer("v", torch.zeros(3))
    if words is None:
        registry.load("walk/base", model)
        assert_same_bits(model.w, tensor.to(dtype))
    else:
        error = refusal(registry, "walk/base", model)
        assert [(one.code, one.subject) for one in error.findings] == [("C21", "w")]
        assert (error.findings[0].expected, error.findings[0].found) == (str(dtype), str(tensor.dtype))
        assert error.findings[0].message.startswith(words.replace("\\", "")) or words in error.findings[0].message


def test_nan_keeps_its_bits(registry: Registry) -> None:
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC01234], dtype=torch.int32)
    registry.push({"w": bits.view(torch.float32)}, "walk/base")
    model = holding(w=torch.zeros(4))
    registry.load("walk/base", model)
    assert torch.equal(model.w.view(torch.int32), bits)
    registry.load("walk/base", holding(w=torch.zeros(4, dtype=torch.bfloat16)))


class TiedWalker(Walker):
    def __init__(self, *, transposed: bool = False) -> None:
        super().__init__()
        self.decoder = nn.Linear(16, 16)
        weight = self.q_proj.weight
        self.decoder.weight = nn.Parameter(weight.detach().t()) if transposed else weight


@pytest.mark.parametrize("transposed", [False, True])
def test_tied_parameters_take_what_agrees_and_nothing_else(transposed: bool, registry: Registry) -> None:
    torch.manual_seed(0)
    trained = TiedWalker(transposed=transposed)
    registry.push(trained, "walk/tied")
    torch.manual_seed(1)
    model = TiedWalker(transposed=transposed)
    registry.load("walk/tied", model)
    assert torch.equal(model.decoder.weight, trained.decoder.weight)
    assert model.decoder.weight.data_ptr() == model.q_proj.weight.data_ptr()

    state = {name: value.clone() for name, value in trained.state_dict().items()}
    state["decoder.weight"][3, 4] += 1
    registry.push(state, "walk/untied")
    error = refusal(registry, "walk/untied", model)
    assert {one.code for one in error.findings} == {"C16"}
    assert {one.subject for one in error.findings} <= {"decoder.weight", "q_proj.weight"}
    registry.load("walk/untied", TiedButUntied())


class TiedButUntied(Walker):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(16, 16)


def test_of_tied_tensors_a_version_needs_one(registry: Registry, tmp_path: Path) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    trained = tiny_llama(tie_word_embeddings=True)
    train(trained)
    trained.save_pretrained(tmp_path)  # which leaves lm_head.weight out
    registry.push(tmp_path / "model.safetensors", "walk/tied")
    model = tiny_llama(tie_word_embeddings=True)
    registry.load("walk/tied", model)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, trained(tokens).logits)
    registry.push({"a": torch.zeros(0)}, "walk/empty")
    assert found(refusal(registry, "walk/empty", holding(a=torch.zeros(0), b=torch.zeros(0)))) == [
        ("C06", "b", "(0,)", "")
    ]
    error = refusal(registry, "walk/tied", tiny_llama(tie_word_embeddings=False))
    assert found(error) == [("C06", "lm_head.weight", "(32, 16)", "")]


def test_views_of_one_memory_that_do_not_meet_are_fine(registry: Registry) -> None:
    registry.push(
        {"a": torch.ones(3), "b": torch.full((2, 2), 2.0), "even": torch.ones(2), "odd": torch.zeros(2)}, "w/b"
    )
    flat, woven = torch.zeros(7), torch.zeros(4)
    model = holding(a=flat[:3], b=flat[3:].view(2, 2), even=woven[::2], odd=woven[1::2])
    registry.load("w/b", model)
    assert flat.tolist() == [1, 1, 1, 2, 2, 2, 2]
    assert woven.tolist() == [1, 0, 1, 0]
    error = refusal(registry, "w/b", holding(a=flat[:3], b=flat[2:6].view(2, 2), even=woven[::2], odd=woven[1::2]))
    assert {(one.code, one.subject) for one in error.findings} == {("C16", "a")}


def test_an_expanded_tensor_is_refused_before_anything_is_copied(registry: Registry) -> None:
    registry.push({"a": torch.ones(3), "b": torch.ones(4)}, "walk/base")
    error = refusal(registry, "walk/base", holding(a=torch.zeros(3), b=torch.zeros(1).expand(4)))
    assert [(one.code, one.subject, one.message) for one in error.findings] == [
        ("C21", "b", "its elements share memory")
    ]


def test_what_the_model_computes_cannot_be_set(registry: Registry) -> None:
    class Computed(Walker):
        def state_dict(self, *args: Any, **keywords: Any) -> Any:
            return {name: value * 1 for name, value in super().state_dict(*args, **keywords).items()}

    registry.push(walker(), "walk/base")
    error = refusal(registry, "walk/base", Computed())
    assert {(one.code, one.message) for one in error.findings} == {
        ("C21", "the model computes it, so it cannot be set")
    }


def test_tensors_that_are_no_plain_memory_are_refused(registry: Registry) -> None:
    registry.push({"a": torch.ones(3), "b": torch.ones(4)}, "walk/base")
    model = holding(a=torch.zeros(3))
    model.__dict__["_buffers"]["b"] = TwoTensors(torch.zeros(4))
    model.state_dict = lambda: {"a": model.a, "b": model.b}
    with pytest.raises(Incompatible) as caught:
        registry.load("walk/base", model)
    assert [(one.code, one.subject, one.found) for one in caught.value.findings] == [("C21", "b", "a TwoTensors")]
    assert model.a.tolist() == [0, 0, 0]


def test_a_model_of_inference_mode_is_refused(registry: Registry) -> None:
    registry.push(walker(), "walk/base")
    with torch.inference_mode():
        model = Walker()
    with pytest.raises(Incompatible, match=r"C21 error: .*made in inference mode"):
        registry.load("walk/base", model)
    with torch.inference_mode():
        registry.load("walk/base", model)
        assert torch.equal(model.head.weight, walker().head.weight)


def test_state_that_is_no_tensor_is_named(registry: Registry) -> None:
    class Counter(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"seen": 3}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError(state)

    registry.push(nn.Linear(2, 2), "walk/base")
    model = Counter(2, 2)
    assert found(refusal(registry, "walk/base", model)) == [("C06", "_extra_state", "a dict", "")]
    with pytest.warns(UserWarning, match="_extra_state"):
        registry.load("walk/base", model, strict=False)


def test_a_copy_without_effect_is_noticed(registry: Registry) -> None:
    class Stubborn(nn.Parameter):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is Tensor.copy_:
                return args[0]
            return super().__torch_function__(function, types, args, kwargs or {})

    registry.push({"a": torch.ones(3), "b": torch.ones(3)}, "walk/base")
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(3)), Stubborn(torch.zeros(3))
    model.state_dict = lambda: {"a": model.a, "b": model.b}
    with pytest.raises(Incompatible, match="1 tensors of the model do not hold its values, b first"):
        registry.load("walk/base", model)


# ---------------------------------------------------------------- without a model


def test_tensors_may_be_changed_without_touching_the_store(registry: Registry, root: Path) -> None:
    state = {"tied": torch.arange(600.0), "same": torch.arange(600.0), "w": torch.randn(4, 4)}
    registry.push(state, "walk/base")
    assert (
        registry.show("walk/base").contents.components["model"].places[0]
        in registry.show("walk/base").contents.components["model"].places[1:]
    )
    files = {path: path.read_bytes() for path in (root / "blobs").rglob("*") if path.is_file()}
    loaded = registry.load("walk/base")
    assert list(loaded) == ["same", "tied", "w"]
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
    loaded["tied"].zero_()
    loaded["w"].add_(1)
    assert torch.equal(loaded["same"], state["same"])
    assert files == {path: path.read_bytes() for path in files}
    assert torch.equal(registry.load("walk/base")["tied"], state["tied"])


def test_a_loaded_model_has_memory_of_its_own(registry: Registry, root: Path) -> None:
    registry.push(walker(), "walk/base")
    registry.push(lora(), "walk/perturb")
    model = registry.load("walk/perturb", registry.load("walk/base", walker(1)))
    expected = model(steps())
    shutil.rmtree(root / "blobs")
    assert torch.equal(model(steps()), expected)
    train(model)


def test_an_adapter_without_a_model_is_its_file(registry: Registry, tmp_path: Path) -> None:
    model = lora()
    registry.push(model, "walk/perturb")
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    loaded = registry.load("walk/perturb")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


def test_a_component_is_asked_for_by_name(registry: Registry) -> None:
    registry.push(lora(), "walk/perturb")
    assert registry.load("walk/perturb", component="adapter").keys() == registry.load("walk/perturb").keys()
    with pytest.raises(NotFound, match="walk/perturb@1 has no component ema; it has adapter"):
        registry.load("walk/perturb", component="ema")


# ---------------------------------------------------------------- a damaged store


def damage(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.chmod(0o644)
    path.write_bytes(data)


def flip_last(data: bytearray) -> None:
    data[-1] ^= 1


def flip_first(data: bytearray) -> None:
    data[8 + int.from_bytes(data[:8], "little")] ^= 0x80


@pytest.mark.parametrize("flip", [flip_first, flip_last])
def test_one_flipped_bit_is_found_before_the_model_is_touched(
    flip: Callable[[bytearray], None], registry: Registry, root: Path
) -> None:
    registry.push(lora(), "walk/perturb")
    registry.push(walker(), "walk/base")
    for reference, role, models in (
        ("walk/perturb", "adapter", [lora(), walker()]),
        ("walk/base", "model", [walker()]),
    ):
        damage(tensors_blob(registry, root, reference, role), flip)
        for model in models:
            before = state_of(model)
            with pytest.raises(DigestMismatch, match=r"tensor .*: expected digest [0-9a-f]{64}, found"):
                registry.load(reference, model)
            assert_unchanged(model, before)
        with pytest.raises(DigestMismatch):
            registry.load(reference)


def rename(data: bytearray, old: bytes, new: bytes) -> None:
    place = data.index(old)
    data[place : place + len(old)] = new


@pytest.mark.parametrize(
    "change",
    [
        lambda data: rename(data, b'"F32"', b'"I32"'),
        lambda data: rename(data, b'"F32"', b'"F64"'),
        lambda data: rename(data, b"[16,4]", b"[4,16]"),
        lambda data: rename(data, b'"dtype"', b'"dtyqe"'),
        lambda data: data.__setitem__(0, data[0] ^ 1),
        lambda data: data.__delitem__(slice(-1, None)),
        lambda data: data.extend(b"\0"),
        lambda data: data.clear(),
    ],
)
def test_a_damaged_header_is_a_damaged_store(change: Any, registry: Registry, root: Path) -> None:
    registry.push(lora(), "walk/perturb")
    damage(tensors_blob(registry, root, "walk/perturb", "adapter"), change)
    with pytest.raises(Corrupt):
        registry.load("walk/perturb")


def test_a_damaged_configuration_is_found(registry: Registry, root: Path) -> None:
    registry.push(lora(), "walk/perturb")
    config = next(file for file in registry.show("walk/perturb").contents.files if file.role is None)
    damage(blob_path(root, config.blob), lambda data: rename(data, b'"lora_alpha": 8', b'"lora_alpha": 9'))
    with pytest.raises(DigestMismatch, match=r"adapter_config\.json"):
        registry.load("walk/perturb", lora())


def test_a_missing_blob_is_named(registry: Registry, root: Path) -> None:
    registry.push(lora(), "walk/perturb")
    path = tensors_blob(registry, root, "walk/perturb", "adapter")
    path.unlink()
    with pytest.raises(BlobNotFound, match=path.name):
        registry.load("walk/perturb", lora())


def test_outputs_of_a_wrapped_zoo_agree_in_the_last_bit(registry: Registry) -> None:
    trained = lora(zoo(), target_modules=["lin", "conv2", "emb"])
    registry.push(trained, "walk/perturb")
    assert torch.equal(output(registry.load("walk/perturb", zoo())), output(trained))
