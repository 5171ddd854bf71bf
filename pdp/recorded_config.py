"""The configuration of a run that is made from a checkpoint: the one that was recorded, with what the weights
themselves say where it has gaps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from pdp.building import read_off_shapes
from pdp.checkpoints import Checkpoint
from pdp.configuration import read_config
from pdp.errors import CheckpointError
from pdp.loading import say
from registry.core.architecture import Architecture


def config_of(checkpoint: Checkpoint, overrides: Mapping[str, Any]) -> Any:
    """The configuration for a checkpoint: the recorded one, with what only the checkpoint itself says."""
    recorded = checkpoint.training.get("cfg")
    cfg: Any = OmegaConf.create(dict(recorded) if isinstance(recorded, Mapping) else {})
    if not isinstance(recorded, Mapping):
        say(f"{checkpoint.what} has no configuration; training goes by the defaults")
    elif not OmegaConf.select(cfg, "policy.noise_scheduler"):
        say(f"the configuration of {checkpoint.what} has no policy.noise_scheduler; it is taken as the default")
    if not OmegaConf.select(cfg, "policy.model"):
        architecture = checkpoint.architecture
        if architecture is None:
            architecture = Architecture("", read_off_shapes(checkpoint.base, checkpoint.what))
        target = {"_target_": architecture.class_name} if architecture.class_name else {}
        OmegaConf.update(cfg, "policy.model", {**target, **architecture.arguments})
    settings = checkpoint.settings
    if settings is not None:
        OmegaConf.update(cfg, "policy.lora", settings.to_payload(), merge=False)
    elif OmegaConf.select(cfg, "policy.lora") is not None:
        raise CheckpointError(f"the configuration of {checkpoint.what} has a LoRA, its weights have none")
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value)
    unknown: list[str] = []
    read_config(OmegaConf.to_container(cfg), unknown=unknown)
    if unknown:
        say(
            f"keys in the configuration of {checkpoint.what} that are not known here are left out: {', '.join(unknown)}"
        )
        for key in unknown:
            parent, _, last = key.rpartition(".")
            node = OmegaConf.select(cfg, parent) if parent else cfg
            del node[last]
    return cfg
