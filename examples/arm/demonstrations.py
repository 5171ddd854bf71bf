"""Demonstrations of the expert: computed torque on the world's own model, with feedback. What is carried out is its
action with noise and a constant push, what is learned is the action without them. The same seed gives the same bits.

    python -m examples.arm.demonstrations payload payload.zarr --episodes 200
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy

from examples.arguments import number, refusals
from examples.arm.model import ORIGINAL, WORLDS, world_model
from examples.arm.simulation import ArmSimulation
from pdp.data import write_dataset

STIFFNESS, DAMPING = 100.0, 20.0  # 1/s^2 and 1/s: errors die down as of a critically damped spring of 10 rad/s


class Expert:
    """Inverse dynamics: the torques that give the joints the reference's acceleration, and more where they are off it.

    Args:
        world: whose masses, motors, damping and gravity it knows.
    """

    def __init__(self, world: str) -> None:
        self._model = world_model(WORLDS[world])
        self._data = mujoco.MjData(self._model)
        self._largest = self._model.actuator_gear[:, 0].copy()

    def act(self, simulation: ArmSimulation) -> Any:
        """(B, 7), clipped to -1 to 1, for the present state of all environments."""
        here, speed = simulation.batch.qpos, simulation.batch.qvel
        position, velocity, acceleration = simulation.wanted()
        wanted = acceleration + STIFFNESS * (position - here) + DAMPING * (velocity - speed)
        torque = numpy.empty_like(wanted)
        data = self._data
        for row in range(len(wanted)):
            data.qpos[:], data.qvel[:], data.qacc[:] = here[row], speed[row], wanted[row]
            mujoco.mj_inverse(self._model, data)
            torque[row] = data.qfrc_inverse
        return numpy.clip(torque / self._largest, -1.0, 1.0)


@dataclass(frozen=True)
class Recipe:
    """Of a data set.

    Attributes:
        noise: each episode's deviation of the noise on its actions is drawn from U(0, noise).
        push: each episode's constant addition to the actions of each joint is drawn from U(-push, push). Without it the
            data have no arm that hangs behind its reference, as one with another payload does.
    """

    world: str
    episodes: int
    steps: int
    noise: float
    push: float
    seed: int = 0


def demonstrate(recipe: Recipe) -> dict[str, Any]:
    """`obs`, `action` and `episode_ends` of the episodes."""
    expert = Expert(recipe.world)
    draw = numpy.random.default_rng((recipe.seed, sum(map(ord, recipe.world))))
    simulation = ArmSimulation([recipe.world] * recipe.episodes)
    deviation = draw.uniform(0, recipe.noise, (recipe.episodes, 1))
    push = draw.uniform(-recipe.push, recipe.push, (recipe.episodes, simulation.action_dim))
    obs = simulation.reset(int(draw.integers(2**31)))
    seen, actions = [], []
    for _ in range(recipe.steps):
        action = expert.act(simulation)
        seen.append(obs)
        actions.append(action)
        obs = simulation.step(action + push + deviation * draw.standard_normal(action.shape))
    return {
        "obs": numpy.stack(seen, axis=1).reshape(-1, simulation.obs_dim),
        "action": numpy.stack(actions, axis=1).reshape(-1, simulation.action_dim),
        "episode_ends": numpy.arange(1, recipe.episodes + 1) * recipe.steps,
    }


def write(path: Path, recipe: Recipe, *, force: bool = False) -> Path:
    """Writes the data of one world."""
    said = {"task": "arm", **asdict(recipe), "recorded": WORLDS[recipe.world].to_json()}
    return write_dataset(path, **demonstrate(recipe), recipe=said, force=force)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("path", type=Path, help="a zarr folder, or an HDF5 file (.h5)")
    parser.add_argument("--episodes", type=number(int, 1), help="200; of the original world 400")
    parser.add_argument("--steps", type=number(int, 1), default=100)
    parser.add_argument("--noise", type=number(float, 0), default=0.2)
    parser.add_argument("--push", type=number(float, 0), default=0.2)
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--force", action="store_true", help="replace what is there")
    given = parser.parse_args()
    # Many short ones: a start is off the reference, as the middle of an episode seldom is.
    episodes = given.episodes or (400 if given.world == ORIGINAL else 200)
    recipe = Recipe(given.world, episodes, given.steps, given.noise, given.push, given.seed)
    with refusals():
        print(f"wrote {write(given.path, recipe, force=given.force)}")


if __name__ == "__main__":
    main()
