"""Demonstrations of the experts, as PDP makes them: what is carried out is the expert's action with noise, what is
learned is the action without it. The same seed gives the same bits.

    python -m examples.cheetah.demonstrations gear gear.zarr --episodes 80 --noise 0.2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy

from examples.arguments import number, refusals
from examples.cheetah.expert import Expert
from examples.cheetah.simulation import CheetahSimulation
from examples.cheetah.worlds import ORIGINAL, WORLDS
from pdp.data import write_dataset

SLOW = 0.6  # of the median speed: an episode that is slower has fallen


@dataclass(frozen=True)
class Recipe:
    """Of a data set.

    Attributes:
        noise: each episode's deviation of the noise on its actions is drawn from U(0, noise).
    """

    world: str
    episodes: int
    steps: int
    noise: float
    seed: int = 0


def demonstrate(recipe: Recipe) -> dict[str, Any]:
    """`obs`, `action` and `episode_ends` of the episodes that are kept."""
    expert = Expert.load(recipe.world)
    draw = numpy.random.default_rng((recipe.seed, crc32(recipe.world.encode())))
    simulation = CheetahSimulation([recipe.world] * recipe.episodes)
    deviation = draw.uniform(0, recipe.noise, (recipe.episodes, 1))
    obs = simulation.reset(int(draw.integers(2**31)))
    seen, actions = [], []
    for _ in range(recipe.steps):
        action = expert.act(obs)
        seen.append(obs)
        actions.append(action)
        obs = simulation.step(action + deviation * draw.standard_normal(action.shape))
    measures = simulation.measures()
    kept = (measures["speed"] >= SLOW * numpy.median(measures["speed"])) & (measures["upright"] > 0)
    ends = numpy.arange(1, int(kept.sum()) + 1) * recipe.steps
    return {
        "obs": numpy.stack(seen, axis=1)[kept].reshape(-1, simulation.obs_dim),
        "action": numpy.stack(actions, axis=1)[kept].reshape(-1, simulation.action_dim),
        "episode_ends": ends,
    }


def write(path: Path, recipes: Sequence[Recipe], *, force: bool = False) -> Path:
    """Writes the data of one world, or of several behind each other; these say no `world`, as they are of none."""
    parts = [demonstrate(one) for one in recipes]
    ends, last = [], 0
    for part in parts:
        ends.append(part["episode_ends"] + last)
        last = ends[-1][-1]
    said = [{**asdict(one), "changes": WORLDS[one.world].to_json()} for one in recipes]
    return write_dataset(
        path,
        numpy.concatenate([part["obs"] for part in parts]),
        numpy.concatenate([part["action"] for part in parts]),
        numpy.concatenate(ends),
        recipe={"task": "cheetah", **(said[0] if len(said) == 1 else {"parts": said})},
        force=force,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("path", type=Path, help="a zarr folder, or an HDF5 file (.h5)")
    parser.add_argument("--episodes", type=number(int, 1), help="80; of the original world 160")
    parser.add_argument("--steps", type=number(int, 1), default=300)
    parser.add_argument("--noise", type=number(float, 0), help="0.2; in the original world 0.3")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--force", action="store_true", help="replace what is there")
    given = parser.parse_args()
    episodes = given.episodes or (160 if given.world == ORIGINAL else 80)
    noise = (0.3 if given.world == ORIGINAL else 0.2) if given.noise is None else given.noise
    recipe = Recipe(given.world, episodes, given.steps, noise, given.seed)
    with refusals():
        print(f"wrote {write(given.path, [recipe], force=given.force)}")


if __name__ == "__main__":
    main()
