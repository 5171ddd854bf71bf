"""Arms that run together, each in a world of its own and along a reference of its own: a sum of two sines in every
joint, which the tip is to follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy

from examples.arm.model import FRAME_SKIP, JOINTS, PAYLOAD, WORLDS, World, world_model
from pdp.mujoco_batch import MujocoBatch
from pdp.simulation import places

OBS_DIM, ACTION_DIM = 5 * JOINTS, JOINTS
MIDDLE = (0.0, 0.5, 0.0, 1.2, 0.0, 0.8, 0.0)  # radians, about which the reference goes
LARGEST = (0.4, 0.2)  # radians, of the slow and of the fast sine
RATES = ((0.6, 1.5), (1.5, 3.0))  # rad/s, from and to
GOOD = 3.0  # cm between the tip and the reference's


@dataclass(frozen=True)
class Reference:
    """What B arms are to follow: MIDDLE + sum of two `size * sin(rate * t + phase)`.

    Attributes:
        size, rate, phase: (B, 2, 7) in rad, rad/s, rad.
    """

    size: Any
    rate: Any
    phase: Any

    @classmethod
    def of_draws(cls, draws: Sequence[Any]) -> Reference:
        """One for each random generator, by it alone."""
        parts = []
        for draw in draws:
            size = [draw.uniform(0.2 * largest, largest, JOINTS) for largest in LARGEST]
            rate = [draw.uniform(*between, JOINTS) for between in RATES]
            parts.append((size, rate, draw.uniform(0.0, 2 * numpy.pi, (2, JOINTS))))
        return cls(*(numpy.array(part) for part in zip(*parts, strict=True)))

    def at(self, seconds: float) -> tuple[Any, Any, Any]:
        """Positions, velocities and accelerations, each (B, 7)."""
        angle = self.rate * seconds + self.phase
        position = numpy.array(MIDDLE) + (self.size * numpy.sin(angle)).sum(axis=1)
        velocity = (self.size * self.rate * numpy.cos(angle)).sum(axis=1)
        return position, velocity, -(self.size * self.rate**2 * numpy.sin(angle)).sum(axis=1)


class ArmSimulation:
    """The simulation of a task, as `pdp.simulation.Simulation` has it. An observation is the joints' positions and
    velocities, what the reference's are more than these, and the reference's accelerations (7 each, in rad and s); an
    action is the seven motors' torques, each as a part of the motor's largest, from -1 to 1 (beyond, they are clipped).

    Args:
        worlds: the world of each environment, by name.

    Attributes:
        reference: of this episode; None before the first `reset`.
    """

    obs_dim, action_dim = OBS_DIM, ACTION_DIM

    def __init__(self, worlds: Sequence[str], threads: int = 1) -> None:
        models = {name: world_model(WORLDS[name]) for name in dict.fromkeys(worlds)}
        self.worlds = tuple(worlds)
        self.batch = MujocoBatch([models[name] for name in worlds], FRAME_SKIP, threads)
        self.reference: Reference | None = None
        self._tips = Tips()
        self._error = numpy.zeros(len(worlds))

    def reset(self, seed: int) -> Any:
        """Starts near the reference's start: qpos + U(-0.05, 0.05), qvel + 0.05 N(0, 1). Reference and start of the
        i-th environment of a world depend on the seed and on i alone."""
        self.batch.reset()
        draws = [numpy.random.default_rng((seed, place)) for place in places(self.worlds)]
        self.reference = Reference.of_draws(draws)
        position, velocity, _ = self.reference.at(0.0)
        for row, draw in enumerate(draws):
            self.batch.qpos[row] = position[row] + draw.uniform(-0.05, 0.05, JOINTS)
            self.batch.qvel[row] = velocity[row] + 0.05 * draw.standard_normal(JOINTS)
        self._error = numpy.zeros(len(self.batch))
        return self.observe()

    def wanted(self) -> tuple[Any, Any, Any]:
        """Positions, velocities and accelerations of the reference now, each (B, 7)."""
        assert self.reference is not None, "reset comes first"
        return self.reference.at(self.batch.steps * self.batch.control_seconds)

    def observe(self) -> Any:
        position, velocity, acceleration = self.wanted()
        here, speed = self.batch.qpos, self.batch.qvel
        return numpy.concatenate((here, speed, position - here, velocity - speed, acceleration), axis=1)

    def step(self, action: Any) -> Any:
        self.batch.step(numpy.clip(action, -1.0, 1.0))
        apart = self._tips.of(self.batch.qpos) - self._tips.of(self.wanted()[0])
        self._error += 100.0 * numpy.linalg.norm(apart, axis=1)
        return self.observe()

    def measures(self) -> dict[str, Any]:
        """Of the episode until now: `tip_error_cm`, the mean distance of the tip from where the reference has it, and
        `success`: that is below 3 cm."""
        error = self._error / max(self.batch.steps, 1)
        return {"tip_error_cm": error, "success": (error < GOOD).astype(float)}


class Tips:
    """Where the tip is. All worlds have the same lengths."""

    def __init__(self) -> None:
        self._model = world_model(World())
        self._data = mujoco.MjData(self._model)
        self._tip = self._data.body(PAYLOAD).xpos  # a view

    def of(self, qpos: Any) -> Any:
        """(B, 7) joint positions to (B, 3), metres."""
        found = numpy.empty((len(qpos), 3))
        for row, one in enumerate(qpos):
            self._data.qpos[:] = one
            mujoco.mj_kinematics(self._model, self._data)
            found[row] = self._tip
        return found
