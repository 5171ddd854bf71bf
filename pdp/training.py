"""The training loop. What it does at a step is a function of the configuration, the data, the step's number and the
state that a checkpoint holds, so that a run that stops and goes on is, on the CPU, bit for bit the run that never
stopped."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pdp.checkpoints import Checkpoint
from pdp.data import DatasetError, SequenceDataset
from pdp.errors import ConfigError, TrainingDiverged
from pdp.loading import say
from pdp.normalizer import LinearNormalizer
from pdp.policy import DiffusionPolicy
from pdp.random_state import fit_random_state, random_state, restore_random_state
from pdp.reporting import MetricsFile, progress_bar
from pdp.sampler import ResumableSampler
from pdp.training_state import check_count, fit_scheduler

with warnings.catch_warnings():
    # diffusers looks for optional packages on import, and some of them warn.
    warnings.simplefilter("ignore")
    from diffusers.optimization import SchedulerType, get_scheduler

from registry.core.errors import Incompatible, InvalidInput
from registry.core.reference import shown

_NAME = re.compile(r"[\w.+-]{1,100}")

if TYPE_CHECKING:
    from pdp.workspace import DiffusionPolicyWorkspace


class Trainer:
    """Trains a workspace's policy.

    Attributes:
        scheduler: of the learning rate; None until the data say how long training is.
    """

    def __init__(self, workspace: DiffusionPolicyWorkspace) -> None:
        self.workspace = workspace
        self.scheduler: Any = None
        self._data: SequenceDataset | None = None
        self._held_out: SequenceDataset | None = None
        self._loader: DataLoader[Any] | None = None
        self._sampler: ResumableSampler | None = None
        self._restored: dict[str, Any] = {}
        self._within_step = False
        self._loss_sum, self._loss_count = 0.0, 0

    @property
    def trained_on(self) -> dict[str, str]:
        """`task` and `world` as the recipe of the data names them; empty until the data are open. What is no name is
        left out: a recipe may say anything, and a push at the end must not fail for it."""
        recipe = {} if self._data is None else self._data.recipe
        said = {key: recipe.get(key) for key in ("task", "world")}
        return {key: value for key, value in said.items() if isinstance(value, str) and _NAME.fullmatch(value)}

    # ------------------------------------------------------------ what a checkpoint holds of it

    def scheduler_state(self) -> Any:
        """The learning-rate schedule's state dict; None where there is none yet."""
        return self.scheduler.state_dict() if self.scheduler is not None else self._restored.get("scheduler")

    def rng_state(self) -> Any:
        """The state of the random generators that training goes on with: of a checkpoint that was loaded and not gone
        on with yet, its own."""
        return self._restored["rng"] if "rng" in self._restored else random_state()

    def refuse_broken(self) -> None:
        """
        Raises:
            InvalidInput: training was interrupted in the middle of a step; or a parameter is not finite.
        """
        if self._within_step:
            raise InvalidInput(
                f"training was interrupted within step {self.workspace.global_step}, so its state is of no step; go "
                "on from the last checkpoint: load_checkpoint()"
            )
        for name, parameter in self.workspace.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise self._diverged(f"{name} has values that are not finite")

    def state(self) -> dict[str, Any]:
        """What the order of data and the mean loss of the epoch go on from."""
        found: dict[str, Any] = {"epoch_loss": {"sum": self._loss_sum, "count": self._loss_count}}
        if self._data is not None and self._sampler is not None:
            loader = self.workspace.cfg.dataloader
            found["data_order"] = {
                "fingerprint": self._data.fingerprint,
                "windows": len(self._data),
                "batch_size": loader.batch_size,
                "shuffle": loader.shuffle,
                "drop_last": loader.drop_last,
                "seed": self.workspace.cfg.training.seed,
                "batches": len(self._sampler),
            }
        elif "data_order" in self._restored:
            found["data_order"] = self._restored["data_order"]
        return found

    def fit(self, checkpoint: Checkpoint, wanted: set[str]) -> Callable[[], None]:
        """Reads what the next `run` is to go on from.

        Returns:
            A function that takes it over.

        Raises:
            InvalidInput: it is of another form.
        """
        found: dict[str, Any] = {"what": checkpoint.what}
        for key in ("scheduler", "rng"):
            if key in wanted and key in checkpoint.roles:
                found[key] = checkpoint.state(key)
        if "data_order" in checkpoint.training:
            found["data_order"] = checkpoint.training["data_order"]
        so_far = checkpoint.training.get("epoch_loss", {"sum": 0.0, "count": 0})
        try:
            total, count = float(so_far["sum"]), check_count(so_far["count"], "epoch_loss", checkpoint.what)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidInput(
                f"{checkpoint.what}: epoch_loss is {shown(repr(so_far))}; expected sum and count"
            ) from error

        self._check_plan(found, checkpoint.what)

        def take() -> None:
            if "scheduler" not in wanted and "scheduler" not in found:
                found["scheduler"] = self.scheduler_state()  # it stays as it is
            self._restored, self.scheduler = found, None
            self._loss_sum, self._loss_count = total, count
            self._within_step = False

        return take

    def _check_plan(self, found: dict[str, Any], what: str) -> None:
        """Looks at the states of the schedule and of the generators before anything is taken over."""
        if "rng" in found:
            fit_random_state(found["rng"], what)
        if "scheduler" in found:
            # A schedule like the one that will be planned, on parameters of its own.
            groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in self.workspace.optimizer.param_groups]
            trial = self._schedule(torch.optim.AdamW(groups, lr=1.0), self.workspace.cfg.training.lr_warmup_steps + 10)
            try:
                fit_scheduler(trial, found["scheduler"], what)
            except Incompatible as refusal:
                say(f"{refusal}; the learning-rate schedule begins anew")
                del found["scheduler"]

    # ------------------------------------------------------------ preparation

    def plan(self) -> int:
        """Opens the data, and plans the learning rates.

        Returns:
            Gradient steps of the whole training.

        Raises:
            DatasetError, ConfigError: data of other sizes than the network's.
        """
        if self._loader is None:
            self._open_data()
        self._check_same_data()
        if self.scheduler is None:
            self._plan_rates()
        return self.planned_steps

    def _open_data(self) -> None:
        cfg, workspace = self.workspace.cfg, self.workspace
        policy = workspace.policy
        if "dataset" not in cfg or "path" not in cfg.dataset or cfg.dataset.get("path") is None:
            raise ConfigError(
                "dataset.path is not set; give a zarr folder or HDF5 file with obs, action and episode_ends"
            )
        data = self._dataset("train")
        if (world := cfg.dataset.world) is not None and data.recipe.get("world") != world:
            recorded = data.recipe.get("world")
            raise DatasetError(
                f"{cfg.dataset.path} is of {'no world' if recorded is None else f'the world {shown(repr(recorded))}'}, "
                f"as its recipe says; dataset.world is {shown(repr(world))}: give the data of that world"
            )
        for key, here, there in (
            ("obs_dim", data.obs_dim, policy.obs_dim),
            ("action_dim (output_dim)", data.action_dim, policy.action_dim),
        ):
            if here != there:
                raise ConfigError(
                    f"{key}: the data set {cfg.dataset.path} has {here}, policy.model {there}; make the two equal"
                )
        if not policy.normalizer.is_fitted:
            normalizer = LinearNormalizer()
            normalizer.fit(data.tensors())
            policy.set_normalizer(normalizer)
        loader = cfg.dataloader
        self._sampler = ResumableSampler(
            len(data),
            batch_size=loader.batch_size,
            seed=cfg.training.seed,
            shuffle=loader.shuffle,
            drop_last=loader.drop_last,
        )
        if not len(self._sampler):
            raise ConfigError(
                f"dataloader.batch_size is {loader.batch_size} with drop_last, the data set has {len(data)} windows: "
                "there is no batch"
            )
        self._loader = self._make_loader(data, loader, self._sampler)
        self._data = data
        if cfg.dataset.val_ratio:
            held_out = self._dataset("val")
            section = cfg.val_dataloader
            if len(held_out) and section.drop_last and len(held_out) < section.batch_size:
                raise ConfigError(
                    f"val_dataloader.batch_size is {section.batch_size} with drop_last, and there are {len(held_out)} "
                    "windows for validation: there is no batch"
                )
            self._held_out = held_out if len(held_out) else None
        if workspace.topk.k and workspace.rollout is None:
            workspace.topk.check(("train_loss", *(("val_loss",) if self._held_out else ()), "epoch", "global_step"))

    def _dataset(self, split: str) -> SequenceDataset:
        section, policy = self.workspace.cfg.dataset, self.workspace.policy
        return SequenceDataset(
            section.path, policy.T_obs, policy.T_action, split=split, val_ratio=section.val_ratio, seed=section.seed
        )

    def _make_loader(self, data: SequenceDataset, section: Any, sampler: ResumableSampler) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_sampler=sampler,
            num_workers=section.num_workers,
            pin_memory=section.pin_memory and self.workspace.device.type == "cuda",
            persistent_workers=section.persistent_workers and section.num_workers > 0,
            # Its own: each pass of a loader draws a seed for workers, and the global generators are the training's.
            generator=torch.Generator().manual_seed(self.workspace.cfg.training.seed),
        )

    def _check_same_data(self) -> None:
        before, now = self._restored.pop("data_order", None), self.state().get("data_order")
        if isinstance(before, Mapping) and now is not None and dict(before) != now:
            changed = [
                f"{key}: {before.get(key)} before, {value} now"
                for key, value in now.items()
                if before.get(key) != value
            ]
            say(f"training does not go on exactly as it was in {self._restored['what']}: {'; '.join(changed)}")

    @property
    def batches(self) -> int:
        """Steps of one epoch."""
        assert self._sampler is not None
        return len(self._sampler)

    @property
    def planned_steps(self) -> int:
        """Gradient steps of the whole training."""
        training = self.workspace.cfg.training
        return int(training.max_steps or training.num_epochs * self.batches)

    def _plan_rates(self) -> None:
        training, optimizer = self.workspace.cfg.training, self.workspace.optimizer
        known = [one.value for one in SchedulerType if one.value != "piecewise_constant"]
        if training.lr_scheduler not in known:
            raise ConfigError(f"training.lr_scheduler is {training.lr_scheduler!r}; expected one of {', '.join(known)}")
        restored = self._restored.pop("scheduler", None)
        if restored is None and self.workspace.global_step:
            say("the checkpoint holds no state of the learning-rate schedule; it begins anew")
        # A schedule starts at the optimizer's present rate, so that is the configured one for a moment.
        for group in optimizer.param_groups:
            group["lr"] = self.workspace.cfg.optimizer.lr
            group.pop("initial_lr", None)
        self.scheduler = self._schedule(optimizer, self.planned_steps)
        if restored is not None:
            self.scheduler.load_state_dict(restored)
            for group, rate in zip(optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
            configured, its = self.workspace.cfg.optimizer.lr, self.scheduler.base_lrs[0]
            if configured != its:
                say(
                    f"optimizer.lr is {configured}, and the schedule that training goes on with has {its}; it keeps "
                    "its own"
                )

    def _schedule(self, optimizer: Any, steps: int) -> Any:
        training = self.workspace.cfg.training
        try:
            made = get_scheduler(
                training.lr_scheduler,
                optimizer=optimizer,
                num_warmup_steps=training.lr_warmup_steps,
                num_training_steps=steps,
            )
            for step in {0, 1, training.lr_warmup_steps, steps - 1, steps, steps + 1}:
                made.lr_lambdas[0](max(step, 0))
        except (ArithmeticError, ValueError) as error:
            raise ConfigError(
                f"training.lr_scheduler {training.lr_scheduler!r} does not go with optimizer.lr "
                f"{self.workspace.cfg.optimizer.lr}, training.lr_warmup_steps {training.lr_warmup_steps} and {steps} "
                f"steps: {error}"
            ) from error
        return made

    # ------------------------------------------------------------ the loop

    def run(self, until_step: int | None = None) -> dict[str, float]:
        """See `DiffusionPolicyWorkspace.run`."""
        workspace, cfg = self.workspace, self.workspace.cfg
        workspace.saver.join()
        self.refuse_broken()
        self._resume_where_asked()
        if cfg.training.rollout_every and workspace.rollout is None:
            say("training.rollout_every is set, and no rollout= was given; there are no rollouts")
        planned = self.plan()
        end = planned if until_step is None else min(until_step, planned)
        rng = self._restored.pop("rng", None)
        if rng is not None:
            restore_random_state(rng, self._restored.get("what", "the checkpoint"))
        workspace.policy.train()
        saved_at: int | None = None
        with ExitStack() as stack:
            stack.callback(workspace.saver.join)
            log = stack.enter_context(
                MetricsFile(workspace.output_dir / cfg.logging.metrics_file, workspace.global_step)
            )
            show = stack.enter_context(progress_bar(end, workspace.global_step, on=cfg.logging.progress))
            while workspace.global_step < end:
                for batch in self._batches():
                    values = self._step(batch)
                    workspace.global_step += 1
                    self._within_step = False
                    if workspace.global_step % cfg.logging.log_every == 0:
                        log.write({**values, "global_step": workspace.global_step, "epoch": workspace.epoch})
                    show(workspace.global_step, values["train_loss"])
                    if workspace.global_step >= end:
                        break
                if workspace.global_step % self.batches == 0:
                    saved_at = self._end_of_epoch(log)
            if saved_at != workspace.global_step:
                workspace.save_checkpoint(use_thread=False)
        if workspace.global_step >= planned:
            self._push()
        return dict(workspace.metrics)

    def _resume_where_asked(self) -> None:
        workspace, resume = self.workspace, self.workspace.cfg.training.resume
        if not resume or workspace.global_step:
            return
        if resume is not True:
            workspace.load_checkpoint(str(resume))
        elif os.path.exists(workspace.get_checkpoint_path()):
            workspace.load_checkpoint()

    def _batches(self) -> Iterator[Mapping[str, Tensor]]:
        """The rest of this epoch's batches."""
        assert self._sampler is not None
        assert self._loader is not None
        workspace = self.workspace
        workspace.epoch, batch = divmod(workspace.global_step, self.batches)
        self._sampler.set_position(workspace.epoch, batch)
        yield from self._loader

    def _step(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        workspace, training = self.workspace, self.workspace.cfg.training
        moved = {key: tensor.to(workspace.device, non_blocking=True) for key, tensor in batch.items()}
        with self._autocast():
            loss = workspace.policy.compute_loss(moved)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value}")
        workspace.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        trained = [one for group in workspace.optimizer.param_groups for one in group["params"]]
        limit = math.inf if training.max_grad_norm is None else training.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(trained, limit))
        if not math.isfinite(norm):
            raise self._diverged(f"the norm of the gradient is {norm}")
        self._within_step = True
        workspace.optimizer.step()
        rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        if workspace.ema is not None:
            workspace.ema.step(workspace.policy.model)
        self._loss_sum, self._loss_count = self._loss_sum + value, self._loss_count + 1
        workspace.metrics["train_loss"] = value
        return {"train_loss": value, "lr": rate, "grad_norm": norm}

    def _autocast(self) -> Any:
        on = self.workspace.device.type == "cuda" and self.workspace.cfg.training.bf16
        return torch.autocast(self.workspace.device.type, dtype=torch.bfloat16, enabled=on)

    def _diverged(self, why: str) -> TrainingDiverged:
        workspace = self.workspace
        latest = workspace.get_checkpoint_path()
        kept = f"the last good checkpoint is {latest}" if os.path.exists(latest) else "no checkpoint was saved before"
        return TrainingDiverged(
            f"{why} at step {workspace.global_step} (epoch {workspace.epoch}): training stopped, nothing of it was "
            f"saved, and {kept}. Lower optimizer.lr, or look for what the data holds there",
            workspace.global_step,
        )

    # ------------------------------------------------------------ at the end of an epoch

    def _end_of_epoch(self, log: MetricsFile) -> int | None:
        """Evaluates and saves where it is due; the step that was saved."""
        workspace, training = self.workspace, self.workspace.cfg.training
        done = workspace.global_step // self.batches
        workspace.epoch = done
        found = {"train_loss": self._loss_sum / max(self._loss_count, 1)}
        self._loss_sum, self._loss_count = 0.0, 0
        if _is_due(training.val_every, done) and self._held_out is not None:
            found["val_loss"] = self._validate(self._held_out)
            if not math.isfinite(found["val_loss"]):
                raise self._diverged(f"the validation loss is {found['val_loss']}")
        if _is_due(training.rollout_every, done) and workspace.rollout is not None:
            with self._evaluating() as policy:
                found |= {str(key): float(value) for key, value in workspace.rollout(policy).items()}
        workspace.metrics |= found
        log.write({**found, "global_step": workspace.global_step, "epoch": done, "end_of_epoch": True})
        if not _is_due(training.save_checkpoint_every, done):
            return None
        workspace.saver.join()
        counts = {"epoch": done, "global_step": workspace.global_step}
        best = None
        if workspace.topk.monitor_key in found:  # an epoch without the metric is not compared by an older value
            best = workspace.topk.get_ckpt_path({**workspace.metrics, **counts})
        if best is not None:
            workspace.save_checkpoint(best, use_thread=False)
            workspace.topk.prune()
        workspace.save_checkpoint()
        return workspace.global_step

    def _acting(self) -> DiffusionPolicy:
        """The policy that is evaluated: of the averaged weights, where there are any."""
        workspace = self.workspace
        if workspace.ema is None:
            return workspace.policy
        acting = DiffusionPolicy(
            workspace.ema.averaged_model, workspace.policy.noise_scheduler, workspace.policy.num_inference_steps
        )
        acting.set_normalizer(workspace.policy.normalizer)
        return acting

    @contextmanager
    def _evaluating(self) -> Iterator[DiffusionPolicy]:
        """The policy to evaluate, in eval mode. Whatever is drawn within, and whatever mode it is left in, training
        goes on as if nothing had been."""
        policy = self._acting()
        modes = [(module, module.training) for module in policy.modules()]
        before = random_state()
        policy.eval()
        try:
            yield policy
        finally:
            for module, mode in modes:
                module.training = mode
            restore_random_state(before, "the training")

    @torch.no_grad()
    def _validate(self, data: SequenceDataset) -> float:
        """Mean loss over the validation episodes, with the same noise each time."""
        section = self.workspace.cfg.val_dataloader
        sampler = ResumableSampler(
            len(data), batch_size=section.batch_size, seed=0, shuffle=section.shuffle, drop_last=section.drop_last
        )
        total, count = 0.0, 0
        with self._evaluating() as policy:
            torch.manual_seed(self.workspace.cfg.training.seed)
            for batch in self._make_loader(data, section, sampler):
                moved = {key: tensor.to(self.workspace.device) for key, tensor in batch.items()}
                with self._autocast():
                    total += float(policy.compute_loss(moved)) * len(moved["obs"])
                count += len(moved["obs"])
        return total / count

    def _push(self) -> None:
        workspace, section = self.workspace, self.workspace.cfg.registry
        if section.push is not None:
            workspace.pushed.append(workspace.save_checkpoint(section.push, use_thread=False))
        if section.push_policy is not None:
            workspace.pushed.append(workspace.save_policy(section.push_policy))
        if section.push_adapter is not None:
            workspace.pushed.append(workspace.save_adapter(section.push_adapter))


def _is_due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0
