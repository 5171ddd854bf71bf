"""Policies out of checkpoints, ready to act, and noise schedulers out of configurations."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from pdp.checkpoints import Checkpoint, RegistryCheckpoint, read_checkpoint
from pdp.classes import call, look_up
from pdp.errors import CheckpointError, ConfigError
from pdp.loading import load_network
from pdp.lora_building import RegistryLike, Source
from pdp.lora_model import LoraTransformerForDiffusion

if TYPE_CHECKING:
    from pdp.policy import DiffusionPolicy

with warnings.catch_warnings():
    # diffusers looks for optional packages on import, and some of them warn.
    warnings.simplefilter("ignore")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

NOISE_SCHEDULERS: tuple[type, ...] = (DDPMScheduler, DDIMScheduler)
DEFAULT_NOISE = {"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
"""Of a configuration that says nothing of it."""


def make_noise_scheduler(section: Mapping[Any, Any]) -> Any:
    """Diffusers' scheduler of a configuration's `policy.noise_scheduler`; `_target_` is DDPMScheduler by default.

    Raises:
        ConfigError: another class, or an argument that it does not have (with the near one).
    """
    arguments = {str(key): value for key, value in section.items()}
    name = str(arguments.pop("_target_", "DDPMScheduler"))
    short = name.rpartition(".")[2] if name.startswith("diffusers.") else name
    kind = look_up(short, NOISE_SCHEDULERS, "policy.noise_scheduler._target_", ConfigError)
    return call(kind, arguments, "policy.noise_scheduler", ConfigError)


def recorded_noise(checkpoint: Checkpoint) -> tuple[dict[str, Any], int | None] | None:
    """The section of the noise scheduler, and the denoising steps, that a checkpoint's configuration has; None where it
    says nothing."""
    cfg = checkpoint.training.get("cfg")
    section = cfg.get("policy") if isinstance(cfg, Mapping) else None
    if not isinstance(section, Mapping) or not section.get("noise_scheduler"):
        return None
    return dict(section["noise_scheduler"]), section.get("num_inference_steps")


def load_policy(
    kind: type[DiffusionPolicy],
    checkpoint_path: Source,
    base_model_path: Source | None = None,
    *,
    use_ema: bool | None = None,
    registry: RegistryLike = None,
    classes: Iterable[type[nn.Module]] = (),
    num_inference_steps: int | None = None,
) -> DiffusionPolicy:
    """See `pdp.policy.DiffusionPolicy.from_checkpoint`."""
    checkpoint = read_checkpoint(checkpoint_path, registry)
    base = None if base_model_path is None else read_checkpoint(base_model_path, registry)
    context = _context(checkpoint, base)
    averaged = "ema" in checkpoint.roles if use_ema is None else use_ema
    network: nn.Module
    if checkpoint.adapter:
        network = LoraTransformerForDiffusion.from_checkpoint(
            checkpoint, base, classes=classes, use_ema=averaged, registry=registry
        )
    else:
        network = load_network(checkpoint, classes=classes, use_ema=averaged, registry=registry)
    scheduler, steps = _noise_scheduler(context)
    policy = kind(network, scheduler, num_inference_steps or steps)
    normalizer = next((one.normalizer for one in context if one.normalizer), None)
    if normalizer is None:
        raise CheckpointError(
            f"{checkpoint.what} holds no normaliser; give the checkpoint of its base as base_model_path"
        )
    policy.fit_normalizer_state(normalizer, checkpoint.what)()
    return policy.eval()


def _context(checkpoint: Any, base: Checkpoint | None) -> list[Checkpoint]:
    """Where to look for what an adapter alone does not hold, the nearest first."""
    found = [checkpoint]
    if base is not None:
        found.append(base)
    elif isinstance(checkpoint, RegistryCheckpoint) and checkpoint.base_reference is not None:
        found.append(read_checkpoint(f"registry://{checkpoint.base_reference}", checkpoint.registry))
    return found


def _noise_scheduler(context: Iterable[Checkpoint]) -> tuple[Any, int | None]:
    names = []
    for checkpoint in context:
        names.append(checkpoint.what)
        found = recorded_noise(checkpoint)
        if found is not None:
            return make_noise_scheduler(found[0]), found[1]
    raise CheckpointError(
        f"{' and '.join(names)} say nothing of the noise scheduler; make the policy yourself, with "
        "DiffusionPolicy(network, scheduler)"
    )
