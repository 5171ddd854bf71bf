"""The state of a run as a checkpoint holds it, taken from a workspace and given back to one: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from torch import nn

from pdp.building import architecture_differences
from pdp.checkpoints import MODEL_CONFIG, Checkpoint, FileCheckpoint, model_config
from pdp.loading import fit, fit_average, refused_arguments, say
from pdp.lora_model import LoraTransformerForDiffusion, network_state
from pdp.training_state import check_count, fit_optimizer
from registry.core.errors import Incompatible, InvalidInput
from registry.core.reference import shown

if TYPE_CHECKING:
    from pdp.workspace import DiffusionPolicyWorkspace

STATE_DICTS = ("model", "ema_model", "normalizer", "optimizer", "scheduler", "rng")
"""What a checkpoint holds as state dicts; the names for `exclude_keys`."""


def check_excluded(keys: Iterable[str]) -> set[str]:
    """The keys as a set.

    Raises:
        InvalidInput: one that is no state dict, with the near name.
    """
    found = set(keys)
    for key in found:
        if key not in STATE_DICTS:
            near = get_close_matches(str(key), STATE_DICTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(STATE_DICTS)}"
            raise InvalidInput(f"exclude_keys names {key!r}; {hint}")
    return found


def made_of(network: nn.Module) -> dict[str, Any]:
    """What a checkpoint says of how a network was made: class and arguments, and the settings of its LoRA."""
    if not isinstance(network, LoraTransformerForDiffusion):
        config = model_config(network)
        return {} if config is None else {MODEL_CONFIG: config}
    return {**made_of(network.base_model), "lora_config": network.settings.to_payload()}


def state_tree(workspace: DiffusionPolicyWorkspace, left_out: set[str], attributes: Iterable[str]) -> dict[str, Any]:
    """A checkpoint's content; its tensors are the live ones.

    Args:
        left_out: state dicts that are not in it.
        attributes: of the workspace, to be in it.

    Raises:
        InvalidInput: the workspace has no such attribute.
    """
    states: dict[str, Any] = {"model": network_state(workspace.model)}
    if workspace.ema is not None:
        states["ema_model"] = network_state(workspace.ema.averaged_model)
    if workspace.policy.normalizer.is_fitted:
        states["normalizer"] = workspace.policy.normalizer.state_dict()
    states["optimizer"] = workspace.optimizer.state_dict()
    scheduler = workspace.trainer.scheduler_state()
    if scheduler is not None:
        states["scheduler"] = scheduler
    states["rng"] = workspace.trainer.rng_state()
    pickles: dict[str, Any] = {**made_of(workspace.model), **workspace.trainer.state()}
    if workspace.ema is not None:
        pickles["ema_counters"] = workspace.ema.state_dict()
    if workspace.topk.k:
        pickles["topk"] = workspace.topk.state_dict()
    if workspace.metrics:
        pickles["metrics"] = dict(workspace.metrics)
    if workspace.base_reference is not None:
        pickles["base_reference"] = workspace.base_reference
    for key in dict.fromkeys(attributes):
        if not hasattr(workspace, key):
            raise InvalidInput(f"include_keys names {key!r}, and the workspace has no such attribute")
        pickles[key] = getattr(workspace, key)
    kept = {key: state for key, state in states.items() if key not in left_out}
    return {"cfg": OmegaConf.to_container(workspace.cfg), "state_dicts": kept, "pickles": pickles}


def take_state(
    workspace: DiffusionPolicyWorkspace,
    checkpoint: Checkpoint,
    *,
    load_optimizer: bool,
    strict: bool,
    left_out: set[str],
    attributes: Iterable[str],
) -> None:
    """Gives a checkpoint's state to a workspace, after all of it was found to fit.

    Raises:
        Incompatible, InvalidInput: something does not; nothing is changed.
    """
    wanted = set(STATE_DICTS) - left_out - (set() if load_optimizer else {"optimizer", "scheduler"})
    steps: list[Callable[[], object]] = []
    if "model" in wanted:
        steps.append(_fit_network(workspace.model, checkpoint, strict=strict))
    if "normalizer" in wanted and checkpoint.normalizer:
        steps.append(workspace.policy.fit_normalizer_state(checkpoint.normalizer, checkpoint.what))
    if workspace.ema is not None and "ema_model" in wanted:
        steps.append(fit_average(workspace.ema.averaged_model, checkpoint, strict=strict))
        if "ema_counters" in checkpoint.training:
            steps.append(workspace.ema.fit_state(checkpoint.training["ema_counters"], checkpoint.what))
    if "optimizer" in wanted and "optimizer" in checkpoint.roles:
        try:
            steps.append(fit_optimizer(workspace.optimizer, checkpoint.state("optimizer"), checkpoint.what))
        except Incompatible as refusal:
            if strict:
                raise
            say(f"{refusal}; the optimizer begins anew")
    # Names of files to keep and to delete are those of this folder, or nobody's.
    if workspace.topk.k and _is_in(checkpoint, workspace.topk.save_dir) and "topk" in checkpoint.training:
        steps.append(workspace.topk.fit_state(checkpoint.training["topk"], checkpoint.what))
    steps.append(workspace.trainer.fit(checkpoint, wanted))
    found = {key: checkpoint.training[key] for key in attributes if key in checkpoint.training}
    for key in {"global_step", "epoch"} & found.keys():
        found[key] = check_count(found[key], key, checkpoint.what)
    metrics = _metrics_of(checkpoint)
    for step in steps:
        step()
    for key, value in found.items():
        setattr(workspace, key, value)
    workspace.metrics = metrics


def _metrics_of(checkpoint: Checkpoint) -> dict[str, float]:
    given = checkpoint.training.get("metrics") or {}
    if not isinstance(given, Mapping) or not all(type(value) in (int, float) for value in given.values()):
        raise InvalidInput(f"{checkpoint.what}: metrics are {shown(repr(given))}; expected a number for each name")
    return {str(name): value for name, value in given.items()}


def _is_in(checkpoint: Checkpoint, folder: Path) -> bool:
    return isinstance(checkpoint, FileCheckpoint) and checkpoint.path.parent.resolve() == folder.resolve()


def _fit_network(network: Any, checkpoint: Checkpoint, *, strict: bool) -> Callable[[], None]:
    if isinstance(network, LoraTransformerForDiffusion) and checkpoint.adapter:
        return network.fit_checkpoint(checkpoint, strict=strict, only_adapter="model" not in checkpoint.roles)
    bare = network.base_model if isinstance(network, LoraTransformerForDiffusion) else network
    refused = refused_arguments(architecture_differences(checkpoint.architecture, bare))
    return fit(network, checkpoint.network, strict=strict, what=checkpoint.what, refused=refused)
