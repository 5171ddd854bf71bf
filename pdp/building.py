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


def build_network(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], classes: Iterable[type[nn.Module]] = ()
) -> nn.Module:
    """A network of a checkpoint's form, with new values, in the dtype of the weights that it is for.

    Args:
        weights: of the network, under its own names. What was recorded has to agree with them before anything is built.

    Raises:
        CheckpointError: arguments that its class does not take or the weights contradict, or weights from which they
            cannot be told.
    """
    recorded = checkpoint.architecture
    if recorded is None:
        recorded = Architecture("", read_off_shapes(weights, checkpoint.what))
    else:
        check_recorded(recorded, weights, checkpoint.what)
    network = make_network(recorded, tuple(classes), checkpoint.what, CheckpointError)
    dtypes = {one.dtype for one in weights.values() if one.is_floating_point()}
    return network.to(dtypes.pop()) if len(dtypes) == 1 else network


def check_recorded(recorded: Architecture, weights: Mapping[str, Tensor], what: str) -> None:
    """Holds recorded arguments against the weights: who asks for more than these are is not built.

    Raises:
        CheckpointError: they contradict each other.
    """
    most = sum(one.numel() for one in weights.values())
    for name, value in recorded.arguments.items():
        if isinstance(value, int) and abs(value) > most:
            raise CheckpointError(f"{what} says {name}={value}, and its network has {most} numbers in all")
    if recorded.class_name.rpartition(".")[2] not in ("", DEFAULT_CLASS.__qualname__):
        return
    for name, size in _shown_sizes(weights, what).items():
        said = recorded.arguments.get(name, size)
        if said != size:
            raise CheckpointError(
                f"{what} says {name}={said!r}, and its tensors have {size!r}; it was put together wrongly"
            )


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
    arguments = {**_shown_sizes(base, what), "obs_type": "ref"}
    defaults = inspect.signature(DEFAULT_CLASS).parameters
    assumed = ", ".join(f"{name}={defaults[name].default}" for name in NOT_IN_SHAPES)
    warnings.warn(
        f"{what} does not say how its network was made; taken as the default, as no shape shows it: {assumed}. If that "
        "is not so, outputs are wrong: build the network yourself, and load into that",
        CheckpointWarning,
        stacklevel=user_level(),
    )
    return arguments


def _shown_sizes(base: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """The arguments that names and shapes show."""
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
    arguments: dict[str, Any] = {"T_obs": sizes.pop("T_cond") - 1, **sizes}
    for stack in ("encoder", "decoder"):
        blocks = {name.split(".")[2] for name in base if name.startswith(f"{stack}.blocks.")}
        if blocks != {str(number) for number in range(len(blocks))}:
            raise CheckpointError(
                f"{what}: the blocks of its {stack} are {shown(', '.join(sorted(blocks)))}; some are missing"
            )
        arguments[f"n_{stack}_layers"] = len(blocks)
    arguments["causal_attn"] = "mask" in base
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
