"""Live PEFT models as what `model_weights` takes, and what it makes of all of their weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from registry.core.adapter_config import AdapterConfig, adapter_config
from registry.core.layout import layout_of
from registry.core.tensor_names import base_name, is_adapter_tensor
from registry.formats.live import adapter_tensors, live_config, tensor_spec
from registry.merge.lora_modules import LoraModule, lora_modules
from registry.merge.model_weights import WeightUpdate, merged_bias, merged_weight
from tests.operations.models import train


def adapted(base: nn.Module, *, seed: int = 1, names: Sequence[str] = ("default",), **options: Any) -> PeftModel:
    """A base with trained adapters, of several names where they are given."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 6} | options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, lora_bias and the like
        model = get_peft_model(base, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, replace(config))
    for number, name in enumerate(names):
        model.set_adapter(name)
        train(model, seed + number)
    return model.eval()


def updates_of(model: PeftModel, name: str = "default", *, weight: float = 1.0) -> dict[str, WeightUpdate]:
    """What an adapter does to each module, by the path of the target."""
    tensors, config = adapter_tensors(model, name), live_config(model, name)
    modules = lora_modules(layout_of(tensor_spec(key, one) for key, one in tensors.items()), config)
    return {path: WeightUpdate(module, tensors, weight, config) for path, module in modules.items()}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base's tensors, under its own names."""
    return {
        base_name(name): one.detach().clone() for name, one in model.state_dict().items() if not is_adapter_tensor(name)
    }


def merged_tensors(
    base: Mapping[str, Tensor], adapters: Sequence[Mapping[str, WeightUpdate]], **options: Any
) -> dict[str, Tensor]:
    """All tensors of the base, with the adapters in those that they change."""
    found = dict(base)
    dtypes = {"dtype": options.get("dtype", torch.float32)}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        updates = [adapter[path] for adapter in adapters if path in adapter]
        kind, *flags = updates[0].module.target.kind.split("+")
        name = path + {"attention": ".in_proj_weight", "parameter": ""}.get(kind, ".weight")
        found[name] = merged_weight(base[name], updates, **options).tensor
        if "lora_bias" in flags:
            bias = path + (".in_proj_bias" if kind == "attention" else ".bias")
            found[bias] = merged_bias(base.get(bias), updates, **dtypes).tensor
    return found


def update(*factors: tuple[str, Tensor], module: str = "q", weight: float = 1.0, **config: Any) -> WeightUpdate:
    """What an adapter of these tensors does to one module.

    Args:
        factors: pairs of a part's name, like `lora_A.weight`, and its tensor.
        config: beside `r` and `lora_alpha`, which are 1 unless they are given.
    """
    tensors = {f"{module}.{part}": one for part, one in factors}
    document: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": 1, "r": 1, "target_modules": [module], **config}
    made: AdapterConfig = adapter_config(document)
    modules: dict[str, LoraModule] = lora_modules(
        layout_of(tensor_spec(key, one) for key, one in tensors.items()), made
    )
    (only,) = modules.values()
    return WeightUpdate(only, tensors, weight, made)


def linear(out: int, inputs: int, rank: int, *, seed: int = 0, std: float = 1.0, **options: Any) -> WeightUpdate:
    """A random update of a linear layer in float64, of scaling 1 unless alpha is given; `std` is that of B."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rank, inputs), (out, rank)))
    settings = {"r": rank, "lora_alpha": rank} | options
    return update(("lora_A.weight", a), ("lora_B.weight", b * std), **settings)
