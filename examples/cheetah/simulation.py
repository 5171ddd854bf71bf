"""Cheetahs that run together, each in a world of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from examples.cheetah.worlds import FRAME_SKIP, WORLDS, world_model
from pdp.mujoco_batch import MujocoBatch
from pdp.simulation import places

OBS_DIM, ACTION_DIM = 17, 6
STANDING = 1.5  # radians of pitch, beyond which it lies on its back
GOOD = 0.7  # of the expert's speed


class CheetahSimulation:
    """The simulation of a task, as `pdp.simulation.Simulation` has it. An observation is qpos without the way that was
    run, and qvel clipped to +-10; an action is six torques from -1 to 1 (beyond, they are clipped).

    Args:
        worlds: the world of each environment, by name.
        targets: the expert's speed in each world, m/s, for `success`; without it there is no success.
    """

    obs_dim, action_dim = OBS_DIM, ACTION_DIM

    def __init__(self, worlds: Sequence[str], targets: dict[str, float] | None = None, threads: int = 1) -> None:
        models = {name: world_model(WORLDS[name]) for name in dict.fromkeys(worlds)}
        self.worlds = tuple(worlds)
        self.batch = MujocoBatch([models[name] for name in worlds], FRAME_SKIP, threads)
        self._targets = None if targets is None else numpy.array([targets[name] for name in worlds])
        self._start = numpy.zeros(len(worlds))

    def reset(self, seed: int) -> Any:
        """Starts near the model's own posture: qpos + U(-0.1, 0.1), qvel 0.1 N(0, 1). The start of the i-th environment
        of a world depends on the seed and on i alone."""
        self.batch.reset()
        for row, place in enumerate(places(self.worlds)):
            draw = numpy.random.default_rng((seed, place))
            self.batch.qpos[row] += draw.uniform(-0.1, 0.1, self.batch.qpos.shape[1])
            self.batch.qvel[row] += 0.1 * draw.standard_normal(self.batch.qvel.shape[1])
        self._start = self.batch.qpos[:, 0].copy()
        return self.observe()

    def observe(self) -> Any:
        return numpy.concatenate((self.batch.qpos[:, 1:], numpy.clip(self.batch.qvel, -10, 10)), axis=1)

    def step(self, action: Any) -> Any:
        self.batch.step(numpy.clip(action, -1.0, 1.0))
        return self.observe()

    def way(self) -> Any:
        """Metres that each has run."""
        return self.batch.qpos[:, 0] - self._start

    def measures(self) -> dict[str, Any]:
        """Of the episode until now: mean `speed` in m/s, whether it stands, and `success`: it stands, and was faster
        than 0.7 of the world's expert."""
        speed = self.way() / (max(self.batch.steps, 1) * self.batch.control_seconds)
        upright = numpy.abs(self.batch.qpos[:, 2]) < STANDING
        found = {"speed": speed, "upright": upright.astype(float)}
        if self._targets is not None:
            found["success"] = (upright & (speed > GOOD * self._targets)).astype(float)
        return found
