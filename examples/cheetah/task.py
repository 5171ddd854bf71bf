"""The task `cheetah`, as `python -m pdp.evaluate` finds it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from examples.cheetah.expert import Expert
from examples.cheetah.simulation import CheetahSimulation
from examples.cheetah.worlds import WORLDS
from pdp.simulation import check_world


@dataclass(frozen=True)
class Cheetah:
    """Run as fast as the world's expert. See `pdp.simulation.Task`."""

    name: str = "cheetah"
    steps: int = 300
    execute: int = 2

    @property
    def worlds(self) -> Collection[str]:
        return WORLDS

    def simulation(self, worlds: Sequence[str]) -> CheetahSimulation:
        targets = {world: Expert.load(check_world(self, world)).speed for world in dict.fromkeys(worlds)}
        return CheetahSimulation(worlds, targets)


TASK = Cheetah()
