"""The policy of a run, made as its configuration says: a new network, or one with a LoRA on a base that is there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf, read_write
from torch import nn

from pdp.building import architecture_differences, make_network, read_off_shapes
from pdp.checkpoints import Checkpoint, RegistryCheckpoint, read_checkpoint
from pdp.errors import ConfigError
from pdp.loading import fit, refused_arguments, say
from pdp.lora_model import LoraTransformerForDiffusion
from pdp.policy import DiffusionPolicy
from pdp.policy_loading import DEFAULT_NOISE, make_noise_scheduler, recorded_noise
from pdp.state_names import base_part
from registry import Registry
from registry.core.architecture import Architecture
from registry.core.errors import Incompatible


def make_policy(
    cfg: Any, classes: Iterable[type[nn.Module]], registry: Registry | str | os.PathLike[str] | None
) -> tuple[DiffusionPolicy, str | None]:
    """The policy of a configuration, which afterwards says all that was taken from a base and from defaults, so that it
    stands for itself in a checkpoint.

    Args:
        cfg: of `read_config`.
        registry: where the base of a LoRA is looked up.

    Returns:
        The policy on the CPU, and the version that its base is, if one.

    Raises:
        ConfigError: a class or an argument that is not there, or a LoRA without anything to put it on.
        Incompatible: the base is of another network than the configuration says.
        InvalidInput, NotFound: the base cannot be read.
    """
    section = cfg.policy
    begin = section.init_from if section.lora is None else section.lora.base_model_path
    base = None if begin is None else _base_of(begin, registry, lora=section.lora is not None)
    recorded = _recorded(section, base)
    network = make_network(recorded, tuple(classes), "policy.model", ConfigError)
    reference: str | None = cfg.registry.base
    if base is not None:
        differing = refused_arguments(architecture_differences(base.architecture, network))
        if differing:
            raise Incompatible(f"{base.what} is of another network than policy.model", differing)
        averaged = section.lora is None and "ema" in base.roles
        fit(network, base_part(base.averaged) if averaged else base.base, strict=True, what=base.what)()
        if reference is None and isinstance(base, RegistryCheckpoint):
            reference = base.reference
    if section.lora is not None:
        lora: Any = OmegaConf.to_container(section.lora)
        lora.pop("base_model_path")
        network = LoraTransformerForDiffusion(network, **{**lora.pop("lora_options"), **lora})
        network.base_reference = reference
    noise, steps = _noise(section, base)
    policy = DiffusionPolicy(network, make_noise_scheduler(noise), steps)
    if base is not None and base.normalizer:
        policy.fit_normalizer_state(base.normalizer, base.what)()
    target = {"_target_": recorded.class_name} if recorded.class_name else {}
    with read_write(cfg):
        section.model = {**target, **recorded.arguments}
        section.noise_scheduler, section.num_inference_steps = noise, steps
    return policy, reference


def _base_of(path: str, registry: Registry | str | os.PathLike[str] | None, *, lora: bool) -> Checkpoint:
    base = read_checkpoint(path, registry)
    if base.adapter:
        key = "policy.lora.base_model_path" if lora else "policy.init_from"
        raise ConfigError(f"{key}: {base.what} holds a LoRA; merge it first (merge_lora_weights), or load it")
    if lora and "ema" in base.roles:
        say(
            f"{base.what} has a moving average, and the LoRA is put on the weights themselves; save_policy gives a "
            "base of the average"
        )
    return base


def _recorded(section: Any, base: Checkpoint | None) -> Architecture:
    """Class and arguments of the network: as configured, else as the base was made."""
    given: Any = {} if section.model is None else OmegaConf.to_container(section.model)
    arguments = {str(key): value for key, value in given.items()}
    if arguments:
        if arguments.get("output_dim") is None and "input_dim" in arguments:
            arguments["output_dim"] = arguments["input_dim"]
        return Architecture(str(arguments.pop("_target_", "")), arguments)
    if base is not None:
        return base.architecture or Architecture("", read_off_shapes(base.base, base.what))
    if section.lora is not None:
        raise ConfigError("policy.lora.base_model_path not set; give the network that the LoRA is for, or policy.model")
    if section.model is None:
        raise ConfigError("policy.model is not set; give the network, or in policy.init_from a policy that is there")
    return Architecture("", {})


def _noise(section: Any, base: Checkpoint | None) -> tuple[dict[str, Any], int | None]:
    """The section of the noise scheduler, and the denoising steps: as configured, else as the base was trained."""
    noise: Any = None if section.noise_scheduler is None else OmegaConf.to_container(section.noise_scheduler)
    steps = section.num_inference_steps
    recorded = None if base is None else recorded_noise(base)
    if recorded is not None and not noise:
        return recorded[0], steps or recorded[1]
    if recorded is not None and base is not None:
        here, there = (one.get("prediction_type", "epsilon") for one in (noise, recorded[0]))
        if here != there:
            raise ConfigError(
                f"policy.noise_scheduler.prediction_type is {here!r}, and {base.what} was trained to predict "
                f"{there!r}; set policy.noise_scheduler=null, which takes the base's"
            )
    return noise or dict(DEFAULT_NOISE), steps
