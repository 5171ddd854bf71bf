"""Adapters that come and go while a policy acts: another one is put on, or none, between two control steps. What does
not fit is refused before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pdp.checkpoints import Checkpoint, RegistryCheckpoint, read_checkpoint
from pdp.lora_building import RegistryLike, Source
from pdp.lora_model import LoraTransformerForDiffusion
from registry.core.errors import Incompatible, InvalidInput
from registry.formats.module_state import ModuleState

if TYPE_CHECKING:
    from pdp.policy import DiffusionPolicy


def put_adapter(policy: DiffusionPolicy, path: Source, *, use_ema: bool | None, registry: RegistryLike) -> None:
    """See `DiffusionPolicy.load_adapter`."""
    checkpoint = read_checkpoint(path, registry)
    network = policy.model
    # Of parameters and buffers the memory is remembered, not a copy: nothing below writes to the base.
    before = ModuleState(network)
    modes = [(module, module.training) for module in network.modules()]
    try:
        base = _bare(network)
        _refuse_other_base(checkpoint, base)
        averaged = "ema" in checkpoint.roles if use_ema is None else use_ema
        model = LoraTransformerForDiffusion.on_base(checkpoint, base, use_ema=averaged)
        parameter = next(network.parameters())
        model.to(parameter.device)
    except BaseException:
        before.restore()
        for module, mode in modes:
            module.training = mode
        raise
    model.train(policy.training)
    policy.model = model


def take_adapter_off(policy: DiffusionPolicy) -> None:
    """See `DiffusionPolicy.unload_adapter`."""
    if not isinstance(policy.model, LoraTransformerForDiffusion):
        raise InvalidInput("the policy has no adapter; load_adapter puts one on")
    policy.model = _bare(policy.model)


def _bare(network: nn.Module) -> nn.Module:
    if not isinstance(network, LoraTransformerForDiffusion):
        return network
    base: nn.Module = network.lora_model.unload()
    return base


def _refuse_other_base(checkpoint: Checkpoint, base: nn.Module) -> None:
    """Holds an adapter of a registry against the live network by the registry's rules, its targets' weights
    included."""
    if not isinstance(checkpoint, RegistryCheckpoint) or checkpoint.kind != "adapter":
        return
    found = checkpoint.registry.check(checkpoint.reference, base)
    if not found:
        raise Incompatible(f"{checkpoint.what} does not fit the policy's network; it acts as before", found.errors)
