"""Worlds of the cheetah: gymnasium's HalfCheetah with other motors, masses or gravity. A world is a small configuration
with a name; `gear-mass` has the changes of both."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mujoco

GRAVITY = 9.81
TOTAL_MASS = 14.0  # kg, as half_cheetah.xml has it
FRAME_SKIP = 5  # physics steps of 0.01 s: control at 20 Hz


@dataclass(frozen=True)
class World:
    """What differs from gymnasium's own model.

    Attributes:
        gear: factor of all motors' torques.
        mass: factor of all masses and inertias.
        slope: radians that the ground rises in the direction of running.
        gravity: factor of the gravity.
    """

    gear: float = 1.0
    mass: float = 1.0
    slope: float = 0.0
    gravity: float = 1.0

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    def __add__(self, other: World) -> World:
        return World(
            self.gear * other.gear, self.mass * other.mass, self.slope + other.slope, self.gravity * other.gravity
        )


ORIGINAL = "original"
CHANGES = {
    "gear": World(gear=0.65),
    "mass": World(mass=1.5),
    "slope": World(slope=0.2),
    "gravity": World(gravity=1.5),
}
PAIRS = tuple(itertools.combinations(CHANGES, 2))
WORLDS = {ORIGINAL: World(), **CHANGES, **{f"{a}-{b}": CHANGES[a] + CHANGES[b] for a, b in PAIRS}}


def world_model(world: World) -> Any:
    """The MjModel of a world."""
    model = mujoco.MjModel.from_xml_string(_text())
    # In place of the compiler's `settotalmass`, which MuJoCo 4 still takes and complains about: the same bits.
    mujoco.mj_setTotalmass(model, TOTAL_MASS)
    model.actuator_gear[:, 0] *= world.gear
    model.body_mass[1:] *= world.mass
    model.body_inertia[1:] *= world.mass
    model.opt.gravity[:] = (
        -GRAVITY * world.gravity * math.sin(world.slope),
        0.0,
        -GRAVITY * world.gravity * math.cos(world.slope),
    )
    mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


@cache
def _text() -> str:
    import gymnasium

    path = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "half_cheetah.xml"
    text, found = re.subn(r' settotalmass="14"', "", path.read_text(encoding="utf-8"))
    if found != 1:
        raise RuntimeError(f"{path} is another half_cheetah.xml than this example knows: it has no settotalmass=14")
    return text
