"""What is needed to make a LoRA model of a checkpoint, and the refusals on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pdp.building import architecture_differences
from pdp.checkpoints import Checkpoint, RegistryCheckpoint, read_checkpoint
from pdp.errors import CheckpointError
from pdp.loading import refused_arguments
from pdp.lora_settings import LoraSettings
from registry import Registry
from registry.core.errors import Incompatible

RegistryLike = Registry | str | os.PathLike[str] | None
Source = str | os.PathLike[str] | Checkpoint
"""A path, or a checkpoint that was opened before."""


def refuse_another(checkpoint: Checkpoint, network: nn.Module) -> None:
    """
    Raises:
        Incompatible: the checkpoint says of its network what this one is not.
    """
    differing = refused_arguments(architecture_differences(checkpoint.architecture, network))
    if differing:
        raise Incompatible(f"{checkpoint.what} was trained on another network; nothing was changed", differing)


def settings_of(checkpoint: Checkpoint) -> LoraSettings:
    settings = checkpoint.settings
    if settings is None:
        raise CheckpointError(f"{checkpoint.what} holds no LoRA; load it with from_checkpoint of its network's class")
    return settings


def check_ranks(settings: LoraSettings, adapter: Mapping[str, Tensor], what: str) -> None:
    """
    Raises:
        CheckpointError: the settings ask for larger ranks than any of the tensors has.
    """
    found = [one.shape[0] for name, one in adapter.items() if name.endswith("lora_A.weight") and one.dim() == 2]
    said = max(settings.r, *settings.options.get("rank_pattern", {}).values(), 0)
    if said > max(found, default=0):
        raise CheckpointError(f"{what} says rank {said}, and the largest of its tensors is {max(found, default=0)}")


def lora_arguments(settings: LoraSettings) -> dict[str, Any]:
    options = {key: value for key, value in settings.options.items() if key != "init_lora_weights"}
    return {
        "lora_r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": settings.target_modules,
        "apply_to": settings.apply_to,
        **options,
    }


def base_of(checkpoint: Any, base_path: Source | None, registry: RegistryLike) -> tuple[Any, str | None]:
    """Where the base's weights come from, and the version that they are, if one."""
    if base_path is not None:
        source = read_checkpoint(base_path, registry)
        return source, source.reference if isinstance(source, RegistryCheckpoint) else None
    declared = checkpoint.base_reference if isinstance(checkpoint, RegistryCheckpoint) else None
    if checkpoint.base:
        return checkpoint, declared
    if declared is not None:
        return read_checkpoint(f"registry://{declared}", checkpoint.registry), declared
    raise CheckpointError(
        f"{checkpoint.what} holds an adapter alone; give the network that it was trained on as base_model_path"
    )
