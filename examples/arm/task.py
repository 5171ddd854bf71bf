"""The task `arm`, as `python -m pdp.evaluate` finds it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from examples.arm.model import WORLDS
from examples.arm.simulation import ArmSimulation
from pdp.simulation import check_world


class Arm:
    """Follow a reference with the tip, whatever it carries."""

    name = "arm"
    steps = 250
    execute = 2

    @property
    def worlds(self) -> Collection[str]:
        return WORLDS

    def simulation(self, worlds: Sequence[str]) -> ArmSimulation:
        return ArmSimulation([check_world(self, world) for world in worlds])


TASK = Arm()
