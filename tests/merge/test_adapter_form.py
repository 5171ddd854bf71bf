"""PEFT is the truth: what is made here loads without a missing or unexpected tensor, and each layer then has the
product of the factors that were given."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from registry.core.adapter_config import AdapterConfig, adapter_config, config_findings, read_adapter_config
from registry.core.adapter_names import targets_of
from registry.core.errors import InvalidInput, ShapeMismatch
from registry.core.layout import layout_of
from registry.core.tensor_names import canonical_name, without_layers
from registry.formats.live import tensor_spec
from registry.merge.adapter_form import MadeModule, made_config, made_module, peft_tensors
from registry.merge.lora_modules import factors_of, lora_modules, update_of
from registry.merge.low_rank import LowRank
from tests.operations.models import train, zoo

SIZES: dict[str, tuple[str, int, int, tuple[int, ...]]] = {
    "emb": ("embedding", 8, 10, ()),
    "lin": ("linear", 6, 8, ()),
    "conv1": ("conv1d", 12, 24, (8, 3)),
    "conv2": ("conv2d", 6, 36, (4, 3, 3)),
    "conv3": ("conv3d", 4, 12, (2, 3, 1, 2)),
    "mha": ("attention", 24, 8, ()),
    "mha.out_proj": ("attention_out", 8, 8, ()),
    "transposed": ("linear", 12, 8, ()),
}
"""Kind, out, in * kernel and kernel of the modules of a zoo."""


def of_zoo(path: str, rank: int, *, bias: bool = False) -> MadeModule:
    kind, rows, columns, kernel = SIZES[path]
    return made(path, kind, rank, rows, columns, kernel=kernel, bias=torch.randn(rows) if bias else None)


def made(path: str, kind: str, rank: int, rows: int, columns: int, *, blocks: int = 1, **others: Any) -> MadeModule:
    factors = LowRank(torch.randn(blocks, rank, columns).double(), torch.randn(blocks, rows, rank).double())
    return MadeModule(path, kind, factors, **others)


class Nest(nn.Module):
    """Paths of which one is the end of another, and two that differ where a dot is."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.abq = nn.Linear(4, 4)
        self.a = nn.ModuleDict({"q": nn.Linear(4, 4), "x+y": nn.Linear(4, 4)})
        self.b = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4)})})


NEST = ("q", "abq", "a.q", "a.x+y", "b.a.q")
NEST_PATHS = (*NEST, "a", "b", "b.a")


def written(folder: Path, modules: Sequence[MadeModule], **options: Any) -> tuple[dict[str, Tensor], AdapterConfig]:
    """Tensors and configuration of an adapter, as they come out of its files."""
    tensors = peft_tensors(modules, torch.float32)
    config = made_config(modules, **options)
    assert config_findings(config) == ()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config.document, sort_keys=True)  # as the registry writes it: the order of keys is lost
    (folder / "adapter_config.json").write_text(text)
    return tensors, read_adapter_config(text.encode(), "adapter_config.json")


def loaded(base: nn.Module, folder: Path) -> dict[str, LoraLayer]:
    """PEFT's layers by the path of their target; every tensor of the file is in the model and the other way round."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups > 1")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        warnings.filterwarnings("ignore", message=".*embedding layer")
        model = PeftModel.from_pretrained(base, folder)
        inside = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert inside.keys() == load_file(folder / "adapter_model.safetensors").keys()
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            bare = ".".join(without_layers(canonical_name(f"{path}.lora_A").split(".")[:-1]))
            found[f"{bare}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else bare] = layer
    return found


def product(module: MadeModule) -> Tensor:
    return (module.factors.b @ module.factors.a).float()


def assert_same(modules: Sequence[MadeModule], layers: dict[str, LoraLayer]) -> None:
    for module in modules:
        layer = layers[module.path]
        assert layer.scaling["default"] == 1
        delta = layer.get_delta_weight("default").detach()
        expected = product(module)[0]
        if module.kind == "embedding" or module.path == "transposed":
            expected = expected.T
        torch.testing.assert_close(delta.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def read_back(tensors: dict[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """What our own reader makes of the adapter."""
    layout = layout_of(tensor_spec(name, tensor) for name, tensor in tensors.items())
    assert targets_of(layout, config)[1] == ()
    found = lora_modules(layout, config)
    assert {module.obstacle for module in found.values()} == {""}
    assert {module.scaling for module in found.values()} == {1.0}
    updates = {path: update_of(module, tensors) for path, module in found.items()}
    return {path: (update.b @ update.a).float() for path, update in updates.items()}


def test_each_kind_of_layer_in_a_rank_of_its_own_is_what_peft_adds(tmp_path: Path) -> None:
    modules = [of_zoo(path, rank) for rank, path in enumerate(SIZES, 1) if path != "mha.out_proj"]
    modules.append(of_zoo("mha.out_proj", 2))
    tensors, config = written(tmp_path, modules)
    assert_same(modules, loaded(zoo(), tmp_path))
    again = read_back(tensors, config)
    assert again.keys() == {module.path for module in modules}
    for module in modules:
        torch.testing.assert_close(again[module.path], product(module), rtol=1e-5, atol=1e-5)


def test_a_projection_of_an_attention_that_is_missing_is_zero(tmp_path: Path) -> None:
    modules = [of_zoo("mha.out_proj", 3)]
    tensors, config = written(tmp_path, modules)
    assert_same(modules, loaded(zoo(), tmp_path))
    assert float(read_back(tensors, config)["mha"].abs().max()) == 0


def test_a_grouped_convolution_has_a_product_for_each_group(tmp_path: Path) -> None:
    module = made("grouped", "conv2d", 2, 4, 36, blocks=2, kernel=(4, 3, 3))
    tensors, config = written(tmp_path, [module, of_zoo("lin", 2)])
    assert (config.r, config.rank_pattern) == (4, {"lin": 2})
    layer = loaded(zoo(), tmp_path)["grouped"]
    inputs = torch.eye(36).reshape(36, 4, 3, 3)
    with torch.no_grad():
        dense = layer.lora_B["default"](layer.lora_A["default"](inputs)).reshape(36, 8).T
    torch.testing.assert_close(dense, product(module).reshape(8, 36), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read_back(tensors, config)["grouped"], product(module), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [["experts.down_proj"], ["experts.up_proj", "experts.down_proj"]])
def test_experts_keep_their_order(names: list[str], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(zoo(), LoraConfig(r=2, lora_alpha=2, target_modules=["lin"], target_parameters=names))
        train(peft)
        peft.save_pretrained(tmp_path)
    source = load_file(tmp_path / "adapter_model.safetensors")
    like = read_adapter_config((tmp_path / "adapter_config.json").read_bytes(), "adapter_config.json")
    layout = layout_of(tensor_spec(name, tensor) for name, tensor in source.items())
    modules = [made_module(one, layout, factors_of(one, source)) for one in lora_modules(layout, like).values()]
    if len(names) == 1:  # of another rank than the linear
        wider = next(one for one in modules if one.kind == "parameter")
        zeros = torch.zeros(3, 3, wider.factors.a.shape[2]), torch.zeros(3, wider.factors.b.shape[1], 3)
        factors = LowRank(torch.cat((wider.factors.a, zeros[0]), 1), torch.cat((wider.factors.b, zeros[1]), 2))
        modules = [one if one is not wider else made_module_like(wider, factors) for one in modules]
    tensors, config = written(tmp_path, modules, like=[like])
    expected = {
        path: layer.get_delta_weight("default").detach() for path, layer in sorted(loaded(zoo(), tmp_path).items())
    }
    original = {
        f"experts.{layer.parameter_name}": layer.get_delta_weight("default").detach()
        for layer in peft.modules()
        if hasattr(layer, "parameter_name")
    }
    for path, delta in original.items():
        torch.testing.assert_close(expected[path], delta)
    assert read_back(tensors, config).keys() == {one.path for one in modules}


def made_module_like(module: MadeModule, factors: LowRank) -> MadeModule:
    return MadeModule(module.path, module.kind, factors, module.kernel, module.bias, module.wrapper)


def test_one_bias_gives_every_module_one(tmp_path: Path) -> None:
    modules = [of_zoo("lin", 2, bias=True), of_zoo("conv2", 2)]
    tensors, config = written(tmp_path, modules)
    layers = loaded(zoo(), tmp_path)
    assert_same(modules, layers)
    assert config.lora_bias
    assert modules[0].bias is not None
    torch.testing.assert_close(layers["lin"].lora_B["default"].bias.detach(), modules[0].bias)
    assert float(layers["conv2"].lora_B["default"].bias.abs().max()) == 0
    read_back(tensors, config)


def test_a_bias_beside_an_embedding_is_refused() -> None:
    with pytest.raises(InvalidInput, match="emb is an embedding, for which PEFT knows no lora_bias"):
        peft_tensors([of_zoo("lin", 2, bias=True), of_zoo("emb", 2)], torch.float32)


def test_a_rank_of_zero_becomes_a_product_of_zeros(tmp_path: Path) -> None:
    modules = [of_zoo("lin", 0)]
    written(tmp_path, modules)
    assert float(loaded(zoo(), tmp_path)["lin"].get_delta_weight("default").abs().max()) == 0


@pytest.mark.parametrize("chosen", [NEST, ("q",), ("a.q",), ("b.a.q", "abq"), ("a.x+y", "q")])
@pytest.mark.parametrize("ranks", [(2, 2, 2, 2, 2), (1, 2, 3, 4, 3), (3, 1, 2, 2, 1)])
def test_paths_of_which_one_ends_in_another_are_told_apart(
    chosen: tuple[str, ...], ranks: tuple[int, ...], tmp_path: Path
) -> None:
    modules = [made(path, "linear", rank, 4, 4) for path, rank in zip(NEST, ranks, strict=True) if path in chosen]
    tensors, config = written(tmp_path, modules, all_paths=NEST_PATHS)
    layers = loaded(Nest(), tmp_path)
    assert layers.keys() == set(chosen)
    assert_same(modules, layers)
    assert read_back(tensors, config).keys() == set(chosen)


def config_like(**document: Any) -> AdapterConfig:
    return adapter_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **document})


Q = [made("q", "linear", 2, 4, 4), made("a.q", "linear", 2, 4, 4), made("b.a.q", "linear", 2, 4, 4)]


def test_short_names_of_the_sources_stay_where_they_select_exactly_the_modules() -> None:
    one, two = config_like(target_modules=["q"]), config_like(target_modules=["abq"])
    assert made_config(Q, like=[one], all_paths=NEST_PATHS).target_modules == ("q",)
    assert made_config(Q, like=[one]).target_modules == ("q",)
    assert made_config(Q[:2], like=[one], all_paths=NEST_PATHS).target_modules == r"a\.q|q"
    both = [*Q, made("abq", "linear", 1, 4, 4)]
    assert made_config(both, like=[one, two]).target_modules == ("abq", "q")
    assert made_config(both, like=[one, two], all_paths=NEST_PATHS).target_modules == ("abq", "q")
    assert made_config(Q[2:], all_paths=NEST_PATHS).target_modules == ("b.a.q",)
    assert made_config(Q, target_modules=["q"]).target_modules == ("q",)
    assert made_config(Q, target_modules=["abq"], all_paths=NEST_PATHS).target_modules == ("q",)


def test_layers_that_a_source_left_out_stay_out() -> None:
    modules = [made("h.layer.0.q", "linear", 2, 4, 4)]
    paths = ("h.layer.0.q", "h.layer.1.q", "h.layer.0", "h.layer.1", "h.layer", "h")
    one = config_like(target_modules=["q"], layers_to_transform=[0])
    two = config_like(target_modules=["q"], layers_to_transform=None)
    assert made_config(modules, like=[one]).layers_to_transform == (0,)
    for config in (made_config(modules, like=[one, two]), made_config(modules, like=[one], all_paths=paths)):
        assert config.layers_to_transform is None
        assert config.target_modules == ("h.layer.0.q",) or config.target_modules == ("0.q",)


def test_an_expression_of_all_sources_stays_without_knowledge_of_the_base() -> None:
    one = config_like(target_modules=r".*q")
    assert made_config(Q, like=[one, one]).target_modules == ".*q"
    assert made_config(Q, like=[one, config_like(target_modules="all-linear")]).target_modules == ("a.q", "b.a.q", "q")


def test_scaling_and_variants_are_never_inherited() -> None:
    one = config_like(
        use_rslora=True,
        use_dora=True,
        init_lora_weights="pissa",
        rank_pattern={"q": 7},
        target_modules=["q"],
        task_type="CAUSAL_LM",
        modules_to_save=["head"],
        layer_replication=[[0, 1]],
        loftq_config={},
        lora_dropout=0.1,
        fan_in_fan_out=True,
    )
    config = made_config(Q, like=[one], base_model="walk/base")
    assert (config.r, config.lora_alpha, config.use_rslora, config.use_dora) == (2, 2, False, False)
    assert (config.rank_pattern, config.alpha_pattern, config.init_lora_weights) == ({}, {}, "true")
    assert (config.task_type, config.modules_to_save, config.layer_replication) == ("CAUSAL_LM", ("head",), ((0, 1),))
    assert (config.lora_dropout, config.fan_in_fan_out, config.base_model) == (0.1, True, "walk/base")
    assert "loftq_config" in config.document
    other = made_config(Q, like=[one, config_like(target_modules=["q"], task_type="SEQ_CLS", modules_to_save=["head"])])
    assert (other.task_type, other.modules_to_save, other.layer_replication) == (None, ("head",), ())
    assert made_config(Q, like=[one], extra={"modules_to_save": None}).modules_to_save == ()


def test_factors_that_do_not_fit_are_refused_by_name() -> None:
    wrong = MadeModule("lin", "linear", LowRank(torch.zeros(1, 2, 8), torch.zeros(1, 6, 3)))
    with pytest.raises(ShapeMismatch, match=r"lin, linear: A \[1, 2, 8\] and B \[1, 6, 3\]"):
        peft_tensors([wrong], torch.float32)
    with pytest.raises(ShapeMismatch, match="a row of A has 24 numbers, its kernel"):
        peft_tensors([made("conv1", "conv1d", 2, 12, 24, kernel=(8, 2))], torch.float32)
    with pytest.raises(InvalidInput, match="expected one of linear"):
        peft_tensors([made("lin", "transformers_conv1d", 2, 12, 24)], torch.float32)
    with pytest.raises(InvalidInput, match="made twice"):
        peft_tensors([Q[0], Q[0]], torch.float32)
    with pytest.raises(InvalidInput, match="nothing to write"):
        made_config([])


def test_numbers_are_rounded_once() -> None:
    module = MadeModule("q", "linear", LowRank(torch.full((1, 1, 4), 1 / 3).double(), torch.ones(1, 4, 1).double()))
    tensors = peft_tensors([module], torch.bfloat16)
    assert tensors["base_model.model.q.lora_A.weight"].dtype == torch.bfloat16
    assert float(tensors["base_model.model.q.lora_A.weight"][0, 0]) == float(torch.tensor(1 / 3).bfloat16())
