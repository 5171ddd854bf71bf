"""A training run: policy, optimizer, moving average and how far it is, made from a configuration; saved to and
restored from files and registries. The loop itself is in `pdp.training`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from pdp.checkpoints import (
    Checkpoint,
    RegistryCheckpoint,
    checkpoint_of,
    read_checkpoint,
)
from pdp.configuration import read_config
from pdp.device import check_device
from pdp.ema import EMAModel
from pdp.files import check_path, check_push_options, is_registry_url, on_cpu, refuse_push_options, write_tree
from pdp.lora_model import LoraTransformerForDiffusion, network_state
from pdp.policy import DiffusionPolicy
from pdp.random_state import seed_everything
from pdp.recorded_config import config_of
from pdp.run_policy import make_policy
from pdp.run_state import check_excluded, made_of, state_tree, take_state
from pdp.saving import BackgroundSaver
from pdp.topk import TopKCheckpointManager
from pdp.training import Trainer
from pdp.utils.lora_utils import push_tree
from registry import Registry
from registry.core.errors import InvalidInput, SourceNotFound
from registry.core.reference import parse_push_target

PathLike = str | os.PathLike[str]
LATEST = "latest"


class DiffusionPolicyWorkspace:
    """One training run.

    Args:
        cfg: of the form of `pdp.configuration.Config`, plain or of OmegaConf.
        output_dir: where checkpoints and metrics go; by default `cfg.output_dir`, hydra's folder of this run, or
            `outputs/<date>/<time>`. Made when something is written.
        classes: classes of networks beside pdp's own that `policy.model._target_` may name.
        registry: where `registry://` URLs are looked up; by default `cfg.registry.url`, or as the command line does.
        rollout: called with the policy every `training.rollout_every` epochs; its metrics are logged.

    Attributes:
        policy: the DiffusionPolicy in training. `model` is its network.
        ema: the EMAModel of the network, or None.
        global_step, epoch: gradient steps and whole epochs that are done.
        metrics: the newest value of each metric.
        pushed: what `run` pushed at its end, as `registry://namespace/name@number`.

    Raises:
        ConfigError: an unknown key (with the near one), a wrong value, a device that is not there.
        Incompatible, InvalidInput, NotFound: the base of a LoRA.
    """

    include_keys: tuple[str, ...] = ("global_step", "epoch")
    exclude_keys: tuple[str, ...] = ()

    def __init__(
        self,
        cfg: Any,
        output_dir: PathLike | None = None,
        *,
        classes: Iterable[type[nn.Module]] = (),
        registry: Registry | PathLike | None = None,
        rollout: Callable[[DiffusionPolicy], Mapping[str, float]] | None = None,
    ) -> None:
        self.cfg = read_config(cfg)
        self.classes = tuple(classes)
        self.rollout = rollout
        self.global_step = 0
        self.epoch = 0
        self.metrics: dict[str, float] = {}
        self.pushed: list[str] = []
        self.saver = BackgroundSaver()
        self._registry = registry if registry is not None else self.cfg.registry.url
        self._output_dir = None if output_dir is None else Path(output_dir)
        self.device = check_device(self.cfg.training.device, "training.device")
        self._lineage: tuple[str | None, int | None] = (None, None)
        self._parent: str | None = None

        seed_everything(self.cfg.training.seed)
        policy, self.base_reference = make_policy(self.cfg, self.classes, self._registry)
        self.policy = policy.to(self.device)
        average = {str(key): value for key, value in self.cfg.ema.items()}
        self.ema = EMAModel(self.policy.model, **average) if self.cfg.training.use_ema else None
        optimizer = self.cfg.optimizer
        network: Any = self.policy.model
        self.optimizer = torch.optim.AdamW(
            network.get_optim_groups(optimizer.weight_decay),
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.eps,
        )
        self.topk = self._make_topk()
        self.trainer = Trainer(self)

    # ------------------------------------------------------------ made from the configuration

    def _make_topk(self) -> TopKCheckpointManager:
        topk = self.cfg.checkpoint.topk
        return TopKCheckpointManager(
            str(self._checkpoints_of(topk.k)), topk.monitor_key, mode=topk.mode, k=topk.k, format_str=topk.format_str
        )

    def _checkpoints_of(self, k: int) -> Path:
        return self.output_dir / "checkpoints" if k else Path("checkpoints")

    @property
    def model(self) -> nn.Module:
        """The network in training, with its LoRA if it has one."""
        return self.policy.model

    @property
    def ema_model(self) -> nn.Module | None:
        """The averaged network, or None."""
        return None if self.ema is None else self.ema.averaged_model

    @property
    def output_dir(self) -> Path:
        """Where this run writes; see the class."""
        if self._output_dir is None:
            self._output_dir = Path(self.cfg.output_dir) if self.cfg.output_dir else _hydra_folder()
        if self._output_dir is None:
            self._output_dir = Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
        return self._output_dir

    def is_lora_model(self) -> bool:
        """Whether the network carries a LoRA."""
        return isinstance(self.policy.model, LoraTransformerForDiffusion)

    def run(self, until_step: int | None = None) -> dict[str, float]:
        """Trains to the end of the plan, and saves `latest`.

        Args:
            until_step: stop there; the plan (learning rates, order of data) stays that of the whole training.

        Returns:
            The newest value of each metric.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; the last good checkpoint stays.
            DatasetError, ConfigError, StorageError
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.cfg.training.threads or before)
        try:
            return self.trainer.run(until_step)
        finally:
            torch.set_num_threads(before)

    # ------------------------------------------------------------ saving

    def state_tree(
        self, exclude_keys: Iterable[str] | None = None, include_keys: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """All that training goes on from, as a checkpoint holds it; its tensors are the live ones."""
        left_out = check_excluded(self.exclude_keys if exclude_keys is None else exclude_keys)
        return state_tree(self, left_out, (*self.include_keys, *(include_keys or ())))

    def get_checkpoint_path(self, tag: str = LATEST) -> str:
        """`<output_dir>/checkpoints/<tag>.ckpt`."""
        if not isinstance(tag, str) or not tag or Path(tag).name != tag or tag.startswith("."):
            raise InvalidInput(f"tag {tag!r}; expected a name for a file, such as latest or best")
        return str(self.output_dir / "checkpoints" / f"{tag}.ckpt")

    def save_checkpoint(
        self,
        path: PathLike | None = None,
        tag: str = LATEST,
        use_thread: bool = True,
        *,
        exclude_keys: Iterable[str] | None = None,
        include_keys: Iterable[str] | None = None,
        **push: Any,
    ) -> str:
        """Saves all that training goes on from.

        Args:
            path: a file or a `registry://` URL; by default the file of `tag`. A tag other than `latest` writes `latest`
                as well. With a URL, `tag` (but for `latest`) is moved to the pushed version.
            use_thread: write a copy in a thread. The next save, a load, the end of `run` and the exit of the process
                wait for it and raise its failure.
            exclude_keys: state dicts to leave out: `model`, `ema_model`, `normalizer`, `optimizer`, `scheduler`, `rng`.
            include_keys: further attributes of this object to keep; plain values.
            push: of a URL alone: `base`, `tags`, `metadata`, `metrics`, `message`, ... as `Registry.push` takes them.
                Metrics are by default the newest ones, `continued_from` is the version before.

        Returns:
            The path; of a push without thread the version, as `registry://namespace/name@number`.

        Raises:
            InvalidInput: an unknown key, or a value that is no plain data.
            NoSpace, ReadOnly, StorageError: this save's, or that of the thread before.
        """
        target = self.get_checkpoint_path(tag) if path is None else os.fspath(path)
        tree = self.state_tree(exclude_keys, include_keys)
        return self._save(tree, target, tag, use_thread, push, also_latest=path is None and tag != LATEST)

    def save_lora_checkpoint(
        self, path: PathLike | None = None, tag: str = LATEST, use_thread: bool = True, **push: Any
    ) -> str:
        """The same for a model with a LoRA, in the form of `pdp.utils.lora_utils.save_lora_checkpoint`; by default to
        `<output_dir>/checkpoints/lora_<tag>.ckpt`.

        Raises:
            InvalidInput: the model has no LoRA.
        """
        self._require_lora()
        target = self.get_checkpoint_path(f"lora_{tag}") if path is None else os.fspath(path)
        tree = self.state_tree()
        pickles = tree["pickles"]
        tree |= {key: pickles.pop(key) for key in ("epoch", "global_step")}
        latest = self.get_checkpoint_path(f"lora_{LATEST}") if path is None and tag != LATEST else None
        return self._save(tree, target, tag, use_thread, push, also_latest=latest is not None, latest=latest)

    def save_policy(self, path: PathLike, **push: Any) -> str:
        """Saves the policy alone, to act and to put a LoRA on: the network (averaged, where there is an average),
        normaliser, configuration. Arguments and errors as for `save_checkpoint`; a push names the checkpoint that it
        came from, where that was pushed at the same step."""
        self.saver.join()
        network = self.ema_model or self.model
        tree = {
            "cfg": OmegaConf.to_container(self.cfg),
            "state_dicts": {"model": network_state(network), "normalizer": self.policy.normalizer.state_dict()},
            "pickles": {**made_of(self.model), "global_step": self.global_step, "epoch": self.epoch},
        }
        if is_registry_url(path):
            given = {"base": self.base_reference, "step": self.global_step, **self._said(), **self._of_run(), **push}
            return push_tree(on_cpu(tree), path, self._registry, given)
        refuse_push_options(push)
        return self._write(on_cpu(tree), os.fspath(path), {})

    def save_adapter(self, path: PathLike, **push: Any) -> str:
        """Saves the LoRA alone, averaged where there is an average; see
        `LoraTransformerForDiffusion.save_lora_adapters`."""
        self._require_lora()
        self.saver.join()
        network: Any = self.ema_model or self.model
        if not is_registry_url(path):
            saved: str = network.save_lora_adapters(path, registry=self._registry, **push)
            return saved
        given = {"base": self.base_reference, **self._said(), **self._of_run(), **push}
        pushed: str = network.save_lora_adapters(path, registry=self._registry, **given)
        return pushed

    def _save(
        self,
        tree: dict[str, Any],
        target: str,
        tag: str,
        use_thread: bool,
        push: Mapping[str, Any],
        *,
        also_latest: bool,
        latest: str | None = None,
    ) -> str:
        if not is_registry_url(target):
            refuse_push_options(push)
        given = dict(push)
        if is_registry_url(target) and tag != LATEST:
            given["tags"] = [*given.get("tags", ()), tag]
        second = (latest or self.get_checkpoint_path()) if also_latest else None
        if is_registry_url(target):
            parse_push_target(target)
            check_push_options(given)
        else:
            check_path(target)
        self.saver.join()
        self.trainer.refuse_broken()
        ready = on_cpu(tree, copy=use_thread)
        said = {**self._said(), **given}

        def save() -> str:
            written = self._write(ready, target, said)
            if second is not None:
                self._write(ready, second, {})
            return written

        if use_thread:
            self.saver.start(save)
            return target
        return save()

    def _write(self, tree: Mapping[str, Any], target: str, push: Mapping[str, Any]) -> str:
        if not is_registry_url(target):
            write_tree(check_path(target), tree)
            return target
        step = tree["pickles"].get("global_step", tree.get("global_step"))
        given = {"base": self.base_reference, "continued_from": self._parent_at(step), "step": step, **push}
        pushed = push_tree(tree, target, self._registry, given)
        self._lineage = (self._parent_at(step), step)
        self._parent = pushed.removeprefix("registry://")
        return pushed

    def _parent_at(self, step: int | None) -> str | None:
        """What a push at this step continues: of two at one step both have the same parent, and are one version."""
        before, at = self._lineage
        return before if at is not None and at == step else self._parent

    def _of_run(self) -> dict[str, Any]:
        """What a part of the run's present state came from, if that was pushed."""
        if self._parent is None or self._lineage[1] != self.global_step:
            return {}
        return {"parents": [("extracted_from", self._parent, None)]}

    def _said(self) -> dict[str, Any]:
        """What a push says of the run: its newest metrics, and the task and world that the recipe of its data names."""
        finite = {name: value for name, value in self.metrics.items() if isinstance(value, float | int)}
        found: dict[str, Any] = {"metrics": finite} if finite else {}
        if self.trainer.trained_on:
            found["metadata"] = self.trainer.trained_on
        return found

    def _require_lora(self) -> None:
        if not self.is_lora_model():
            raise InvalidInput("the model has no LoRA; use save_checkpoint and load_checkpoint, or set policy.lora")

    # ------------------------------------------------------------ loading

    def load_payload(
        self,
        payload: Checkpoint | Mapping[str, Any],
        *,
        load_optimizer: bool = True,
        strict: bool = True,
        exclude_keys: Iterable[str] | None = None,
        include_keys: Iterable[str] | None = None,
    ) -> None:
        """Takes the state of a checkpoint: an opened one (`pdp.checkpoints.read_checkpoint`), or what such a file
        holds.

        Raises:
            Incompatible, InvalidInput: it does not fit; nothing is changed.
        """
        self.saver.join()
        opened = payload if isinstance(payload, Checkpoint) else checkpoint_of(payload)
        take_state(
            self,
            opened,
            load_optimizer=load_optimizer,
            strict=strict,
            left_out=check_excluded(self.exclude_keys if exclude_keys is None else exclude_keys),
            attributes=(*self.include_keys, *(include_keys or ())),
        )
        if self.base_reference is None:
            declared = opened.base_reference if isinstance(opened, RegistryCheckpoint) else None
            self.base_reference = declared or opened.training.get("base_reference")
        self._parent = opened.reference if isinstance(opened, RegistryCheckpoint) else None
        self._lineage = (None, None)

    def load_checkpoint(
        self,
        path: PathLike | None = None,
        tag: str = LATEST,
        load_optimizer: bool = True,
        *,
        strict: bool = True,
        exclude_keys: Iterable[str] | None = None,
        include_keys: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """Restores a run, so that `run` goes on where the checkpoint was made: on the CPU bit for bit.

        Args:
            path: a file or a `registry://` URL; by default the file of `tag`.
            load_optimizer: False leaves optimizer and learning-rate schedule as they are.
            strict: refuse a network that differs in anything; else warn, and load what fits.
            exclude_keys, include_keys: as for `save_checkpoint`.

        Returns:
            The checkpoint's whole content.

        Raises:
            Incompatible: it does not fit; InvalidInput: torn, or it would run code; NotFound.
        """
        self.saver.join()
        checkpoint = self._open(self.get_checkpoint_path(tag) if path is None else path)
        self.load_payload(
            checkpoint,
            load_optimizer=load_optimizer,
            strict=strict,
            exclude_keys=exclude_keys,
            include_keys=include_keys,
        )
        payload: dict[str, Any] = checkpoint.payload
        return payload

    def load_lora_checkpoint(
        self,
        path: PathLike | None = None,
        tag: str = LATEST,
        load_optimizer: bool = True,
        *,
        strict: bool | None = None,
    ) -> dict[str, Any]:
        """The same for a model with a LoRA; by default from `<output_dir>/checkpoints/lora_<tag>.ckpt`.

        Args:
            strict: None: True for a registry; a file may differ, and warnings say in what.

        Raises:
            InvalidInput: the model has no LoRA; and what `load_checkpoint` raises.
        """
        self._require_lora()
        self.saver.join()
        checkpoint = self._open(self.get_checkpoint_path(f"lora_{tag}") if path is None else path)
        strictly = isinstance(checkpoint, RegistryCheckpoint) if strict is None else strict
        self.load_payload(checkpoint, load_optimizer=load_optimizer, strict=strictly)
        payload: dict[str, Any] = checkpoint.payload
        return payload

    def _open(self, path: PathLike) -> Any:
        try:
            return read_checkpoint(path, self._registry)
        except SourceNotFound as error:
            folder = Path(path).parent
            there = ", ".join(sorted(one.name for one in folder.glob("*.ckpt"))[:8]) if folder.is_dir() else ""
            raise SourceNotFound(
                f"{error}; {f'in {folder} there are {there}' if there else 'nothing was saved there'}"
            ) from error

    @classmethod
    def create_from_checkpoint(
        cls,
        path: PathLike,
        *,
        exclude_keys: Iterable[str] | None = None,
        include_keys: Iterable[str] | None = None,
        load_optimizer: bool = True,
        overrides: Mapping[str, Any] | None = None,
        registry: Registry | PathLike | None = None,
        **kwargs: Any,
    ) -> DiffusionPolicyWorkspace:
        """A run as a checkpoint of one says, with its state.

        Args:
            load_optimizer: False begins with a new optimizer and a new learning-rate schedule.
            overrides: keys of the configuration that are to be others, by dotted path. Where the run wrote and pushed
                is not taken over: `output_dir`, `registry.push` and the like are given here anew.
            kwargs: further arguments of the class.

        Raises:
            CheckpointError: it says nothing of how its network was made.
            Incompatible, InvalidInput, NotFound
        """
        checkpoint = read_checkpoint(path, registry)
        workspace = cls(config_of(checkpoint, overrides or {}), registry=registry, **kwargs)
        workspace.load_payload(
            checkpoint, load_optimizer=load_optimizer, exclude_keys=exclude_keys, include_keys=include_keys
        )
        return workspace


def _hydra_folder() -> Path | None:
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir) if HydraConfig.initialized() else None
