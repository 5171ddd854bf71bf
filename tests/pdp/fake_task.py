"""A task without a simulator: points on a line that a policy moves, with worlds that scale its actions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy

from tests.pdp.models import SIZES

SCALES = {"plain": 1.0, "weak": 0.5, "strong": 2.0}


class Points:
    """B points; the first action is a velocity. An observation is the way, repeated."""

    obs_dim, action_dim = SIZES["obs_dim"], SIZES["input_dim"]

    def __init__(self, worlds: Sequence[str]) -> None:
        self.worlds = tuple(worlds)
        self.scales = numpy.array([SCALES[world] for world in worlds])
        self.way = numpy.zeros(len(worlds))
        self.steps = 0

    def reset(self, seed: int) -> Any:
        self.way = numpy.random.default_rng(seed).normal(size=len(self.worlds))
        self.steps = 0
        return self.observe()

    def observe(self) -> Any:
        return numpy.repeat(self.way[:, None], self.obs_dim, axis=1)

    def step(self, action: Any) -> Any:
        self.way = self.way + self.scales * action[:, 0]
        self.steps += 1
        return self.observe()

    def measures(self) -> dict[str, Any]:
        return {"speed": self.way / max(self.steps, 1), "success": (self.way > 0).astype(float)}


class PointTask:
    """What `pdp.evaluate` takes."""

    name = "points"
    steps = 6
    execute = 2

    @property
    def worlds(self) -> Collection[str]:
        return SCALES

    def simulation(self, worlds: Sequence[str]) -> Points:
        return Points(worlds)


TASK = PointTask()
