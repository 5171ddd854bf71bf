"""The configuration of a run that is made from a checkpoint: the one that was recorded, with what the weights
themselves say where it has gaps. What was recorded is data: nothing in it is resolved by OmegaConf, and it does not
say where to write."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from pdp.building import read_off_shapes
from pdp.checkpoints import Checkpoint, RegistryCheckpoint
from pdp.configuration import read_config
from pdp.errors import CheckpointError
from pdp.loading import say
from registry.core.architecture import Architecture

_NODE = re.compile(r"\$\{([A-Za-z_][\w]*(?:\.[\w]+)*)\}", re.ASCII)
OF_THE_RUN = (
    "output_dir",
    "registry.url",
    "registry.push",
    "registry.push_policy",
    "registry.push_adapter",
    "training.resume",
)
"""Where a run wrote, and from where it went on: not for the one that is made of its checkpoint."""
MAX_STEPS = 16


def config_of(checkpoint: Checkpoint, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration for a checkpoint, as plain data.

    Args:
        overrides: values by dotted path, put in at the end.

    Raises:
        CheckpointError: it does not say how its network was made, or it holds an adapter without a base.
        ConfigError: an override with an unknown key (with the near one).
    """
    recorded = checkpoint.training.get("cfg")
    cfg = _plain(recorded, checkpoint.what) if isinstance(recorded, Mapping) else {}
    policy = cfg.setdefault("policy", {})
    if not isinstance(policy, dict):
        raise CheckpointError(f"{checkpoint.what}: policy in its configuration is a {type(policy).__name__}")
    if not isinstance(recorded, Mapping):
        say(f"{checkpoint.what} has no configuration; training goes by the defaults")
    elif not policy.get("noise_scheduler"):
        say(f"the configuration of {checkpoint.what} has no policy.noise_scheduler; it is taken as the default")
    policy.pop("init_from", None)  # the weights are in the checkpoint
    _add_network(policy, checkpoint)
    for path in OF_THE_RUN:
        section, _, key = path.rpartition(".")
        node = cfg.get(section) if section else cfg
        if isinstance(node, dict):
            node.pop(key, None)
    unknown: list[str] = []
    read_config(cfg, unknown=unknown)
    if unknown:
        say(
            f"keys in the configuration of {checkpoint.what} that are not known here are left out: {', '.join(unknown)}"
        )
        for path in unknown:
            _drop(cfg, path)
    for path, value in overrides.items():
        node = cfg
        *above, last = path.split(".")
        for part in above:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"overrides: {path} leads through a value; there is no section {part}")
        node[last] = value
    return cfg


def _add_network(policy: dict[str, Any], checkpoint: Checkpoint) -> None:
    settings = checkpoint.settings
    has_base = bool(checkpoint.base)
    if not policy.get("model") and has_base:
        architecture = checkpoint.architecture
        if architecture is None:
            architecture = Architecture("", read_off_shapes(checkpoint.base, checkpoint.what))
        target = {"_target_": architecture.class_name} if architecture.class_name else {}
        policy["model"] = {**target, **architecture.arguments}
    if settings is None:
        if policy.get("lora") is not None:
            raise CheckpointError(f"the configuration of {checkpoint.what} has a LoRA, its weights have none")
        return
    policy["lora"] = settings.to_payload()
    if has_base:
        return
    declared = checkpoint.base_reference if isinstance(checkpoint, RegistryCheckpoint) else None
    if declared is None:
        raise CheckpointError(
            f"{checkpoint.what} holds an adapter alone; make a workspace with policy.lora.base_model_path, and load "
            "it there"
        )
    policy["lora"]["base_model_path"] = f"registry://{declared}"


def _plain(recorded: Mapping[Any, Any], what: str) -> dict[str, Any]:
    """The recorded tree with keys as text. `${a.b}` becomes the value at a.b; what is more than that is left out."""
    left_out: list[str] = []

    def value_of(value: Any, path: str, depth: int) -> Any:
        if isinstance(value, Mapping):
            found = {
                str(key): value_of(item, f"{path}.{key}" if path else str(key), depth) for key, item in value.items()
            }
            return {key: item for key, item in found.items() if item is not _LEFT_OUT and "." not in key}
        if isinstance(value, list | tuple):
            return [item for item in (value_of(one, path, depth) for one in value) if item is not _LEFT_OUT]
        if not isinstance(value, str) or "${" not in value:
            return copy.copy(value)
        match = _NODE.fullmatch(value)
        node: Any = recorded
        for part in match[1].split(".") if match else ():
            node = node.get(part, _LEFT_OUT) if isinstance(node, Mapping) else _LEFT_OUT
        if not match or node is _LEFT_OUT or depth >= MAX_STEPS:
            left_out.append(path)
            return _LEFT_OUT
        return value_of(node, path, depth + 1)

    found: dict[str, Any] = value_of(recorded, "", 0)
    if left_out:
        say(f"values in the configuration of {what} that would have to be computed are left out: {', '.join(left_out)}")
    return found


_LEFT_OUT = object()


def _drop(cfg: dict[str, Any], path: str) -> None:
    *above, last = path.split(".")
    node: Any = cfg
    for part in above:
        node = node[part]
    del node[last]
