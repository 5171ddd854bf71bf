"""Live models that are not what their configuration says: rescaled, switched off, with more adapters than one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from registry import InvalidInput, Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.init(tmp_path / "registry")


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    nn.init.normal_(made.base_model.model[0].lora_B["default"].weight)
    return made


def layer(of: Any) -> BaseTunerLayer:
    return next(module for module in of.modules() if isinstance(module, BaseTunerLayer))


def test_a_model_that_was_rescaled_is_not_pushed_as_its_configuration(registry: Registry) -> None:
    for change in (lambda m: layer(m).set_scale("default", 5.0), lambda m: layer(m).scale_layer(3.0)):
        rescaled = model()
        change(rescaled)
        with pytest.raises(InvalidInput, match="not scaled as its configuration says, 0 first: expected 2, found"):
            registry.push(rescaled, "walk/perturb")
    assert registry.find() == []
    assert registry.push(model(), "walk/perturb").created


def test_an_adapter_is_not_loaded_into_layers_that_are_switched_off(registry: Registry) -> None:
    registry.push(model(0), "walk/perturb")
    other = model(1)
    other.base_model.disable_adapter_layers()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(InvalidInput, match="adapter layers are disabled"):
        registry.load("walk/perturb", other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    other.base_model.enable_adapter_layers()
    registry.load("walk/perturb", other)


def test_adapters_that_are_left_out_are_told(registry: Registry) -> None:
    two = model()
    two.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    assert registry.push(two, "walk/perturb").notes == ("pushed the adapter default alone; left out: other",)


def test_an_adapter_is_no_base(registry: Registry) -> None:
    registry.push(model(0), "walk/perturb")
    with pytest.raises(InvalidInput, match="walk/perturb is an adapter"):
        registry.push(model(1), "walk/other", base="walk/perturb")


@pytest.mark.parametrize("text", ["007", "1.10", "1e10", "9007199254740993", "+5", "2.50"])
def test_metadata_comes_back_as_it_was_written(registry: Registry, text: str) -> None:
    from registry.core.annotations import parse_metadata_text

    registry.push({"weight": torch.ones(2)}, "walk/base", metadata={"k": parse_metadata_text(text)})
    assert str(registry.get("walk/base").metadata["k"]) == text
    assert len(registry.find(f"meta.k = {float(text)!r}")) == 1
