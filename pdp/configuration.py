"""The configuration of a run: what keys there are and of which type. An unknown key is refused with the near one, and a
`_target_` is looked up in a table (`pdp.classes`): no name in a configuration is ever imported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pdp.errors import ConfigError
from registry.core.reference import URL_SCHEME, parse_push_target, shown

WORKSPACE = "pdp.workspace.DiffusionPolicyWorkspace"


@dataclass
class LoraConfig:
    """`policy.lora`: a LoRA on the network; null trains all of the network."""

    lora_r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "out_proj"])
    apply_to: str = "both"
    lora_options: dict[str, Any] = field(default_factory=dict)
    base_model_path: str | None = None
    """File or registry:// URL of the network that the LoRA is put on, with its normaliser."""


@dataclass
class PolicyConfig:
    """`policy`: the network (constructor arguments), the LoRA on it, and diffusers' noise scheduler."""

    _target_: str = "pdp.policy.DiffusionPolicy"
    model: dict[str, Any] | None = None
    """Null: as the base of the LoRA was made."""
    init_from: str | None = None
    """File or registry:// URL of a policy whose weights and normaliser training begins with, where there is no LoRA:
    what is called full fine-tuning. Its moving average is taken, where it has one."""
    lora: LoraConfig | None = None
    noise_scheduler: dict[str, Any] | None = None
    """Null: as the base of the LoRA was trained, else 10 steps that predict the sample."""
    num_inference_steps: int | None = None


@dataclass
class DatasetConfig:
    """`dataset`: a zarr folder or HDF5 file with obs, action and episode_ends."""

    _target_: str = "pdp.data.SequenceDataset"
    path: str = MISSING
    world: str | None = None
    """The world that the data have to be of, as their recipe says; null: any."""
    val_ratio: float = 0.0
    seed: int = 0


@dataclass
class LoaderConfig:
    """`dataloader` and `val_dataloader`."""

    batch_size: int = 256
    num_workers: int = 0
    shuffle: bool = True
    drop_last: bool = False
    pin_memory: bool = False
    persistent_workers: bool = False


@dataclass
class EmaConfig:
    """`ema`: the moving average of the weights; see `pdp.ema.EMAModel`."""

    inv_gamma: float = 1.0
    max_value: float = 0.9999
    min_value: float = 0.0
    power: float = 0.75
    update_after_step: int = 0


@dataclass
class OptimizerConfig:
    """`optimizer`: AdamW; weight decay is on the weights of linear layers alone."""

    betas: tuple[float, float] = (0.9, 0.95)
    lr: float = 1e-3
    weight_decay: float = 1e-4
    eps: float = 1e-8


@dataclass
class TrainingConfig:
    """`training`: how long and on what. Everything `_every` counts epochs; 0 is never."""

    seed: int = 42
    device: str = "cpu"
    num_epochs: int = 50
    max_steps: int | None = None
    """Gradient steps in all; null: num_epochs epochs."""
    lr_scheduler: str = "cosine"
    """By diffusers' names: cosine, linear, constant, polynomial, ..."""
    lr_warmup_steps: int = 500
    use_ema: bool = True
    threads: int | None = None
    """Of torch on the CPU; null: as many as torch chooses. A small network is fastest with one."""
    max_grad_norm: float | None = 1.0
    bf16: bool = True
    """bf16 autocast on cuda; nothing on the CPU."""
    save_checkpoint_every: int = 1
    val_every: int = 1
    rollout_every: int = 0
    resume: Any = False
    """True: go on from checkpoints/latest.ckpt of the output folder, where there is one. Or a file or registry://
    URL."""


@dataclass
class TopKConfig:
    """`checkpoint.topk`: the best checkpoints beside the latest."""

    monitor_key: str = "train_loss"
    mode: str = "min"
    k: int = 0
    format_str: str = "epoch={epoch:04d}-train_loss={train_loss:.4f}.ckpt"


@dataclass
class CheckpointConfig:
    """`checkpoint`"""

    topk: TopKConfig = field(default_factory=TopKConfig)


@dataclass
class RegistryConfig:
    """`registry`: what is pushed when training ends; null is nothing."""

    url: str | None = None
    """The registry; null: as the command line finds it."""
    push: str | None = None
    """registry://namespace/name[:tag] of the whole checkpoint, with which training can go on."""
    push_policy: str | None = None
    """The same of the policy alone, for use and as a base: averaged weights and normaliser."""
    push_adapter: str | None = None
    """The same of the adapter alone, averaged."""
    base: str | None = None
    """Reference of the base; null: the version that policy.lora.base_model_path names."""


@dataclass
class LoggingConfig:
    """`logging`"""

    metrics_file: str = "metrics.jsonl"
    log_every: int = 1
    """Steps from one line of the file to the next."""
    progress: bool = True


@dataclass
class Config:
    """All of it."""

    _target_: str = WORKSPACE
    name: str | None = None
    output_dir: str | None = None
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    dataloader: LoaderConfig = field(default_factory=LoaderConfig)
    val_dataloader: LoaderConfig = field(default_factory=lambda: LoaderConfig(shuffle=False))
    ema: EmaConfig = field(default_factory=EmaConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def read_config(given: Any, *, unknown: list[str] | None = None) -> Any:
    """A configuration with all keys and types checked, and defaults filled in.

    Args:
        given: a mapping, plain or of OmegaConf.
        unknown: collects unknown keys, which are then left out; without it they are refused.

    Returns:
        A read-only DictConfig of the form of `Config`.

    Raises:
        ConfigError: an unknown key (with the near one), or a value of another type.
    """
    if isinstance(given, DictConfig):
        try:
            missing = OmegaConf.missing_keys(given) - MAY_BE_MISSING
            if missing:
                raise ConfigError(
                    f"{', '.join(sorted(missing))} not set in the configuration; give a value (key=value)"
                )
            plain = OmegaConf.to_container(given, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"the configuration cannot be resolved: {_first_line(error)}") from error
    else:
        plain = given
    _refuse_interpolations(plain, "")
    if not isinstance(plain, Mapping):
        raise ConfigError(
            f"the configuration is a {type(given).__name__}; expected a mapping with policy, training, ..."
        )
    known: dict[str, Any] = {}
    for path, key, value, section, names in _walk(plain, Config, ""):
        if key not in names:
            near = get_close_matches(str(key), names, n=1)
            if unknown is None:
                hint = f"; did you mean {near[0]}?" if near else f"; {section or 'there'} has {', '.join(names)}"
                raise ConfigError(f"unknown key {shown(path)} in the configuration{hint}")
            unknown.append(path)
        elif value is not _SECTION:
            _set(known, path, value)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(known))
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration: {_first_line(error)}") from error
    OmegaConf.set_readonly(merged, True)
    _check_ranges(merged)
    return merged


def _refuse_interpolations(tree: Any, path: str) -> None:
    """What OmegaConf would resolve in plain data: a resolver may read the environment, or run what it is told."""
    if isinstance(tree, str) and "${" in tree:
        raise ConfigError(
            f"{path or 'the configuration'} is {shown(tree)}; give the value, or a configuration of OmegaConf"
        )
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ():
        _refuse_interpolations(key, path)
        _refuse_interpolations(value, f"{path}.{key}" if path else str(key))


_SECTION = object()
MAY_BE_MISSING = {"dataset.path"}
"""A run that only saves and loads needs no data."""


def _walk(tree: Mapping[Any, Any], kind: type, above: str) -> Iterator[tuple[str, Any, Any, str, list[str]]]:
    """(dotted path, key, value or _SECTION, dotted path of the section, its keys) of everything in a tree."""
    hints = get_type_hints(kind)
    names = [one.name for one in fields(kind)]
    for key, value in tree.items():
        path = f"{above}.{key}" if above else str(key)
        inner = _section(hints[key]) if key in hints else None
        if inner is not None and isinstance(value, Mapping):
            yield path, key, _SECTION, above, names
            yield from _walk(value, inner, path)
        else:
            yield path, key, value, above, names


def _section(hint: Any) -> type | None:
    return next((one for one in (hint, *get_args(hint)) if is_dataclass(one) and isinstance(one, type)), None)


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    return shown(f"{key}: {lines[0]}" if key else lines[0] if lines else repr(error), 300)


def _check_ranges(cfg: Any) -> None:
    name = cfg.logging.metrics_file
    if not name or name.startswith(".") or Path(name).name != name:
        raise ConfigError(f"logging.metrics_file is {shown(cfg.logging.metrics_file)}; expected the name of a file")
    for key in ("push", "push_policy", "push_adapter"):
        value = cfg.registry[key]
        if value is not None and not value.startswith(URL_SCHEME):
            raise ConfigError(f"registry.{key} is {shown(value)}; expected a URL such as registry://walk/run:night")
        if value is not None:
            parse_push_target(value)
    at_least = {
        "training.num_epochs": (cfg.training.num_epochs, 0),
        "training.lr_warmup_steps": (cfg.training.lr_warmup_steps, 0),
        "training.save_checkpoint_every": (cfg.training.save_checkpoint_every, 0),
        "training.val_every": (cfg.training.val_every, 0),
        "training.rollout_every": (cfg.training.rollout_every, 0),
        "dataloader.batch_size": (cfg.dataloader.batch_size, 1),
        "val_dataloader.batch_size": (cfg.val_dataloader.batch_size, 1),
        "dataloader.num_workers": (cfg.dataloader.num_workers, 0),
        "val_dataloader.num_workers": (cfg.val_dataloader.num_workers, 0),
        "logging.log_every": (cfg.logging.log_every, 1),
        "checkpoint.topk.k": (cfg.checkpoint.topk.k, 0),
        "training.seed": (cfg.training.seed, 0),
        "dataset.seed": (cfg.dataset.seed, 0),
        "optimizer.weight_decay": (cfg.optimizer.weight_decay, 0),
    }
    for key, (value, least) in at_least.items():
        if not least <= value < 2**63:
            raise ConfigError(f"{key} is {value}; expected {least} or more")
    if cfg.training.max_steps is not None and cfg.training.max_steps < 1:
        raise ConfigError(f"training.max_steps is {cfg.training.max_steps}; expected 1 or more, or null")
    if cfg.training.threads is not None and not 1 <= cfg.training.threads <= 1024:
        raise ConfigError(f"training.threads is {cfg.training.threads}; expected 1 to 1024, or null")
    if cfg.policy.lora is not None and cfg.policy.init_from is not None:
        raise ConfigError("policy.init_from and policy.lora are both set; a LoRA begins with lora.base_model_path")
    limit = cfg.training.max_grad_norm
    positive = {"optimizer.lr": cfg.optimizer.lr, "optimizer.eps": cfg.optimizer.eps}
    for key, value in (positive | ({} if limit is None else {"training.max_grad_norm": limit})).items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{key} is {value}; expected a positive number")
    betas = list(cfg.optimizer.betas)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optimizer.betas is {betas}; expected two numbers from 0 to below 1")


def check_override(text: str) -> None:
    """A `key=value` of the command line, before hydra sees it: hydra names the key alone.

    Raises:
        ConfigError: it is close to a key that there is, and none itself.
    """
    key = text.lstrip("+~").partition("=")[0].partition("@")[0]
    if "=" not in text or key.partition(".")[0] in ("hydra", "") or "/" in key:
        return
    known = list(_keys(Config, ""))
    open_ones = [path for path, is_open in known if is_open]
    if any(key == path for path, _ in known) or any(key.startswith(f"{path}.") for path in open_ones):
        return
    near = get_close_matches(key, [path for path, _ in known], n=1)
    if near:
        raise ConfigError(f"unknown key {shown(key)} in the configuration; did you mean {near[0]}?")


def _keys(kind: type, above: str) -> Iterator[tuple[str, bool]]:
    """Dotted paths of all keys, and whether anything may stand below each."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        path = f"{above}.{one.name}" if above else one.name
        inner = _section(hints[one.name])
        yield path, "dict" in str(hints[one.name])
        if inner is not None:
            yield from _keys(inner, path)
