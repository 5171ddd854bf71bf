"""A policy that acts: it predicts actions for all environments at once, carries out the first few, and looks again. The
same policy, seed and simulation give the same bits on the CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from pdp.errors import ActionNotFinite
from pdp.policy import DiffusionPolicy
from pdp.simulation import INTERVAL, RESERVED, Simulation
from registry.core.annotations import check_key
from registry.core.errors import Incompatible, InvalidInput
from registry.core.reference import shown


@dataclass(frozen=True)
class Rollout:
    """What came of an episode in each environment.

    Attributes:
        worlds: of each of the B environments.
        measures: (B,) by name, as the simulation has them.
        steps: control steps.
        seconds: that it took.
    """

    worlds: tuple[str, ...]
    measures: Mapping[str, Any]
    steps: int
    seconds: float

    def of_world(self, world: str) -> dict[str, Any]:
        """The measures of the environments in one world."""
        rows = [row for row, name in enumerate(self.worlds) if name == world]
        return {name: values[rows] for name, values in self.measures.items()}


def roll_out(
    policy: DiffusionPolicy,
    simulation: Simulation,
    *,
    steps: int,
    execute: int = 1,
    seed: int = 0,
    watch: Callable[[int], None] | None = None,
) -> Rollout:
    """Rolls a policy out in all environments of a simulation at once.

    Args:
        steps: control steps of the episode.
        execute: actions of each prediction that are carried out before the next, from 1 to the policy's T_action.
        seed: of the starts and of the noise that actions are made from.
        watch: called before each control step with its number, from 0. What it does to the policy (another adapter)
            holds from the next prediction on.

    Raises:
        ActionNotFinite: says when and where.
        SimulationDiverged: the same.
        Incompatible: a policy of other observations or actions than the simulation's.
        InvalidInput: `steps` or `execute` out of range; observations or measures of another form than the simulation
            says.
    """
    _check(policy, simulation, steps, execute)
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()  # no dropout while it acts
    try:
        return _roll_out(policy, simulation, steps, execute, seed, watch)
    finally:
        for module, mode in modes:
            module.training = mode


def _roll_out(
    policy: DiffusionPolicy,
    simulation: Simulation,
    steps: int,
    execute: int,
    seed: int,
    watch: Callable[[int], None] | None,
) -> Rollout:
    began = time.perf_counter()
    device = next(policy.model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    obs = _observed(simulation, simulation.reset(seed), "reset")
    checked_measures(simulation)  # not only when all is done
    seen = [obs] * policy.T_obs
    planned: Any = None
    for step in range(steps):
        if watch is not None:
            watch(step)
        place = step % execute
        if place == 0:
            stack = torch.from_numpy(numpy.stack(seen, axis=1))
            planned = policy.predict_action({"obs": stack}, generator=generator)["action"].cpu().numpy()
        action = planned[:, place].astype(numpy.float64)
        bad = ~numpy.isfinite(action).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            raise ActionNotFinite(
                f"the policy's action is not finite at control step {step + 1} of {steps}, in {int(bad.sum())} of "
                f"{len(action)} environments, the first of them {row} (world {simulation.worlds[row]}); look for "
                "NaN in the version's tensors: registry show names them",
                step=step + 1,
                environment=row,
            )
        obs = _observed(simulation, simulation.step(action), "step")
        seen = [*seen[1:], obs]
    return Rollout(tuple(simulation.worlds), checked_measures(simulation), steps, time.perf_counter() - began)


def _observed(simulation: Simulation, found: Any, who: str) -> Any:
    """A copy, as a simulation may use its buffer again."""
    expected = (len(simulation.worlds), simulation.obs_dim)
    try:
        obs = numpy.array(found, dtype=numpy.float32)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{who}() of the simulation gave no observations: {shown(str(error), 200)}") from error
    if obs.shape != expected:
        raise InvalidInput(f"{who}() of the simulation gave observations of the form {obs.shape}; expected {expected}")
    return obs


def checked_measures(simulation: Simulation) -> dict[str, Any]:
    """The measures of a simulation, each (B,) float64.

    Raises:
        InvalidInput: one of another form, that is not finite, or with a name that the registry does not take.
    """
    found = simulation.measures()
    if not isinstance(found, Mapping):
        raise InvalidInput(f"measures() of the simulation gave a {type(found).__name__}; expected arrays by name")
    expected = (len(simulation.worlds),)
    checked = {}
    for name, values in found.items():
        check_key(name, "measure")
        if name in RESERVED or name.endswith(INTERVAL):
            raise InvalidInput(f"the measure {name} has a name that is noted for something else; give it another")
        array = numpy.asarray(values)
        if array.shape != expected or array.dtype.kind not in "fiub":
            raise InvalidInput(
                f"the measure {name} is of the form {array.shape} ({array.dtype}); expected numbers, {expected}"
            )
        checked[name] = array.astype(numpy.float64)
        if not numpy.isfinite(checked[name]).all():
            row = int((~numpy.isfinite(checked[name])).argmax())
            raise InvalidInput(f"the measure {name} of environment {row} is {array[row]}; expected finite numbers")
    return checked


def mean_and_interval(values: Any) -> tuple[float, float]:
    """Mean, and half of the 95 % interval of it over roll-outs: 1.96 s / sqrt(n). It covers starts and sampling noise,
    not the seeds of training. Of one value there is none: nan.

    Raises:
        InvalidInput: no value.
    """
    values = numpy.asarray(values, dtype=numpy.float64)
    if not len(values):
        raise InvalidInput("there are no roll-outs to take the mean of")
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def _check(policy: DiffusionPolicy, simulation: Simulation, steps: int, execute: int) -> None:
    differing = [
        f"{key}: the simulation has {there}, the policy {here}"
        for key, here, there in (
            ("obs_dim", policy.obs_dim, simulation.obs_dim),
            ("action_dim", policy.action_dim, simulation.action_dim),
        )
        if here != there
    ]
    if differing:
        raise Incompatible(f"the policy is of another task: {'; '.join(differing)}")
    if steps < 1:
        raise InvalidInput(f"steps is {steps}; expected 1 or more")
    if not 1 <= execute <= policy.T_action:
        raise InvalidInput(
            f"execute is {execute}, and the policy predicts T_action = {policy.T_action} actions at a time; expected 1 "
            f"to {policy.T_action}"
        )
