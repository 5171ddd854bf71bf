"""PEFT is the truth: the tables of `peft_keys`, canonical names, targets and scalings are compared with what the
installed PEFT does to tiny models. When an upgrade breaks a test here, its message says what to add to the tables."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES, get_pattern_key
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from registry.core import adapter_names, peft_keys
from registry.core.adapter_config import AdapterConfig, adapter_config, canonical_config, read_adapter_config
from registry.core.adapter_names import (
    Target,
    base_name,
    canonical_name,
    is_adapter_tensor,
    target_scaling,
    targets_of,
)
from registry.core.content_digest import LORA_OPTIONS, content_digest
from registry.core.layout import Layout, TensorSpec
from registry.core.name_patterns import PatternTable

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of much that these models do on purpose


# ---------------------------------------------------------------- tiny models


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 24)
        self.ln = nn.LayerNorm(24)
        self.lin1 = nn.Linear(24, 12)


class Zoo(nn.Module):
    """One layer of each kind that LoRA can wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.lin = nn.Linear(8, 6)
        self.conv1 = nn.Conv1d(8, 12, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.conv3 = nn.Conv3d(2, 4, (3, 1, 2))
        self.mha = nn.MultiheadAttention(8, 2)
        self.transposed = Conv1D(12, 8)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 16, 8))
        self.down_proj = nn.Parameter(torch.zeros(3, 8, 16))


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.experts = Experts()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )


BOTH = {"target_modules": ["lin0", "lin1"]}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
Q = {"target_modules": ["q_proj"]}
TUNERS: dict[str, list[tuple[Callable[[], nn.Module], dict[str, Any]]]] = {
    "ADALORA": [(Mlp, BOTH | {"total_step": 10})],
    "ADAMSS": [(Mlp, BOTH | {"num_subspaces": 2, "r": 4})],
    "ADAPTION_PROMPT": [(llama, {"adapter_len": 2, "adapter_layers": 1, "task_type": "CAUSAL_LM"})],
    "BEFT": [(Mlp, BOTH)],
    "BOFT": [(Mlp, BOTH | {"boft_block_size": 2})],
    "C3A": [(Mlp, BOTH | {"block_size": 4})],
    "CARTRIDGE": [(llama, PROMPT | {"num_frozen_tokens": 1})],
    "CPT": [(llama, {"task_type": "CAUSAL_LM", "cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1]})],
    "DEFT": [(Mlp, BOTH)],
    "DELORA": [(Mlp, BOTH)],
    "FOURIERFT": [(Mlp, BOTH | {"n_frequency": 5})],
    "FROD": [(Mlp, BOTH | {"progressbar": False})],
    "GLORA": [(Mlp, BOTH)],
    "GRALORA": [(Mlp, BOTH | {"r": 4, "gralora_k": 2, "hybrid_r": 2})],
    "HIRA": [(Mlp, BOTH), (Zoo, {"target_modules": ["emb"]})],
    "HRA": [(Mlp, BOTH)],
    "IA3": [(Mlp, BOTH | {"feedforward_modules": ["lin0"]})],
    "LILY": [(Mlp, BOTH)],
    "LN_TUNING": [(Mlp, {"target_modules": ["ln"]})],
    "LOHA": [(Mlp, BOTH), (Zoo, {"target_modules": ["conv2"], "use_effective_conv2d": True, "r": 2})],
    "LOKR": [
        (Mlp, BOTH | {"r": 1, "decompose_both": True}),
        (Zoo, {"target_modules": ["conv2"], "use_effective_conv2d": True, "r": 1}),
    ],
    "LORA": [(Mlp, BOTH)],
    "MISS": [(Mlp, BOTH | {"r": 4})],
    "MULTITASK_PROMPT_TUNING": [(llama, PROMPT | {"num_tasks": 2, "num_ranks": 1})],
    "OFT": [
        (Mlp, BOTH | {"r": 0, "oft_block_size": 4}),
        (Zoo, {"target_modules": ["emb"], "r": 0, "oft_block_size": 4}),
    ],
    "OSF": [(Mlp, BOTH)],
    "PEANUT": [(Mlp, BOTH | {"r": 2, "depth": 4})],
    "POLY": [(Mlp, BOTH | {"n_tasks": 2, "r": 2})],
    "PREFIX_TUNING": [(llama, PROMPT), (llama, PROMPT | {"prefix_projection": True, "encoder_hidden_size": 8})],
    "PROMPT_TUNING": [(llama, PROMPT)],
    "PSOFT": [(Mlp, BOTH | {"r": 4})],
    "PVERA": [(Mlp, BOTH)],
    "P_TUNING": [
        (llama, PROMPT | {"encoder_hidden_size": 8}),
        (llama, PROMPT | {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}),
    ],
    "RANDLORA": [(Mlp, BOTH | {"r": 2})],
    "ROAD": [(Mlp, BOTH | {"group_size": 4})],
    "SHADOW": [(llama, {"task_type": "CAUSAL_LM"})],
    "SHIRA": [(Mlp, BOTH | {"r": 1})],
    "SUPERTUNING": [(Mlp, BOTH)],
    "TINYLORA": [(Mlp, BOTH)],
    "TRAINABLE_TOKENS": [(Zoo, {"target_modules": ["emb"], "token_indices": [1, 2]})],
    "UNILORA": [(Mlp, BOTH | {"theta_d_length": 32, "save_indices": flag}) for flag in (False, True)],
    "VBLORA": [
        (Mlp, BOTH | {"vector_length": 2, "num_vectors": 8, "topk": 2, "save_only_topk_weights": flag})
        for flag in (False, True)
    ],
    "VERA": [(Mlp, BOTH)],
    "WAVEFT": [(Mlp, BOTH | {"n_frequency": 5})],
    "XLORA": [],  # needs saved adapters: a test of its own
}


def tuned(peft_type: str, make: Callable[[], nn.Module], options: dict[str, Any], adapter: str) -> PeftModel:
    torch.manual_seed(0)
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)](**options)
        return get_peft_model(make(), config, adapter_name=adapter)
    except ImportError as error:
        if peft_type != "ADAMSS":  # it alone needs scikit-learn; any other is a failure
            raise
        pytest.skip(f"PEFT itself needs more for this tuner: {error}")


def layout_of(state: dict[str, torch.Tensor]) -> Layout:
    return Layout(tuple(TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in state.items()))


def saved(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


# ---------------------------------------------------------------- the tables


def test_the_table_of_configuration_keys_is_that_of_the_installed_peft() -> None:
    assert peft.__version__.startswith(peft_keys.KNOWN_PEFT + "."), "another PEFT: look through the tables, then here"
    common = {f.name for f in dataclasses.fields(peft.PeftConfig)}
    found = {
        kind.value: {f.name for f in dataclasses.fields(config)} - common
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    missing = {kind: " ".join(sorted(keys - peft_keys.CONFIG_KEYS.get(kind, set()))) for kind, keys in found.items()}
    assert not {kind: keys for kind, keys in missing.items() if keys or kind not in peft_keys.CONFIG_KEYS}, (
        "add these to CONFIG_KEYS"
    )
    gone = {kind: keys - found.get(kind, set()) for kind, keys in peft_keys.CONFIG_KEYS.items()}
    assert not any(gone.values()), "say here which PEFT had them last"
    assert common == peft_keys.COMMON_KEYS
    assert set(found) == {kind.value for kind in PeftType} == set(peft_keys.CONFIG_KEYS) == set(TUNERS)
    assert peft_keys.CONFIG_KEYS.keys().isdisjoint(peft_keys.RETIRED_TYPES)


def tuner_layers() -> Iterator[type[BaseTunerLayer]]:
    import importlib
    import pkgutil

    for module in pkgutil.walk_packages(peft.tuners.__path__, "peft.tuners."):
        if module.name.endswith((".layer", ".layers")):
            importlib.import_module(module.name)
    waiting = [BaseTunerLayer]
    while waiting:
        layer = waiting.pop()
        waiting.extend(layer.__subclasses__())
        yield layer


def test_every_parameter_name_of_every_tuner_layer_is_in_the_table() -> None:
    names = {name for layer in tuner_layers() for name in layer.adapter_layer_names if not name.endswith("_dropout")}
    assert len(names) > 80
    assert names - peft_keys.CONTAINERS == set(), "add these to the table of their shape in peft_keys"


def test_every_prefix_of_a_tuner_stands_in_the_table() -> None:
    of_prompts = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
    for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if kind.value in of_prompts | {"XLORA", "ADAPTION_PROMPT"}:
            continue
        assert any(name.startswith(prefix) for name in peft_keys.CONTAINERS), prefix


def test_a_name_has_one_shape_in_the_tables() -> None:
    tables = ("TENSORS", "MODULES", "TENSORS_OR_MODULES", "LISTS", "BY_MODULE", "RENAMED", "ONE_ADAPTER")
    assert sum(len(getattr(peft_keys, table)) for table in tables) == len(peft_keys.CONTAINERS)


def test_every_lora_variant_is_an_option_of_the_content_digest() -> None:
    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants - set(LORA_OPTIONS) == {"velora_config"}  # its forward pass is plain LoRA's


def test_the_embeddings_that_peft_saves_unasked_are_known() -> None:
    assert set(EMBEDDING_LAYER_NAMES) == set(adapter_names._EMBEDDINGS)


# ---------------------------------------------------------------- names, tuner by tuner

CASES = [(kind, make, options) for kind, cases in TUNERS.items() for make, options in cases]


@pytest.mark.parametrize("adapter", ["default", "walk_2"])
@pytest.mark.parametrize(("kind", "make", "options"), CASES, ids=[f"{k}-{i}" for i, (k, _, _) in enumerate(CASES)])
def test_names_in_memory_and_in_a_file_are_one(
    kind: str, make: Callable[[], nn.Module], options: dict[str, Any], adapter: str
) -> None:
    base = set(make().state_dict())
    model = tuned(kind, make, options, adapter)
    prompts = model.peft_config[adapter].is_prompt_learning
    file = list(saved(model, adapter))
    assert file
    assert [name for name in file if not is_adapter_tensor(name)] == []

    live = list(model.state_dict())
    of_adapter = [name for name in live if is_adapter_tensor(name)]
    of_base = [name for name in live if not is_adapter_tensor(name)]
    if prompts:
        # Prompt learning wraps nothing: the base is under `base_model.`, its embedding once more beside it.
        assert {name.removeprefix("base_model.") for name in of_base} - {"word_embeddings.weight"} == base
        return
    if kind == "ADAPTION_PROMPT":  # its wrapper calls the wrapped attention `model`, which no name gives away
        of_base = [name.replace(".self_attn.model.", ".self_attn.") for name in of_base]
    assert {base_name(name) for name in of_base} == base

    in_file = {canonical_name(name, adapter) for name in file}
    assert in_file == {canonical_name(name) for name in file}
    names = {canonical_name(name, adapter) for name in of_adapter}
    assert names == {canonical_name(name) for name in of_adapter}
    if kind == "SHIRA":  # its indices are no buffers
        in_file = {name for name in in_file if not name.endswith("shira_indices")}
    if kind == "VBLORA" and options["save_only_topk_weights"]:
        in_file = {re.sub("_topk_(indices|weights)$", "", name) for name in in_file}
    assert in_file <= names
    # What is left in memory alone: per-layer views of what all layers share, and AdaLoRA's count.
    shared = {name.rpartition(".")[2] for name in names if name.startswith("base_model.")}
    extra = {name for name in names - in_file if name.rpartition(".")[2] not in shared}
    assert {name.rpartition(".")[2] for name in extra} <= {"ranknum", "0", "1"}


def test_of_two_adapters_each_has_its_own_names() -> None:
    model = get_peft_model(Mlp(), LoraConfig(r=2, **BOTH), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=4, **BOTH))
    names = {canonical_name(name, "one") for name in model.state_dict() if is_adapter_tensor(name)}
    assert {canonical_name(name) for name in saved(model, "one")} <= names
    assert "lin0.lora_A.two.weight" in names


def test_x_lora_is_a_classifier_around_adapters(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(r=2, **Q)).save_pretrained(tmp_path)
    base = llama()
    base.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, xlora_depth=2, adapters={"0": str(tmp_path)})
    model = get_peft_model(base, config)
    file = saved(model)
    assert file
    assert all(is_adapter_tensor(name) for name in file)
    of_base = {base_name(name) for name in model.state_dict() if not is_adapter_tensor(name)}
    assert of_base == set(llama().state_dict())
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in {canonical_name(name) for name in model.state_dict()}


@pytest.mark.parametrize("adapter", ["weight", "bias"])
def test_an_adapter_called_weight_is_told_by_its_name(adapter: str) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["emb", "lin"], "use_dora": True}
    model = get_peft_model(Zoo(), LoraConfig(**options), adapter_name=adapter)
    live = {canonical_name(name, adapter) for name in model.state_dict() if is_adapter_tensor(name)}
    assert live == {canonical_name(name) for name in saved(model, adapter)}


@pytest.mark.parametrize("path", ["a.b.q", "a.b.qv", "a_b.q", "q", "layers.11.q"])
@pytest.mark.parametrize(
    "keys", [["q"], ["b.q", "q"], ["^q", "a.b"], [r"layers\.\d+\.q", "q"], ["q|v"], ["(a|b).*", "q"], [".*q.*"], []]
)
def test_patterns_are_looked_up_as_peft_does(keys: list[str], path: str) -> None:
    assert (PatternTable(keys).find(path) or path) == get_pattern_key(keys, path)


# ---------------------------------------------------------------- LoRA, variant by variant

ALL = ["emb", "lin", "conv1", "conv2", "conv3", "transposed"]
VARIANTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], set[Target]]] = {
    "every layer": (
        Zoo,
        {"r": 4, "lora_alpha": 6, "target_modules": [*ALL, "grouped", "mha"]},
        {
            Target("emb", 4, 10, 8, "embedding"),
            Target("lin", 4, 8, 6, "linear"),
            Target("conv1", 4, 8, 12, "conv1d"),
            Target("conv2", 4, 4, 6, "conv2d"),
            Target("grouped", 4, 4, 8, "conv2d+grouped"),
            Target("conv3", 4, 2, 4, "conv3d"),
            Target("transposed", 4, 8, 12, "linear"),
            Target("mha", 4, 8, 24, "attention"),
            Target("mha.out_proj", 4, 8, 8, "attention_out"),
        },
    ),
    "DoRA": (
        Zoo,
        {"r": 4, "target_modules": ALL, "use_dora": True},
        {
            Target("emb", 4, 10, 8, "embedding+dora"),
            Target("lin", 4, 8, 6, "linear+dora"),
            Target("conv1", 4, 8, 12, "conv1d+dora"),
            Target("conv2", 4, 4, 6, "conv2d+dora"),
            Target("conv3", 4, 2, 4, "conv3d+dora"),
            Target("transposed", 4, 8, 12, "linear+dora"),
        },
    ),
    "rsLoRA": (Zoo, {"r": 4, "use_rslora": True, "target_modules": ["lin"]}, {Target("lin", 4, 8, 6, "linear")}),
    "Conv1D": (
        Zoo,
        {"r": 4, "fan_in_fan_out": True, "target_modules": ["transposed"]},
        {Target("transposed", 4, 8, 12, "linear")},
    ),
    "patterns": (
        Zoo,
        {
            "r": 4,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": ["lin", "conv2", "mha", "emb"],
            "rank_pattern": {"^lin": 2, "mha": 6, "out_proj": 5, r"conv\d": 3},
            "alpha_pattern": {"l.n": 10, "^(mha|emb)$": 7, "mha.out_proj": 1},
        },
        {
            Target("lin", 2, 8, 6, "linear"),
            Target("conv2", 3, 4, 6, "conv2d"),
            Target("emb", 4, 10, 8, "embedding"),
            Target("mha", 6, 8, 24, "attention"),
            Target("mha.out_proj", 6, 8, 8, "attention_out"),
        },
    ),
    "lora_bias": (
        Zoo,
        {"r": 4, "lora_bias": True, "bias": "lora_only", "target_modules": ["lin", "conv2"]},
        {
            Target("lin", 4, 8, 6, "linear+lora_bias+base_bias"),
            Target("conv2", 4, 4, 6, "conv2d+lora_bias+base_bias"),
        },
    ),
    "all biases": (
        Mlp,
        {"r": 4, "bias": "all", "target_modules": ["lin0"]},
        {
            Target("lin0", 4, 12, 24, "linear+base_bias"),
            Target("ln", 0, None, 24, "bias"),
            Target("lin1", 0, None, 12, "bias"),
        },
    ),
    "modules_to_save": (
        Zoo,
        {"r": 4, "target_modules": ["lin"], "modules_to_save": ["head", "conv2"]},
        {
            Target("lin", 4, 8, 6, "linear"),
            Target("head.0", 0, 8, 4, "full"),
            Target("head.1", 0, None, 4, "full"),
            Target("conv2", 0, 4, 6, "full"),
        },
    ),
    "biases beside modules_to_save": (
        Zoo,
        {"r": 4, "target_modules": ["lin"], "modules_to_save": ["head"], "bias": "lora_only"},
        {
            Target("lin", 4, 8, 6, "linear+base_bias"),
            Target("head.0", 0, 8, 4, "full"),
            Target("head.1", 0, None, 4, "full"),
        },
    ),
    "one parameter": (
        Moe,
        {"r": 2, "target_modules": ["q"], "target_parameters": ["experts.down_proj"], "rank_pattern": {"down_proj": 3}},
        {Target("q", 2, 8, 8, "linear"), Target("experts.down_proj", 3, 16, 8, "parameter")},
    ),
    "two parameters": (
        Moe,
        {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj", "gate_up_proj"]},
        {
            Target("experts", 2, 16, 8, "parameter"),
            Target("experts.base_layer", 2, 8, 16, "parameter"),
        },
    ),
    "tokens": (
        Zoo,
        {"r": 4, "target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 2]}},
        {Target("lin", 4, 8, 6, "linear"), Target("emb", 0, None, 8, "token")},
    ),
    "KaSA": (
        Zoo,
        {"r": 4, "target_modules": ["lin"], "kasa_config": {}},
        {Target("lin", 4, 8, 6, "linear+kasa")},
    ),
    "VeLoRA": (
        Zoo,
        {"r": 4, "target_modules": ["lin"], "velora_config": {"num_groups": 4}},
        {Target("lin", 4, 8, 6, "linear")},
    ),
    "MonteCLoRA": (
        Zoo,
        {"r": 4, "target_modules": ["lin"], "monteclora_config": {}},
        {Target("lin", 4, 8, 6, "linear")},
    ),
    "BD-LoRA": (
        Moe,
        {"r": 4, "target_modules": ["q"], "use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": 2}},
        {Target("q", 4, 8, 8, "linear")},
    ),
    "BD-LoRA on B": (
        Moe,
        {"r": 4, "target_modules": ["q"], "use_bdlora": {"target_modules_bd_b": ["q"], "nblocks": 2}},
        {Target("q", 4, 8, 8, "linear")},
    ),
    "layer replication": (
        llama,
        {"r": 2, "target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]], "rank_pattern": {"2.*q_proj": 3}},
        {
            Target("model.layers.0.self_attn.q_proj", 2, 16, 16, "linear"),
            Target("model.layers.1.self_attn.q_proj", 2, 16, 16, "linear"),
            Target("model.layers.2.self_attn.q_proj", 3, 16, 16, "linear"),
        },
    ),
}


@dataclasses.dataclass
class Adapter:
    model: PeftModel
    folder: Path
    config: AdapterConfig
    layout: Layout
    wanted: set[Target]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path: Path) -> Adapter:
    make, options, wanted = VARIANTS[request.param]
    torch.manual_seed(0)
    model = get_peft_model(make(), LoraConfig(**options))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = read_adapter_config((tmp_path / "adapter_config.json").read_bytes(), "adapter_config.json")
    return Adapter(model, tmp_path, config, layout_of(load_file(tmp_path / "adapter_model.safetensors")), wanted)


def test_the_targets_of_a_saved_adapter_are_the_layers_that_peft_wrapped(variant: Adapter) -> None:
    targets, findings = targets_of(variant.layout, variant.config)
    assert set(targets) == variant.wanted
    assert len(targets) == len({target.module for target in targets})
    assert findings == ()


def test_a_live_model_has_the_targets_of_its_file(variant: Adapter) -> None:
    whole = layout_of(variant.model.state_dict())
    live = adapter_config(variant.model.peft_config["default"].to_dict())
    targets, findings = targets_of(whole, live)
    # Which biases were trained is not in a whole model's names.
    wanted = {dataclasses.replace(t, kind=t.kind.replace("+base_bias", "")) for t in variant.wanted if t.kind != "bias"}
    assert {dataclasses.replace(t, kind=t.kind.replace("+base_bias", "")) for t in targets} == wanted
    assert [finding for finding in findings if finding.code != "C23"] == []


def test_scaling_is_that_of_the_live_layer(variant: Adapter) -> None:
    found = {
        target.module: target_scaling(variant.config, target)
        for target in targets_of(variant.layout, variant.config)[0]
    }
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in variant.model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    compared = set()
    for path, layer in layers.items():
        inside = path.replace(".base_layer", "")
        places = {path, inside, f"{inside}.{getattr(layer, 'parameter_name', '')}"} & found.keys()
        place = path if path in places else places.pop()
        assert found[place] == layer.scaling["default"], path
        compared.add(place)
    assert {module for module, scaling in found.items() if scaling is not None} == compared
    assert len(compared) == len(layers)


def test_a_saved_configuration_is_the_live_one_in_another_order(variant: Adapter) -> None:
    live = adapter_config(variant.model.peft_config["default"].to_dict())
    assert canonical_config(live) == canonical_config(variant.config)


def test_a_live_adapter_and_its_folder_have_one_content_digest(variant: Adapter) -> None:
    live = adapter_config(variant.model.peft_config["default"].to_dict())
    state = variant.model.state_dict()
    by_canonical = {canonical_name(name): name for name in state}
    wanted = {canonical_name(spec.name) for spec in variant.layout}
    names = {name: state[by_canonical[name]] for name in wanted}
    as_live = layout_of({by_canonical[name]: tensor for name, tensor in reversed(names.items())})

    def digest(layout: Layout, config: AdapterConfig) -> str:
        digests = [f"digest of {canonical_name(spec.name)}" for spec in layout]
        return content_digest({"adapter": (layout, digests)}, config, targets_of(layout, config)[0])

    assert digest(as_live, live) == digest(variant.layout, variant.config)


@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        (["embed_tokens", "q_proj"], {"model.embed_tokens": "embedding+full"}),
        (["q_proj"], {"model.embed_tokens": "full", "lm_head": "full"}),
    ],
)
def test_embeddings_saved_with_the_adapter_are_targets(
    targets: list[str], kinds: dict[str, str], tmp_path: Path
) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    config = read_adapter_config((tmp_path / "adapter_config.json").read_bytes(), "config")
    found, findings = targets_of(layout_of(load_file(tmp_path / "adapter_model.safetensors")), config)
    assert {target.module: target.kind for target in found if "full" in target.kind} == kinds
    assert findings == ()


def test_two_saves_of_one_adapter_have_one_canonical_configuration(tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 2, "modules_to_save": ["ln"]}
    texts = []
    for number, targets in enumerate((["lin0", "lin1"], ["lin1", "lin0"])):
        model = get_peft_model(Mlp(), LoraConfig(target_modules=targets, **options))
        model.save_pretrained(tmp_path / str(number))
        texts.append((tmp_path / str(number) / "adapter_config.json").read_bytes())
    first, second = (canonical_config(read_adapter_config(text, "config")) for text in texts)
    assert json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path / "0")
    assert canonical_config(adapter_config(loaded.peft_config["default"].to_dict())) == first


@pytest.mark.parametrize("kind", sorted(set(TUNERS) - {"XLORA"}))
def test_every_live_configuration_can_be_read(kind: str, tmp_path: Path) -> None:
    options = TUNERS[kind][0][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**options)
        except ImportError as error:
            if kind != "ADAMSS":  # as in `tuned`
                raise
            pytest.skip(f"PEFT itself needs more for this tuner: {error}")
    live = adapter_config(config.to_dict())
    config.save_pretrained(str(tmp_path))
    file = read_adapter_config((tmp_path / "adapter_config.json").read_bytes(), "config")
    assert live.peft_type == file.peft_type == kind
    assert live.peft_version == file.peft_version == peft.__version__
    assert canonical_config(live) == canonical_config(file)
