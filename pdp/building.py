"""Networks from what a checkpoint says: the class from a table, arguments as recorded, and where nothing was
recorded, as much as names and shapes tell. A name in data is looked up in the table and never imported."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from pdp.checkpoints import Checkpoint
from pdp.classes import call, look_up
from pdp.errors import CheckpointError, CheckpointWarning, user_level
from pdp.modules_v2 import QKVTransformerForDiffusion
from registry.core.architecture import Architecture
from registry.core.errors import InvalidInput
from registry.core.reference import shown

DEFAULT_CLASS = QKVTransformerForDiffusion
NOT_IN_SHAPES = ("n_head", "causal_cross_attn")
"""Arguments that change what is computed and that no name or shape shows."""
FOR_TRAINING = frozenset(("p_drop_emb", "p_drop_attn", "obs_type", "past_action_visible"))
"""Arguments that change nothing of what a network in eval mode computes."""


def build_network(checkpoint: Checkpoint, classes: Iterable[type[nn.Module]] = ()) -> nn.Module:
    """A network of a checkpoint's form, with new weights.

    Raises:
        CheckpointError: arguments that its class does not take, or tensors from which they cannot be told.
    """
    classes = tuple(classes)
    recorded = checkpoint.architecture
    if recorded is None:
        recorded = Architecture("", read_off_shapes(checkpoint.base, checkpoint.what))
    return make_network(recorded, classes, checkpoint.what, CheckpointError)


def make_network(
    recorded: Architecture, classes: Iterable[type[nn.Module]], what: str, error: type[InvalidInput]
) -> nn.Module:
    """Calls the class of that name: pdp's own, or one that the caller passes; the first of all where there is no name.

    Raises:
        error: the class is not in the table, or does not take the arguments.
        InvalidInput: what the class itself refuses.
    """
    table = [*classes, DEFAULT_CLASS]
    kind = look_up(recorded.class_name, table, what, error) if recorded.class_name else table[0]
    network: nn.Module = call(kind, recorded.arguments, what, error)
    return network


def read_off_shapes(base: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """Constructor arguments of a QKVTransformerForDiffusion from the names and shapes of its tensors. What these do not
    show takes the default, and a warning names it.

    Raises:
        CheckpointError: the tensors are of another network.
    """
    sizes: dict[str, int] = {}
    for name, dimensions in _SHOWN.items():
        tensor = base.get(name)
        if tensor is None or tensor.dim() <= max(dimensions):
            fused = next((one for one in base if one.endswith("in_proj_weight")), None)
            why = f"found {shown(fused)}, which fuses queries, keys and values" if fused else f"found no {name}"
            raise CheckpointError(
                f"{what} is no {DEFAULT_CLASS.__name__} ({why}) and says no constructor arguments; make a model of its "
                "own class, and load into that"
            )
        for dimension, argument in dimensions.items():
            sizes[argument] = tensor.shape[dimension]
    arguments: dict[str, Any] = {**sizes, "T_obs": sizes.pop("T_cond") - 1, "obs_type": "ref"}
    arguments.pop("T_cond", None)
    for stack in ("encoder", "decoder"):
        numbers = [int(name.split(".")[2]) for name in base if name.startswith(f"{stack}.blocks.")]
        arguments[f"n_{stack}_layers"] = 1 + max(numbers, default=-1)
    arguments["causal_attn"] = "mask" in base
    defaults = inspect.signature(DEFAULT_CLASS).parameters
    assumed = ", ".join(f"{name}={defaults[name].default}" for name in NOT_IN_SHAPES)
    warnings.warn(
        f"{what} does not say how its network was made; taken as the default, as no shape shows it: {assumed}. If that "
        "is not so, outputs are wrong: build the network yourself, and load into that",
        CheckpointWarning,
        stacklevel=user_level(),
    )
    return arguments


_SHOWN = {
    "cond_obs_emb.weight": {0: "emb_dim", 1: "obs_dim"},
    "input_emb.weight": {1: "input_dim"},
    "head.weight": {0: "output_dim"},
    "cond_pos_emb": {1: "T_cond"},
    "pos_emb": {1: "T_action"},
}


def architecture_differences(recorded: Architecture | None, model: nn.Module) -> list[str]:
    """Recorded constructor arguments that a live network has otherwise, and that change what it computes."""
    live = getattr(model, "constructor_arguments", None)
    if recorded is None or not isinstance(live, Mapping):
        return []
    return [
        f"{name}: the checkpoint's network has {value!r}, this model {live[name]!r}"
        for name, value in recorded.arguments.items()
        if name in live and name not in FOR_TRAINING and live[name] != value
    ]
