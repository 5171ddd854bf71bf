"""PEFT's layers in a live model, and the states of them in which a model is not what it seems."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from registry.core.errors import InvalidInput
from registry.core.reference import shown

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn


def tuner_layers(module: nn.Module) -> dict[BaseTunerLayer, str]:
    """PEFT's layers in a module, with their paths."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {child: path for path, child in module.named_modules() if isinstance(child, BaseTunerLayer)}


def refuse_merged(module: nn.Module) -> None:
    """
    Raises:
        InvalidInput: an adapter is merged into the weights, so neither it nor the base is there alone.
    """
    for layer, path in tuner_layers(module).items():
        if layer.merged:
            raise InvalidInput(
                f"the adapter is merged into its base (at {path}): call unmerge_adapter() first, "
                "or push merge_and_unload()'s result as a model of its own"
            )


def refuse_inactive(module: nn.Module, adapter: str) -> None:
    """
    Raises:
        InvalidInput: the module would compute something else than this adapter alone.
    """
    layers = tuner_layers(module)
    off = next((path for layer, path in layers.items() if layer.disable_adapters or layer.merged), None)
    if off is not None:
        raise InvalidInput(f"adapter layers are disabled or merged (at {shown(off)})")
    active = {name for layer in layers for name in layer.active_adapters}
    if active - {adapter}:
        raise InvalidInput(
            f"the active adapters are {shown(', '.join(sorted(active)))}, not {shown(adapter)} alone; use set_adapter()"
        )


def refuse_disabled(module: nn.Module, what: str) -> None:
    """
    Raises:
        InvalidInput: adapter layers are switched off, so a loaded adapter would change nothing.
    """
    for layer, path in tuner_layers(module).items():
        if layer.disable_adapters:
            raise InvalidInput(
                f"the model's adapter layers are disabled (at {path}), so {what} would have no effect: "
                "call enable_adapter_layers() first"
            )
