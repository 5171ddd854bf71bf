"""PEFT is the truth: the update of each kind of layer is compared with what PEFT would add to the weight."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from registry.core.adapter_config import AdapterConfig, read_adapter_config
from registry.core.layout import layout_of
from registry.core.tensor_names import canonical_name, without_layers
from registry.formats.live import tensor_spec
from registry.merge.lora_modules import LoraModule, lora_modules, update_of
from registry.merge.low_rank import norm
from tests.operations.models import train, zoo

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["lin"]},
    "convolutions": {"target_modules": ["conv1", "conv2", "conv3"]},
    "embedding": {"target_modules": ["emb"]},
    "Conv1D of transformers": {"target_modules": ["transposed"], "fan_in_fan_out": True},
    "MultiheadAttention": {"target_modules": ["mha"]},
    "rsLoRA": {"target_modules": ["lin", "conv2"], "use_rslora": True},
    "lora_bias": {"target_modules": ["lin", "conv2"], "lora_bias": True},
    "patterns": {
        "target_modules": ["lin", "conv2", "mha", "emb"],
        "rank_pattern": {"^lin": 2, "mha": 6, r"conv\d": 3},
        "alpha_pattern": {"l.n": 10, "^(mha|emb)$": 7},
    },
    "modules_to_save": {"target_modules": ["lin"], "modules_to_save": ["head", "conv2"], "bias": "all"},
    "tokens": {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 3]}},
    "one parameter": {"target_modules": ["lin"], "target_parameters": ["experts.down_proj"]},
    "two parameters": {"target_modules": [], "target_parameters": ["experts.up_proj", "experts.down_proj"]},
}


def made(folder: Path, **options: Any) -> tuple[PeftModel, dict[str, Tensor], AdapterConfig]:
    """A model with a LoRA, and what PEFT saves of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(zoo(), LoraConfig(**({"r": 4, "lora_alpha": 6} | options)))
        train(model)
        model.save_pretrained(folder)
    config = read_adapter_config((folder / "adapter_config.json").read_bytes(), "adapter_config.json")
    return model, load_file(folder / "adapter_model.safetensors"), config


def modules_of(tensors: dict[str, Tensor], config: AdapterConfig | None) -> dict[str, LoraModule]:
    return lora_modules(layout_of(tensor_spec(name, tensor) for name, tensor in tensors.items()), config)


def layers(model: PeftModel) -> dict[str, LoraLayer]:
    """PEFT's layers by the path that a target has."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            bare = ".".join(without_layers(canonical_name(f"{path}.lora_A").split(".")[:-1]))
            found[f"{bare}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else bare] = layer
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_of_each_kind_of_layer_is_what_peft_adds(kind: str, tmp_path: Path) -> None:
    model, tensors, config = made(tmp_path, **KINDS[kind])
    expected = {path: layer.get_delta_weight("default").detach() for path, layer in layers(model).items()}
    found = modules_of(tensors, config)
    assert {module.obstacle for module in found.values()} == {""}
    norms = [norm(update_of(module, tensors)) for module in found.values()]
    if kind == "two parameters":  # which of the two is which stands in no file
        assert sorted(norms) == pytest.approx(sorted(float(one.double().norm()) for one in expected.values()), rel=1e-6)
        return
    assert found.keys() == expected.keys()
    for module, size in zip(found, norms, strict=True):
        assert size == pytest.approx(float(expected[module].double().norm()), rel=1e-6)


def test_a_grouped_convolution_has_one_product_a_group(tmp_path: Path) -> None:
    model, tensors, config = made(tmp_path, target_modules=["grouped"])
    (layer,) = layers(model).values()
    # PEFT forms no matrix here; what comes out of one input at a time is one.
    inputs = torch.eye(4 * 9).reshape(36, 4, 3, 3)
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    assert isinstance(down, nn.Conv2d)
    with torch.no_grad():
        dense = up(down(inputs)).reshape(36, 8) * layer.scaling["default"]
    module = modules_of(tensors, config)["grouped"]
    assert module.blocks == 2
    assert norm(update_of(module, tensors)) == pytest.approx(float(dense.norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"use_dora": True}, "DoRA scales the whole weight by a magnitude"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changed the base weight as well"),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora changed the base weight as well"),
    ],
)
def test_what_is_no_product_of_factors_says_so(options: dict[str, Any], obstacle: str, tmp_path: Path) -> None:
    _, tensors, config = made(tmp_path, target_modules=["lin"], **options)
    module = modules_of(tensors, config)["lin"]
    assert module.obstacle == obstacle
    with pytest.raises(ValueError, match="is no product"):
        update_of(module, tensors)


def test_without_a_configuration_the_scaling_is_unknown(tmp_path: Path) -> None:
    _, tensors, _ = made(tmp_path, target_modules=["lin"])
    module = modules_of(tensors, None)["lin"]
    assert module.scaling is None
    assert module.obstacle.startswith("lora_alpha is unknown")
