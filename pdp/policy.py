"""The policy around a network: noise in, actions out. Schedulers are diffusers' own; observations and actions are
normalised on the way in and back on the way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdp.normalizer import LinearNormalizer
from registry.core.errors import InvalidInput
from registry.core.reference import shown

if TYPE_CHECKING:
    from pdp.lora_building import RegistryLike, Source

PREDICTIONS = ("epsilon", "sample")


class DiffusionPolicy(nn.Module):
    """Predicts a stretch of actions from the last observations, by denoising.

    Args:
        model: a QKVTransformerForDiffusion, a LoraTransformerForDiffusion, or a network of the same form:
            `forward(sample, timestep, cond)`, with obs_dim, input_dim, output_dim, T_obs and T_action.
        noise_scheduler: diffusers' DDPMScheduler or DDIMScheduler, with the prediction type `epsilon` or `sample`.
        num_inference_steps: denoising steps of `predict_action`; all of the scheduler's by default.

    Attributes:
        T_range: steps of one training window, T_obs + T_action - 1: the first action belongs to the last observation.

    Raises:
        InvalidInput: another prediction type, or a network that conditions on past actions.
    """

    def __init__(self, model: nn.Module, noise_scheduler: Any, num_inference_steps: int | None = None) -> None:
        super().__init__()
        prediction = noise_scheduler.config.prediction_type
        if prediction not in PREDICTIONS:
            raise InvalidInput(
                f"prediction_type is {shown(repr(prediction))}; expected one of {', '.join(PREDICTIONS)}"
            )
        if getattr(model, "past_action_visible", False):
            raise InvalidInput(
                "past_action_visible=True: this policy does not condition on past actions; set it to False"
            )
        steps = noise_scheduler.config.num_train_timesteps
        whole = num_inference_steps is None or type(num_inference_steps) is int
        if not whole or (num_inference_steps is not None and not 1 <= num_inference_steps <= steps):
            raise InvalidInput(
                f"num_inference_steps is {num_inference_steps!r}; expected 1 to {steps}, the training steps"
            )
        self.model = model
        self.noise_scheduler = noise_scheduler
        self.num_inference_steps = num_inference_steps or steps
        self.normalizer = LinearNormalizer()
        self.flags_without_adapter: list[tuple[nn.Parameter, bool]] | None = None
        """Of the network before `load_adapter`: which parameters train; None without an adapter."""
        network: Any = model
        self.obs_dim, self.action_dim = int(network.obs_dim), int(network.output_dim)
        self.T_obs, self.T_action = int(network.T_obs), int(network.T_action)
        self.T_range = self.T_obs + self.T_action - 1

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint_path: Source,
        base_model_path: Source | None = None,
        *,
        use_ema: bool | None = None,
        registry: RegistryLike = None,
        **options: Any,
    ) -> DiffusionPolicy:
        """A policy of a workspace's checkpoint, ready to act: network, LoRA, normaliser and noise scheduler.

        Args:
            base_model_path: of an adapter alone: the checkpoint that it was trained from, which has all the rest.
            use_ema: take the moving average of the weights; None: where there is one.
            options: `classes` as for `LoraTransformerForDiffusion.from_checkpoint`, `num_inference_steps`.

        Raises:
            CheckpointError: the checkpoint has no normaliser or no noise scheduler.
        """
        from pdp.policy_loading import load_policy

        return load_policy(cls, checkpoint_path, base_model_path, use_ema=use_ema, registry=registry, **options)

    def load_adapter(self, path: Source, *, use_ema: bool | None = None, registry: RegistryLike = None) -> None:
        """Acts with an adapter from now on, also between two control steps of a roll-out: puts it on the network, in
        the place of the adapter that is there. The network's own weights stay.

        For a policy that acts: the network of a run in training, or one that two policies share, is not to be changed
        under them.

        Args:
            path: file or `registry://` URL of an adapter on this network.
            use_ema: take the moving average of the adapter's weights; None: where there is one.

        Raises:
            Incompatible: it was trained on another network; of a version, and of a checkpoint with the network within,
                also on other weights. The policy is as it was.
            CheckpointError: there is no adapter in it. InvalidInput, NotFound, StorageError
        """
        from pdp.switching import put_adapter

        put_adapter(self, path, use_ema=use_ema, registry=registry)

    def unload_adapter(self) -> None:
        """Takes the adapter off: acts as the base from now on, bit for bit.

        Raises:
            InvalidInput: there is none.
        """
        from pdp.switching import take_adapter_off

        take_adapter_off(self)

    def set_normalizer(self, normalizer: LinearNormalizer) -> None:
        """Takes a copy of a normaliser that was fitted on `obs` and `action`.

        Raises:
            InvalidInput: it is not, or on other sizes than the network's.
        """
        self._check_normalizer(normalizer)
        self.normalizer.load_state_dict(normalizer.state_dict())
        self.normalizer.to(next(self.model.parameters()).device)

    def fit_normalizer_state(self, state: Mapping[str, Tensor], what: str) -> Callable[[], None]:
        """Looks whether a normaliser's state is of this network.

        Args:
            what: names where it comes from.

        Returns:
            A function that takes it.

        Raises:
            InvalidInput: it is not.
        """
        made = LinearNormalizer()
        try:
            made.load_state_dict(dict(state))
            self._check_normalizer(made)
        except (InvalidInput, RuntimeError) as error:
            raise InvalidInput(f"the normaliser of {what}: {error}") from error
        return lambda: self.set_normalizer(made)

    def _check_normalizer(self, normalizer: LinearNormalizer) -> None:
        if not normalizer.is_fitted:
            raise InvalidInput("the normaliser is not fitted; call fit({'obs': ..., 'action': ...}) first")
        for key, size in (("obs", self.obs_dim), ("action", self.action_dim)):
            scale = normalizer.state_dict().get(f"params_dict.{key}.scale")
            found = None if scale is None else scale.numel()
            if found != size:
                raise InvalidInput(
                    f"the normaliser's {key} has {'no' if found is None else found} dimensions, the network {size}: "
                    "fit it on the data of this network"
                )

    def compute_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean squared error of one random denoising step for each sample.

        Args:
            batch: `obs` (B, T_obs, obs_dim) and `action` (B, T_action, action_dim), not normalised, tensors on
                any device or arrays.

        Returns:
            A 0-d tensor. Noise and steps come from torch's global generator of the device.

        Raises:
            InvalidInput: a key is missing or of another shape, or the normaliser is not fitted.
        """
        given = self._check(batch, {"obs": (self.T_obs, self.obs_dim), "action": (self.T_action, self.action_dim)})
        device = next(self.model.parameters()).device
        normal = self.normalizer.normalize({key: one.to(device) for key, one in given.items()})
        clean = normal["action"]
        noise = torch.randn_like(clean)
        steps = torch.randint(0, self.noise_scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        noisy = self.noise_scheduler.add_noise(clean, noise, steps)
        predicted = self.model(noisy, steps, normal["obs"])
        target = noise if self.noise_scheduler.config.prediction_type == "epsilon" else clean
        return F.mse_loss(predicted.float(), target.float())

    @torch.no_grad()
    def predict_action(
        self, obs_dict: Mapping[str, Any], *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Denoises actions for the last observations.

        Args:
            obs_dict: `obs` (B, T_obs, obs_dim), not normalised, a tensor on any device or an array.
            generator: of the noise, on the network's device; torch's global one by default.

        Returns:
            `action` (B, T_action, action_dim) in the data's own units, on the network's device.

        Raises:
            InvalidInput: `obs` is missing, of another shape, or not finite (looked at on the CPU alone), or the
                normaliser is not fitted.
        """
        given = self._check(obs_dict, {"obs": (self.T_obs, self.obs_dim)})["obs"]
        # On a GPU, to look would be to wait.
        if given.device.type == "cpu" and bool((bad := ~given.float().isfinite().flatten(1).all(dim=1)).any()):
            raise InvalidInput(
                f"obs: row {int(bad.nonzero()[0])} of the batch has values that are not finite, or too large for "
                "float32; a policy cannot act on them"
            )
        parameter = next(self.model.parameters())
        obs = self.normalizer.normalize({"obs": given.to(parameter.device)})["obs"].to(parameter.dtype)
        shape = (len(obs), self.T_action, self.action_dim)
        sample = torch.randn(shape, generator=generator, device=obs.device, dtype=obs.dtype)
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for step in self.noise_scheduler.timesteps:
            predicted = self.model(sample, step, obs)
            sample = self.noise_scheduler.step(predicted, step, sample, generator=generator).prev_sample
        return {"action": self.normalizer.unnormalize({"action": sample.float()})["action"]}

    def _check(self, given: Mapping[str, Any], expected: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """What is expected of it, as tensors."""
        if not self.normalizer.is_fitted:
            raise InvalidInput("the policy has no normaliser yet; call set_normalizer with one that is fitted")
        found = {}
        for key, sizes in expected.items():
            if key not in given:
                raise InvalidInput(f"{key} is missing; found {', '.join(map(str, given)) or 'nothing'}")
            value = given[key]
            if not isinstance(value, Tensor | numpy.ndarray):
                raise InvalidInput(f"{key}: expected a tensor or an array, found a {type(value).__name__}")
            try:
                tensor = found[key] = torch.as_tensor(value)
            except TypeError as error:
                raise InvalidInput(f"{key}: expected numbers, found an array of {value.dtype}") from error
            if tensor.dim() != 3 or tuple(tensor.shape[1:]) != sizes:
                raise InvalidInput(f"{key}: expected (B, {sizes[0]}, {sizes[1]}), found {tuple(tensor.shape)}")
        return found
