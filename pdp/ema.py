"""The moving average of a network's weights, as diffusion policies are evaluated with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pdp.training_state import check_count, is_number, told
from registry.core.errors import InvalidInput

_MEND = "load with exclude_keys=['ema_model'] to begin a new average"


class EMAModel:
    """Exponential moving average of a model: the decay grows with the steps, to `max_value`.

    Decay after n steps: `1 - (1 + n / inv_gamma) ** -power`, within `min_value` and `max_value`, with n the steps after
    `update_after_step`. For training of a million steps a power of 2/3 is good, for less 3/4.

    Args:
        model: copied; the copy is in eval mode and does not train.
        update_after_step: steps in which the average is just the model.

    Attributes:
        averaged_model: the copy.
        optimization_step: steps that were made.
        decay: of the last step.

    Raises:
        InvalidInput: a number outside its range.

    Source: diffusers' EMAModel, and its use in Chi et al. 2023, Diffusion Policy.
    """

    def __init__(
        self,
        model: nn.Module,
        update_after_step: int = 0,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        max_value: float = 0.9999,
    ) -> None:
        if not 0 <= min_value <= max_value <= 1:
            raise InvalidInput(f"min_value {min_value} and max_value {max_value}: expected 0 <= min <= max <= 1")
        if inv_gamma <= 0 or power <= 0 or update_after_step < 0:
            raise InvalidInput(
                f"inv_gamma {inv_gamma}, power {power}, update_after_step {update_after_step}: expected positive ones, "
                "and a step from 0"
            )
        self.averaged_model = copy.deepcopy(model).eval().requires_grad_(False)
        self.update_after_step = update_after_step
        self.inv_gamma = inv_gamma
        self.power = power
        self.min_value = min_value
        self.max_value = max_value
        self.decay = 0.0
        self.optimization_step = 0

    def get_decay(self, optimization_step: int) -> float:
        """The decay of a step; the first is 0."""
        step = optimization_step - self.update_after_step - 1
        if step <= 0:
            return 0.0
        value: float = 1 - (1 + step / self.inv_gamma) ** -self.power
        return max(self.min_value, min(value, self.max_value))

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Takes in the model after a step of training. What does not train, batch norms and buffers are copied.

        Raises:
            InvalidInput: a model of another form; nothing is changed.
        """
        copied = {id(one) for module in model.modules() if _is_batch_norm(module) for one in module.parameters()}
        averages = dict(self.averaged_model.named_parameters())
        parameters = dict(model.named_parameters())
        if averages.keys() != parameters.keys():
            odd = sorted(averages.keys() ^ parameters.keys())[0]
            raise InvalidInput(
                f"the model has other parameters than the average, {odd} first; make a new EMAModel of it"
            )
        buffers, kept = dict(model.named_buffers()), dict(self.averaged_model.named_buffers())
        if kept.keys() != buffers.keys():
            odd = sorted(kept.keys() ^ buffers.keys())[0]
            raise InvalidInput(f"the model has other buffers than the average, {odd} first; make a new EMAModel of it")
        for name, average in (*averages.items(), *kept.items()):
            found = (parameters if name in averages else buffers)[name]
            if average.shape != found.shape:
                raise InvalidInput(
                    f"{name}: the average has the form {tuple(average.shape)}, the model {tuple(found.shape)}; make a "
                    "new EMAModel of it"
                )
        self.decay = self.get_decay(self.optimization_step)
        for name, parameter in parameters.items():
            average = averages[name]
            if parameter.requires_grad and id(parameter) not in copied:
                average.mul_(self.decay).add_(parameter.to(average.dtype), alpha=1 - self.decay)
            else:
                average.copy_(parameter)
        for name, buffer in kept.items():
            buffer.copy_(buffers[name])
        self.optimization_step += 1

    def state_dict(self) -> dict[str, Any]:
        """The counters; the weights are the averaged model's own."""
        return {"decay": self.decay, "optimization_step": self.optimization_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the counters.

        Raises:
            InvalidInput: they are not there, or no numbers within their range; nothing is changed.
        """
        self.fit_state(state, "the state of the moving average")()

    def fit_state(self, state: Any, what: str) -> Callable[[], None]:
        """Looks at counters.

        Args:
            what: names the checkpoint.

        Returns:
            A function that takes them over; until it is called, nothing is changed.

        Raises:
            InvalidInput: they are not there, or no numbers within their range.
        """
        if not isinstance(state, Mapping) or not {"decay", "optimization_step"} <= set(state):
            raise InvalidInput(
                f"{what}: counters of a moving average: expected numbers decay and optimization_step, found "
                f"{told(state)}; {_MEND}"
            )
        decay = state["decay"]
        if isinstance(decay, Tensor) and decay.dim() == 0 and not decay.is_meta:
            decay = decay.item()
        if not is_number(decay) or not 0 <= decay <= 1:
            raise InvalidInput(
                f"{what}: decay of the moving average is {told(state['decay'])}; expected a number from 0 to 1; {_MEND}"
            )
        decay, steps = float(decay), check_count(state["optimization_step"], "optimization_step", what)

        def take() -> None:
            self.decay, self.optimization_step = decay, steps

        return take


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
