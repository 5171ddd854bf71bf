"""The guide's utility functions: checkpoints of a LoRA in training, merging, comparing and describing. Each path is a
file (`.pth`, `.safetensors`) or a `registry://` URL."""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pdp.checkpoints import MODEL_CONFIG, RegistryCheckpoint, model_config, opened, read_checkpoint
from pdp.files import (
    SAFETENSORS,
    check_path,
    check_push_options,
    is_registry_url,
    on_cpu,
    refuse_push_options,
    write_flat,
    write_tree,
)
from pdp.loading import fit_average, say
from pdp.lora_building import RegistryLike
from pdp.lora_model import LoraTransformerForDiffusion
from pdp.lora_settings import read_settings
from pdp.training_state import fit_optimizer, fit_scheduler
from registry.core.errors import InvalidInput
from registry.core.layout import layout_of
from registry.core.reference import shown
from registry.formats.live import adapter_tensors, find_adapted, live_config, tensor_spec
from registry.formats.tuner_layers import refuse_merged, tuner_layers
from registry.merge.lora_modules import lora_modules
from registry.merge.model_weights import WeightUpdate, merged_bias, merged_weight

PathLike = str | os.PathLike[str]


def save_lora_checkpoint(
    model: nn.Module,
    path: PathLike,
    optimizer: Any = None,
    scheduler: Any = None,
    epoch: int | None = None,
    global_step: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    ema_model: Any = None,
    cfg: Any = None,
    registry: RegistryLike = None,
    **push: Any,
) -> str:
    """Saves a LoRA model in training: network, adapter, optimizer, scheduler, and how far it was.

    Args:
        model: a LoraTransformerForDiffusion, or a policy around one.
        path: a file, written whole or not at all, or `registry://namespace/name[:tag]`, where a checkpoint is pushed.
        ema_model: an EMAModel, or the averaged model itself.
        cfg: its configuration, plain or of OmegaConf.
        metadata: plain values.
        registry, push: as for `LoraTransformerForDiffusion.save_lora_adapters`.

    Returns:
        The path, or the pushed version as `registry://namespace/name@number`.

    Raises:
        InvalidInput: no LoRA model, or a value that is no plain data.
        NoSpace, ReadOnly, StorageError: nothing has changed.
    """
    lora = lora_of(model)
    refuse_merged(lora)
    states: dict[str, Any] = {"model": lora.lora_model.state_dict()}
    averaged = getattr(ema_model, "averaged_model", ema_model)
    if averaged is not None:
        states["ema_model"] = lora_of(averaged).lora_model.state_dict()
    for key, one in (("optimizer", optimizer), ("scheduler", scheduler)):
        if one is not None:
            states[key] = one.state_dict()
    pickles: dict[str, Any] = {"lora_config": lora.settings.to_payload()}
    config = model_config(lora.base_model)
    if config is not None:
        pickles[MODEL_CONFIG] = config
    tree = {"cfg": plain_config(cfg), "state_dicts": states, "pickles": pickles}
    said = {"epoch": epoch, "global_step": global_step, "metadata": metadata}
    tree |= {key: value for key, value in said.items() if value is not None}
    if not is_registry_url(path):
        refuse_push_options(push)
        write_tree(check_path(path), on_cpu(tree))
        return str(path)
    return push_tree(on_cpu(tree), path, registry, {"base": lora.base_reference, "step": global_step, **push})


def push_tree(tree: Mapping[str, Any], url: PathLike, registry: RegistryLike, push: Mapping[str, Any]) -> str:
    """Pushes a checkpoint: its file is written to a temporary folder, and pushed from there.

    Args:
        tree: as `on_cpu` gives it.

    Returns:
        The version, as `registry://namespace/name@number`.
    """
    given = dict(push)
    if not given.get("metrics"):
        given.pop("step", None)
    check_push_options(given)
    with tempfile.TemporaryDirectory(prefix="pdp-push-") as folder:
        file = Path(folder) / "checkpoint.ckpt"
        write_tree(file, tree)
        with opened(registry) as where:
            pushed = where.push(file, os.fspath(url), **given)
    return f"registry://{pushed.reference}"


def load_lora_checkpoint(
    path: PathLike,
    model: nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
    load_optimizer: bool = True,
    strict: bool | None = None,
    *,
    ema_model: Any = None,
    registry: RegistryLike = None,
) -> dict[str, Any]:
    """Loads network, adapter and, where given, optimizer, scheduler and moving average.

    What does not fit is refused before the first of them is changed.

    Args:
        model: a LoraTransformerForDiffusion, or a policy around one.
        load_optimizer: False leaves optimizer and scheduler as they are.
        strict: refuse every difference of the model. None: True for a registry, False for a file.

    Returns:
        The checkpoint's whole content: `state_dicts`, `epoch`, `global_step`, `metadata`, ...

    Raises:
        Incompatible: it does not fit; what does not fit is unchanged.
        InvalidInput: a torn file, or one that would run code; NotFound.
    """
    lora = lora_of(model)
    checkpoint = read_checkpoint(path, registry)
    strictly = isinstance(checkpoint, RegistryCheckpoint) if strict is None else strict
    wanted = {"optimizer": optimizer, "scheduler": scheduler} if load_optimizer else {}
    steps = [lora.fit_checkpoint(checkpoint, strict=strictly, only_adapter="model" not in checkpoint.roles)]
    averaged = getattr(ema_model, "averaged_model", ema_model)
    if averaged is not None:
        steps.append(fit_average(averaged, checkpoint, strict=strictly))
    for role, one in wanted.items():
        if one is not None and role not in checkpoint.roles:
            say(f"{checkpoint.what} holds no {role}; it stays as it is")
        elif one is not None and role == "optimizer":
            steps.append(fit_optimizer(one, checkpoint.state(role), checkpoint.what))
        elif one is not None:
            steps.append(fit_scheduler(one, checkpoint.state(role), checkpoint.what))
    for step in steps:
        step()
    return checkpoint.payload


def create_lora_model_from_checkpoint(
    checkpoint_path: PathLike,
    base_model_path: PathLike | None = None,
    *,
    base_model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    **kwargs: Any,
) -> LoraTransformerForDiffusion:
    """Makes a LoRA model of a checkpoint; see `LoraTransformerForDiffusion.from_checkpoint`.

    Args:
        base_model: a live network instead of `base_model_path`; the LoRA is put on it.
        device: where the model ends up; it is loaded on the CPU first.
    """
    if base_model is None:
        return LoraTransformerForDiffusion.from_checkpoint(checkpoint_path, base_model_path, **kwargs).to(device)
    if base_model_path is not None:
        raise InvalidInput("base_model and base_model_path were both given; give one of them")
    return LoraTransformerForDiffusion.on_base(checkpoint_path, base_model, **kwargs).to(device)


def merge_lora_weights(
    model: nn.Module | None = None, alpha: float = 1.0, *, lora_model: nn.Module | None = None
) -> nn.Module:
    """The network with the LoRA in its weights: `W + alpha * delta`, computed in float64 and rounded once.

    Args:
        model: a LoraTransformerForDiffusion; it is not changed. `lora_model` is another name for it.
        alpha: 1 gives the LoRA model's function, 0 that of the network without its LoRA (of PiSSA and OLoRA: of what
            PEFT left in the network when it began); between and beyond, weights are linear in it.

    Returns:
        A plain network of the base's class, whose parameters train.

    Raises:
        InvalidInput: no LoRA model, one that is merged already, an alpha that is no finite number, NaN or Inf in a
            weight, a result that the dtype cannot hold, or lora_bias on a layer without bias.
    """
    given = lora_model if model is None else model
    lora = lora_of(given)
    refuse_merged(lora)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InvalidInput(f"alpha is {shown(repr(alpha))}; expected a finite number, 1 for the whole LoRA")
    changed = _with_lora(lora, float(alpha)) if alpha else {}
    merged: nn.Module = copy.deepcopy(lora.lora_model).unload()
    for name, tensor in changed.items():
        path, _, leaf = name.rpartition(".")
        setattr(merged.get_submodule(path), leaf, nn.Parameter(tensor))
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    merged.train(lora.training)
    return merged


def _with_lora(lora: LoraTransformerForDiffusion, alpha: float) -> dict[str, Tensor]:
    """The weights and biases that the active adapters change, by name, with `alpha` times their updates."""
    names = lora.lora_model.active_adapters
    modules = {name: _updates(lora.lora_model, name, alpha) for name in names}
    changed = {}
    layer: Any
    for layer, path in tuner_layers(lora.base_model).items():
        # Scaled as the live layer is, which PEFT can change without its configuration.
        updates = [
            replace(one, module=replace(one.module, scaling=float(layer.scaling[name])))
            for name, one in ((name, modules[name][path]) for name in names if name in layer.scaling)
        ]
        base = layer.get_base_layer()
        if updates:
            options: Any = {"turned": False, "own_base": True, "dtype": torch.float64}
            changed[f"{path}.weight"] = merged_weight(base.weight, updates, **options).tensor
        if any(layer.lora_bias.get(name) for name in names):
            changed[f"{path}.bias"] = merged_bias(base.bias, updates, dtype=torch.float64).tensor
    return changed


def _updates(model: PeftModel, name: str, alpha: float) -> dict[str, WeightUpdate]:
    tensors, config = adapter_tensors(model, name), live_config(model, name)
    layout = layout_of(tensor_spec(key, tensor) for key, tensor in tensors.items())
    return {path: WeightUpdate(one, tensors, alpha, config) for path, one in lora_modules(layout, config).items()}


def save_merged_model(
    model: nn.Module | None = None,
    path: PathLike | None = None,
    *,
    merged_model: nn.Module | None = None,
    registry: RegistryLike = None,
    **push: Any,
) -> str:
    """Saves a merged network, which needs neither PEFT nor a LoRA to run.

    Args:
        model: what `merge_lora_weights` gave; `merged_model` is another name for it.
        path: a file, or a `registry://` URL, where a base is pushed.

    Returns:
        The path, or the pushed version as `registry://namespace/name@number`.

    Raises:
        InvalidInput: the model still carries a LoRA.
    """
    given = merged_model if model is None else model
    if not isinstance(given, nn.Module) or path is None:
        raise InvalidInput(f"cannot save a {type(given).__name__} to {path!r}; give a merged model and a path")
    if find_adapted(given) is not None:
        raise InvalidInput("the model still carries a LoRA; merge it first with merge_lora_weights")
    if is_registry_url(path):
        metadata = {"model_type": MERGED, **(push.pop("metadata", None) or {})}
        check_push_options(push)
        with opened(registry) as where:
            pushed = where.push(given, os.fspath(path), metadata=metadata, **push)
        return f"registry://{pushed.reference}"
    refuse_push_options(push)
    file = check_path(path)
    config = model_config(given)
    made_of = {} if config is None else {MODEL_CONFIG: config}
    tensors = on_cpu(given.state_dict())
    if file.suffix == SAFETENSORS:
        write_flat(file, tensors, {"model_type": MERGED, **made_of})
    else:
        write_tree(file, on_cpu({"model_state_dict": tensors, "model_type": MERGED, **made_of}))
    return str(path)


MERGED = "merged_lora"


def compare_lora_configs(config1: Any, config2: Any, model: nn.Module | None = None) -> bool:
    """Whether two LoRA configurations are the same: numbers by value, targets by the modules that they resolve to.

    Args:
        config1, config2: mappings with lora_r, lora_alpha, ... as in a checkpoint, or PEFT's LoraConfig.
        model: the network to resolve targets on. Without it, a QKVTransformerForDiffusion with as many blocks as the
            targets name.

    Raises:
        ConfigError, InvalidInput: one of them is none.
    """
    return not lora_config_differences(config1, config2, model)


def lora_config_differences(config1: Any, config2: Any, model: nn.Module | None = None) -> list[str]:
    """What differs between two LoRA configurations, one text each; see `compare_lora_configs`."""
    first, second = (
        read_settings(config1, "the first configuration"),
        read_settings(config2, "the second configuration"),
    )
    if isinstance(model, LoraTransformerForDiffusion):
        model = model.base_model
    return first.differences(second, model)


def get_lora_model_info(model: nn.Module) -> dict[str, Any]:
    """What a LoRA model is: settings, targeted modules, numbers of parameters, device and dtype."""
    lora = lora_of(model)
    parameters = list(lora.parameters())
    total = sum(one.numel() for one in parameters)
    trainable = sum(one.numel() for one in parameters if one.requires_grad)
    adapter = sum(one.numel() for name, one in lora.named_parameters() if ".lora_" in name)
    return {
        "base_model": type(lora.base_model).__name__,
        "lora_config": lora.settings.to_payload(),
        "targeted_modules": lora.get_targeted_modules(),
        "total_parameters": total,
        "trainable_parameters": trainable,
        "lora_parameters": adapter,
        "trainable_fraction": trainable / total,
        "device": str(parameters[0].device),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
    }


def print_lora_model_summary(model: nn.Module) -> None:
    """Prints what `get_lora_model_info` gives."""
    info = get_lora_model_info(model)
    settings = info["lora_config"]
    print(f"LoRA on a {info['base_model']} ({info['dtype']}, {info['device']})")
    print(f"  rank {settings['lora_r']}, alpha {settings['lora_alpha']:g}, dropout {settings['lora_dropout']:g}")
    layers = ", ".join(sorted({path.rpartition(".")[2] for path in info["targeted_modules"]}))
    print(f"  {len(info['targeted_modules'])} modules ({layers}), apply_to {settings['apply_to']}")
    print(f"  {info['lora_parameters']:,} LoRA parameters, {info['total_parameters']:,} in all")
    print(f"  {info['trainable_parameters']:,} train ({info['trainable_fraction']:.2%})")


def lora_of(model: object) -> LoraTransformerForDiffusion:
    """The LoRA model itself, or the one that a policy holds.

    Raises:
        InvalidInput: there is none.
    """
    if isinstance(model, LoraTransformerForDiffusion):
        return model
    inner = getattr(model, "model", None)
    if isinstance(inner, LoraTransformerForDiffusion):
        return inner
    raise InvalidInput(f"a {type(model).__name__} is no LoRA model; wrap the network in LoraTransformerForDiffusion")


def plain_config(cfg: Any) -> Any:
    """A configuration as plain data, interpolations resolved."""
    if sys.modules.get("omegaconf") is None:
        return cfg  # then it is none of OmegaConf's
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


__all__ = [
    "compare_lora_configs",
    "create_lora_model_from_checkpoint",
    "get_lora_model_info",
    "load_lora_checkpoint",
    "lora_config_differences",
    "merge_lora_weights",
    "print_lora_model_summary",
    "save_lora_checkpoint",
    "save_merged_model",
]
