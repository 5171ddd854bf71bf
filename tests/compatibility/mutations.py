"""Changes to an adapter on disk that a person, a script or a broken upload could make: to names, to shapes and to the
configuration. Each takes the configuration and the tensors, changes them in place, and is steered by one number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]
Tensors = dict[str, Tensor]
Mutation = Callable[[Config, Tensors, int], None]
PEFT = "base_model.model."


def _pick(names: Sequence[str], pick: int) -> str:
    return names[pick % len(names)]


def _one(tensors: Tensors, pick: int) -> str:
    return _pick(sorted(tensors), pick) if tensors else ""


def _rename(tensors: Tensors, new: Callable[[str], str]) -> None:
    after = {new(name): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(after)


def _module(tensors: Tensors, pick: int) -> str:
    """Path of one wrapped or copied module, with PEFT's prefix."""
    paths = sorted({name.partition(".lora_")[0].removesuffix(".weight").removesuffix(".bias") for name in tensors})
    return _pick(paths, pick) if paths else "none"


# ---------------------------------------------------------------- names


def drop_tensor(config: Config, tensors: Tensors, pick: int) -> None:
    tensors.pop(_one(tensors, pick), None)


def drop_module(config: Config, tensors: Tensors, pick: int) -> None:
    path = _module(tensors, pick)
    for name in [name for name in tensors if name.startswith(f"{path}.")]:
        del tensors[name]


def rename_module(config: Config, tensors: Tensors, pick: int) -> None:
    path = _module(tensors, pick)
    _rename(tensors, lambda name: f"{path}_old{name[len(path) :]}" if name.startswith(f"{path}.") else name)


def rename_part(config: Config, tensors: Tensors, pick: int) -> None:
    old, new = [("lora_A", "lora_C"), ("lora_B", "lora_A2"), (".weight", ".weights"), ("lora_", "loha_")][pick % 4]
    first = _one(tensors, pick // 4)
    _rename(tensors, lambda name: name.replace(old, new) if name == first else name)


def rename_prefix(config: Config, tensors: Tensors, pick: int) -> None:
    new = ["", "diffusion_model.", "transformer.", "base_model.", "model.", f"{PEFT}model.", f"{PEFT}{PEFT}"][pick % 7]
    _rename(tensors, lambda name: new + name.removeprefix(PEFT))


def move_module(config: Config, tensors: Tensors, pick: int) -> None:
    """To another number of layer, as when layers were counted from one."""
    path = _module(tensors, pick)
    shifted = ".".join(str(int(part) + 1 + pick % 3) if part.isdecimal() else part for part in path.split("."))
    _rename(tensors, lambda name: shifted + name[len(path) :] if name.startswith(f"{path}.") else name)


def duplicate_module(config: Config, tensors: Tensors, pick: int) -> None:
    path = _module(tensors, pick)
    for name in [name for name in tensors if name.startswith(f"{path}.")]:
        tensors[f"{PEFT}copy{pick % 2}{name[len(path) :]}"] = tensors[name]


# ---------------------------------------------------------------- shapes and values


def transpose(config: Config, tensors: Tensors, pick: int) -> None:
    name = _one(tensors, pick)
    if name and tensors[name].dim() >= 2:
        tensors[name] = tensors[name].transpose(0, 1).contiguous()


def widen(config: Config, tensors: Tensors, pick: int) -> None:
    name = _one(tensors, pick // 2)
    if name:
        at = pick % tensors[name].dim()
        tensors[name] = torch.cat([tensors[name], tensors[name]], at)


def narrow(config: Config, tensors: Tensors, pick: int) -> None:
    name = _one(tensors, pick // 2)
    if name:
        at = pick % tensors[name].dim()
        tensors[name] = tensors[name].narrow(at, 0, max(1, tensors[name].shape[at] - 1)).contiguous()


def flatten(config: Config, tensors: Tensors, pick: int) -> None:
    name = _one(tensors, pick)
    if name:
        tensors[name] = tensors[name].flatten()


def no_number(config: Config, tensors: Tensors, pick: int) -> None:
    name = _one(tensors, pick)
    if name:
        tensors[name] = torch.full_like(tensors[name], [float("nan"), float("inf")][pick % 2])


def zero_b(config: Config, tensors: Tensors, pick: int) -> None:
    """All of them, where there is nothing else: a single one could be that of a module which never learnt."""
    if not all("lora_A" in name or "lora_B" in name or "lora_embedding" in name for name in tensors):
        return
    for name in tensors:
        if "lora_B" in name or "lora_embedding_B" in name:
            tensors[name] = torch.zeros_like(tensors[name])


# ---------------------------------------------------------------- configuration


def set_key(key: str, *values: Any) -> Mutation:
    def mutation(config: Config, tensors: Tensors, pick: int) -> None:
        config[key] = values[pick % len(values)]

    mutation.__name__ = f"set_{key}"
    return mutation


def drop_key(config: Config, tensors: Tensors, pick: int) -> None:
    keys = [
        "r",
        "lora_alpha",
        "target_modules",
        "bias",
        "use_dora",
        "modules_to_save",
        "peft_version",
        "init_lora_weights",
    ]
    config.pop(keys[pick % len(keys)], None)


def fewer_targets(config: Config, tensors: Tensors, pick: int) -> None:
    names = config.get("target_modules")
    if isinstance(names, list) and names:
        config["target_modules"] = [name for at, name in enumerate(sorted(names)) if at != pick % len(names)]


def more_targets(config: Config, tensors: Tensors, pick: int) -> None:
    added = ["k_proj", "dense", "c_fc", "norm", "conv2", "no_such_module", "mha", "head"][pick % 8]
    names = config.get("target_modules")
    config["target_modules"] = [*names, added] if isinstance(names, list) else added


def copy_another(config: Config, tensors: Tensors, pick: int) -> None:
    added = ["head", "lm_head", "classifier", "norm", "embed_tokens", "scorer"][pick % 6]
    config["modules_to_save"] = [*(config.get("modules_to_save") or []), added]


def other_pattern_key(config: Config, tensors: Tensors, pick: int) -> None:
    path = _module(tensors, pick).removeprefix(PEFT)
    config["rank_pattern"] = {path: [2, 4, 9][pick % 3]}


NAMES: tuple[Mutation, ...] = (
    *(drop_tensor, drop_module, rename_module, rename_part, rename_prefix, move_module, duplicate_module),
)
SHAPES: tuple[Mutation, ...] = (transpose, widen, narrow, flatten, no_number, zero_b)
KEYS: tuple[Mutation, ...] = (
    set_key("r", 1, 3, 8, 64),
    set_key("rank_pattern", {}, {"q_proj": 2}, {"query": 2}, {"no_such": 3}, {".*": 5}),
    set_key("use_dora", True, False),
    set_key("lora_bias", True, False),
    set_key("bias", "all", "lora_only", "none"),
    set_key("peft_type", "LOAR", "LOHA", "BONE", "lora"),
    set_key(
        "target_modules", "all-linear", ["q_proj"], ["no_such"], "no_such", ".*query", ["query", "value"], None, []
    ),
    set_key("exclude_modules", ["q_proj"], "query", [], ["no_such"]),
    set_key("layers_to_transform", [0], 1, [7], []),
    set_key("modules_to_save", None, [], ["scorer"], ["head"]),
    set_key("target_parameters", ["mlp.experts.down_proj"], [], None, ["no_such.weight"]),
    set_key("trainable_token_indices", [1, 2], None, {"embed_tokens": [1]}, {"no_such": [1]}),
    set_key("layer_replication", [[0, 2], [1, 2]], None, []),
    set_key("task_type", "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", "TOKEN_CLS", None),
    set_key("fan_in_fan_out", True, False),
    set_key("use_tora", True, "yes", None),
    set_key("lora_dropout", 0.5, 0.0),
    set_key("peft_version", "0.18.0", "0.99.0", "0.21.0"),
    set_key("base_model_name_or_path", "somebody/else", None, "/mnt/other"),
    set_key("inference_mode", True, False),
    set_key("use_qalora", True, False),
    *(drop_key, fewer_targets, more_targets, copy_another, other_pattern_key),
)
RESCALING: tuple[Mutation, ...] = (
    set_key("lora_alpha", 1, 4, 8, 64, 0),
    set_key("use_rslora", True, False),
    set_key("alpha_pattern", {}, {"q_proj": 2}, {"no_such": 3}, {".*": 5}),
)
MUTATIONS = {one.__name__: one for one in (*NAMES, *SHAPES, *KEYS, *RESCALING)}
SCALING_KEYS = frozenset({"lora_alpha", "use_rslora", "alpha_pattern"})
