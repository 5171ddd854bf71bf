"""One spelling for the tensors of a network, however it was wrapped when they were saved: as a policy (`model.`), by
`LoraTransformerForDiffusion` (`lora_model.`), by PEFT (`base_model.model.`, `.base_layer.`, `.default.`), twice, or
not at all. A model's own names and a checkpoint's are brought to it, and meet there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from pdp.errors import CheckpointError
from registry.core.reference import shown
from registry.core.tensor_names import base_name, canonical_name, is_adapter_tensor, split_at_tuner

T = TypeVar("T")
NORMALIZER = "normalizer."
_WRAPPERS = ("model.", "lora_model.", "_orig_mod.")


def network_name(name: str) -> str:
    """The name in the bare network: `model.lora_model.base_model.model.head.weight` gives `head.weight`, the weight
    of a LoRA layer's base is the layer's, and parts of adapters lose the adapter's name."""
    while True:
        wrapper = next((one for one in _WRAPPERS if name.startswith(one)), None)
        if wrapper is None:
            break
        name = name.removeprefix(wrapper)
    own = canonical_name(name) if is_adapter_tensor(name) else base_name(name)
    # One form of the older framework has `base_model.` alone before each name.
    return own.removeprefix("base_model.")


def by_network_name(tensors: Mapping[str, T], what: str) -> dict[str, T]:
    """The tensors of a network under the names of the bare network; those of a policy's normaliser are left out.

    Raises:
        CheckpointError: two different tensors have one name.
    """
    found: dict[str, T] = {}
    first: dict[str, str] = {}
    of_policy = is_policy(tensors)
    for name, tensor in tensors.items():
        if of_policy and name.startswith(NORMALIZER):
            continue
        own = network_name(name)
        if own in found and not _is_same(found[own], tensor):
            raise CheckpointError(
                f"{what} holds two tensors for {shown(own)}: {shown(first[own])} and {shown(name)}; keep one of them"
            )
        found.setdefault(own, tensor)
        first.setdefault(own, name)
    return found


def is_policy(tensors: Mapping[str, object]) -> bool:
    """Whether a state dict is a policy's, whose network stands under `model.`."""
    return any(name.startswith("model.") for name in tensors)


def normalizer_of(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a policy's normaliser, under its own names; empty where there are none."""
    if not is_policy(tensors):
        return {}
    return {name.removeprefix(NORMALIZER): one for name, one in tensors.items() if name.startswith(NORMALIZER)}


def adapter_part(named: Mapping[str, T]) -> dict[str, T]:
    """Of tensors under network names, those of the adapter."""
    return {name: tensor for name, tensor in named.items() if is_adapter_tensor(name)}


def base_part(named: Mapping[str, T]) -> dict[str, T]:
    """Of tensors under network names, those of the network without adapter."""
    return {name: tensor for name, tensor in named.items() if not is_adapter_tensor(name)}


def modules_of(names: Iterable[str]) -> list[str]:
    """Paths of the modules that adapter tensors with these network names belong to, in their order."""
    parts = (split_at_tuner(name) for name in names)
    return list(dict.fromkeys(part[0] for part in parts if part is not None))


def _is_same(a: object, b: object) -> bool:
    if a is b:
        return True
    return (
        isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    )
