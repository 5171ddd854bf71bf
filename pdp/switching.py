"""Adapters that come and go while a policy acts: another one is put on, or none, between two control steps. What does
not fit is refused, and whatever fails or interrupts on the way, the policy is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
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
    flags = policy.flags_without_adapter or _flags(policy.model)
    with _all_or_nothing(policy):
        base = _bare(policy.model)
        _refuse_other_base(checkpoint, base)
        averaged = "ema" in checkpoint.roles if use_ema is None else use_ema
        device = next(base.parameters()).device
        model = LoraTransformerForDiffusion.on_base(checkpoint, base, use_ema=averaged)
        model.to(device)
        model.train(policy.training)
        policy.model, policy.flags_without_adapter = model, flags


def take_adapter_off(policy: DiffusionPolicy) -> None:
    """See `DiffusionPolicy.unload_adapter`."""
    if not isinstance(policy.model, LoraTransformerForDiffusion):
        raise InvalidInput("the policy has no adapter; load_adapter puts one on")
    with _all_or_nothing(policy):
        policy.model = _bare(policy.model)
        flags, policy.flags_without_adapter = policy.flags_without_adapter, None
        for parameter, trains in flags or ():
            parameter.requires_grad_(trains)


def _flags(network: nn.Module) -> list[tuple[nn.Parameter, bool]] | None:
    """Which parameters train: PEFT freezes them, and the network may be one in training. Of one that came with an
    adapter that is not known."""
    if isinstance(network, LoraTransformerForDiffusion):
        return None
    return [(parameter, parameter.requires_grad) for parameter in network.parameters()]


@contextmanager
def _all_or_nothing(policy: DiffusionPolicy) -> Iterator[None]:
    """Puts network and policy back as they were if anything fails within, an interrupt included. Of parameters and
    buffers the memory is remembered, not a copy: nothing writes to the base."""
    network, flags = policy.model, policy.flags_without_adapter
    before = ModuleState(network)
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    except BaseException:
        before.restore()
        for module, mode in modes:
            module.training = mode
        policy.model, policy.flags_without_adapter = network, flags
        raise


def _bare(network: nn.Module) -> nn.Module:
    if not isinstance(network, LoraTransformerForDiffusion):
        return network
    base: nn.Module = network.lora_model.unload()
    return base


def _refuse_other_base(checkpoint: Checkpoint, base: nn.Module) -> None:
    """Holds an adapter of a registry against the live network by the registry's rules, its targets' weights included;
    and one that comes with the network that it was trained on against that. A file with an adapter alone does not say
    on which weights it was trained."""
    if isinstance(checkpoint, RegistryCheckpoint) and checkpoint.kind == "adapter":
        found = checkpoint.registry.check(checkpoint.reference, base)
        if not found:
            raise Incompatible(f"{checkpoint.what} does not fit the policy's network; it acts as before", found.errors)
        return
    live = base.state_dict()
    other = [name for name, tensor in checkpoint.base.items() if name in live and not _same(tensor, live[name])]
    if other:
        raise Incompatible(
            f"{checkpoint.what} holds a network of other weights than the policy's, such as {other[0]} ({len(other)} "
            "tensors in all); it acts as before"
        )


def _same(recorded: torch.Tensor, live: torch.Tensor) -> bool:
    return recorded.shape == live.shape and torch.equal(recorded.to(live), live)
