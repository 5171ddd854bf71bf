"""The experts: linear policies, made by augmented random search (Mania, Guy and Recht 2018, V2 with the best
directions) in the simulator. Each is 6 x 17 numbers and lies in `experts/`, with its recipe and its speed in the file's
header.

    python -m examples.cheetah.expert                    makes them all again, in minutes
    python -m examples.cheetah.expert gear --go-on 20    goes on from the one that is there, and says how it does
    python -m examples.cheetah.expert gear --try 0 1 2   makes it with other seeds, and says how each does
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from examples.cheetah.simulation import ACTION_DIM, OBS_DIM, CheetahSimulation
from examples.cheetah.worlds import ORIGINAL, WORLDS
from registry.core.errors import InvalidInput

FOLDER = Path(__file__).parent / "experts"


@dataclass(frozen=True)
class Recipe:
    """Of one search.

    Attributes:
        directions: tried in each iteration, each forwards and backwards.
        best: of them that count.
        step, noise: size of an update, and of a try.
        horizon: control steps of a try.
        effort: weight of |action|^2 in the reward, which is speed less effort.
        frozen: keep the observations' mean and deviation; else they are of all that was seen.
        start: the world whose expert it goes on from; None: from zero.
    """

    seed: int
    iterations: int
    directions: int = 32
    best: int = 8
    step: float = 0.02
    noise: float = 0.03
    horizon: int = 300
    effort: float = 0.1
    frozen: bool = False
    start: str | None = None


FROM_NOTHING = Recipe(seed=1, iterations=217)
GOING_ON = Recipe(seed=0, iterations=200, directions=24, horizon=200, frozen=True, start=ORIGINAL)
SEEDS = {"gear": 2, "mass": 3, "slope": 2, "gravity": 2, "gear-mass": 1, "gear-gravity": 1, "mass-slope": 1}
"""Seeds differ much: of 16 for the original world, 4 for each change and 2 for each pair these gave the best speed
times the part that ended on its feet; docs/cheetah.md has the numbers. Of a world that is not named: 0."""


def recipe_of(world: str) -> Recipe:
    if world == ORIGINAL:
        return FROM_NOTHING
    # In a world with two changes the original's expert may not move at all; that of the first change does.
    first = world.partition("-")[0]
    return replace(GOING_ON, seed=SEEDS.get(world, 0), start=ORIGINAL if first == world else first)


@dataclass
class Expert:
    """A linear policy: action = clip(matrix @ (obs - mean) / deviation).

    Attributes:
        matrix: (6, 17); mean, deviation: (17,).
        speed: m/s over 100 roll-outs of 300 steps in its world; upright: part of them that ends on its feet.
    """

    matrix: Any
    mean: Any
    deviation: Any
    speed: float = 0.0
    upright: float = 0.0

    def act(self, obs: Any) -> Any:
        """(B, 17) to (B, 6)."""
        return numpy.clip(((obs - self.mean) / self.deviation) @ self.matrix.T, -1.0, 1.0)

    def save(self, path: Path, world: str, recipe: Recipe) -> None:
        tensors = {"matrix": self.matrix, "mean": self.mean, "deviation": self.deviation}
        said = {"world": world, "recipe": json.dumps(asdict(recipe)), "speed": f"{self.speed:.4f}"}
        save_file(tensors, path, metadata={**said, "upright": f"{self.upright:.2f}"})

    @classmethod
    def load(cls, world: str, folder: Path = FOLDER) -> Expert:
        """
        Raises:
            InvalidInput: there is no such file, or it is no expert of this world.
        """
        tensors, said = _read(folder / f"{world}.safetensors")
        shapes = {"matrix": (ACTION_DIM, OBS_DIM), "mean": (OBS_DIM,), "deviation": (OBS_DIM,)}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != shapes or said.get("world") != world:
            raise InvalidInput(
                f"{folder / world}.safetensors is no expert of the world {world}: it has {found}, and says "
                f"{said.get('world')!r}; make it again: make experts"
            )
        return cls(**tensors, speed=float(said["speed"]), upright=float(said["upright"]))


def recorded_recipe(path: Path) -> Recipe:
    """How a file's expert was made."""
    return Recipe(**json.loads(_read(path)[1]["recipe"]))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no dict
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{path} cannot be read ({error}); make it again: make experts") from error


class Seen:
    """Running mean and variance of observations."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, numpy.zeros(OBS_DIM), numpy.zeros(OBS_DIM)

    def add(self, obs: Any) -> None:
        count = self.count + len(obs)
        mean = obs.mean(axis=0)
        change = mean - self.mean
        self.squares += ((obs - mean) ** 2).sum(axis=0) + change**2 * self.count * len(obs) / count
        self.mean = self.mean + change * len(obs) / count
        self.count = count

    @property
    def deviation(self) -> Any:
        return numpy.maximum(numpy.sqrt(self.squares / max(self.count - 1, 1)), 1e-6)


def search(
    world: str, recipe: Recipe, start: Expert | None, told: Callable[[int, float], None] | None = None
) -> Expert:
    """Augmented random search.

    Args:
        start: what it goes on from; needed where the recipe keeps the observations' statistics.
        told: is called with each iteration's number and the mean reward of its tries.
    """
    draw = numpy.random.default_rng(recipe.seed)
    matrix = numpy.zeros((ACTION_DIM, OBS_DIM)) if start is None else start.matrix.copy()
    seen = Seen()
    mean = numpy.zeros(OBS_DIM) if start is None else start.mean
    deviation = numpy.ones(OBS_DIM) if start is None else start.deviation
    simulation = CheetahSimulation([world] * (2 * recipe.directions))
    for iteration in range(recipe.iterations):
        tries = draw.standard_normal((recipe.directions, *matrix.shape))
        both = numpy.concatenate((matrix + recipe.noise * tries, matrix - recipe.noise * tries))
        scaled = both / deviation
        obs = simulation.reset(int(draw.integers(2**31)))
        effort, visited = numpy.zeros(len(both)), []
        for _ in range(recipe.horizon):
            action = numpy.clip(numpy.einsum("bij,bj->bi", scaled, obs - mean), -1.0, 1.0)
            visited.append(obs)
            obs = simulation.step(action)
            effort += (action**2).sum(axis=1)
        reward = simulation.way() / simulation.batch.control_seconds - recipe.effort * effort
        there, back = reward[: recipe.directions], reward[recipe.directions :]
        best = numpy.argsort(-numpy.maximum(there, back), kind="stable")[: recipe.best]
        spread = numpy.concatenate((there[best], back[best])).std() + 1e-8
        gradient = numpy.einsum("k,kij->ij", there[best] - back[best], tries[best]) / recipe.best
        matrix = matrix + recipe.step / spread * gradient
        if not recipe.frozen:
            seen.add(numpy.concatenate(visited))
            mean, deviation = seen.mean, seen.deviation
        if told is not None:
            told(iteration, float(reward.mean() / recipe.horizon))
    return Expert(matrix, mean, deviation)


def measure(
    expert: Expert, world: str, *, rollouts: int = 100, steps: int = 300, seed: int = 10_000
) -> tuple[float, float]:
    """Mean speed, and the part of the roll-outs that ends on its feet."""
    simulation = CheetahSimulation([world] * rollouts)
    obs = simulation.reset(seed)
    for _ in range(steps):
        obs = simulation.step(expert.act(obs))
    measures = simulation.measures()
    return float(measures["speed"].mean()), float(measures["upright"].mean())


def make(world: str, recipe: Recipe, folder: Path) -> str:
    """Makes one expert, and writes it."""
    start = None if recipe.start is None else Expert.load(recipe.start, folder)
    expert = search(world, recipe, start)
    expert.speed, expert.upright = measure(expert, world)
    expert.save(folder / f"{world}.safetensors", world, recipe)
    return f"{world}: {expert.speed:.2f} m/s, {expert.upright:.0%} end on their feet"


def make_all(folder: Path, processes: int) -> None:
    """All worlds, those first that others begin with."""
    folder.mkdir(parents=True, exist_ok=True)
    left = dict.fromkeys(WORLDS)
    done: set[str | None] = {None}
    with ProcessPoolExecutor(processes) as pool:
        while left:
            ready = [world for world in left if recipe_of(world).start in done]
            for line in pool.map(partial(_make_one, folder=folder), ready):
                print(line, flush=True)
            done.update(ready)
            left = dict.fromkeys(world for world in left if world not in done)


def _make_one(world: str, folder: Path) -> str:
    return make(world, recipe_of(world), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", nargs="?", choices=WORLDS)
    parser.add_argument("--go-on", type=int, default=10, metavar="ITERATIONS")
    parser.add_argument("--try", dest="seeds", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they are made")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.world is None:
        make_all(given.folder, given.processes)
        return
    if given.seeds:
        recipe = recipe_of(given.world)
        start = None if recipe.start is None else Expert.load(recipe.start)
        for seed in given.seeds:
            speed, upright = measure(search(given.world, replace(recipe, seed=seed), start), given.world)
            print(f"seed {seed}: {speed:.2f} m/s, {upright:.0%} end on their feet", flush=True)
        return
    expert = Expert.load(given.world)
    recipe = replace(GOING_ON, iterations=given.go_on)
    better = search(
        given.world, recipe, expert, lambda at, reward: print(f"{at:4d}  mean reward of tries {reward:.3f}")
    )
    print(f"{expert.speed:.3f} m/s before, {measure(better, given.world)[0]:.3f} after")


if __name__ == "__main__":
    main()
