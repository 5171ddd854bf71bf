"""What a policy acts in. A `Task` is a family of worlds with the same observations and actions; a `Simulation` is many
of its environments that step together. Tasks are Python code of the user's, found by names that the user gives: what a
version in a registry says of its task only chooses among those."""

from __future__ import annotations

import importlib
import os
import tomllib
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pdp.errors import ConfigError, TaskNotFound, WorldNotFound
from registry.core.reference import shown

PROJECT_FILE = "pyproject.toml"
RESERVED = ("rollouts", "episode_steps")
INTERVAL = "_ci95"
"""What `pdp.evaluate` notes beside the measures, and the end of the names of their intervals."""


class Simulation(Protocol):
    """B environments that step together, each in a world of its own. Arrays are numpy's.

    Attributes:
        obs_dim, action_dim: sizes of one step.
        worlds: of each environment, by name.
    """

    obs_dim: int
    action_dim: int

    @property
    def worlds(self) -> tuple[str, ...]: ...

    def reset(self, seed: int) -> Any:
        """Starts an episode; the same seed gives the same starts. Returns the observations, (B, obs_dim)."""

    def step(self, action: Any) -> Any:
        """One control step.

        Args:
            action: (B, action_dim), finite.

        Returns:
            The observations, (B, obs_dim).

        Raises:
            SimulationDiverged
        """

    def measures(self) -> dict[str, Any]:
        """What the episode came to until now: (B,) finite numbers by name, such as `speed`, and `success` in 0 and 1.
        Also asked for at the start of an episode."""


@runtime_checkable
class Task(Protocol):
    """A family of worlds.

    Attributes:
        name: as data sets and versions record it.
        worlds: their names, of letters, digits, `.`, `-` and `_`.
        steps: control steps of an episode.
        execute: actions of each prediction that are carried out before the next.
    """

    name: str
    steps: int
    execute: int

    @property
    def worlds(self) -> Collection[str]: ...

    def simulation(self, worlds: Sequence[str]) -> Simulation:
        """One environment for each name; see `check_world`."""


def places(worlds: Sequence[str]) -> list[int]:
    """Which of its world each environment is, from 0. Starts that are drawn from the seed and this are the same
    whatever other worlds are beside."""
    counts: dict[str, int] = {}
    found = []
    for world in worlds:
        found.append(counts.get(world, 0))
        counts[world] = found[-1] + 1
    return found


def check_world(task: Task, world: str) -> str:
    """The name itself.

    Raises:
        WorldNotFound: the task has no such world; the message has the near ones.
    """
    if world in task.worlds:
        return world
    near = get_close_matches(world, task.worlds, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(task.worlds)}"
    raise WorldNotFound(f"{task.name} has no world {shown(repr(world))}; {hint}")


def load_task(name: str) -> Task:
    """Imports a task.

    Args:
        name: of a module with an attribute `TASK`. It is given by the user, on the command line, in the environment or
            in their project's file: never by data.

    Raises:
        TaskNotFound: there is no such module, or it has no task.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise TaskNotFound(
            f"the task {shown(repr(name))} cannot be imported: {error}; give a module with an attribute TASK, and "
            "run where it can be found"
        ) from error
    except Exception as error:  # a module may raise anything; of an odd name import_module does
        raise TaskNotFound(
            f"the task {shown(repr(name))} cannot be imported: {type(error).__name__}: {shown(str(error), 200)}"
        ) from error
    task = getattr(module, "TASK", None)
    if isinstance(task, type) or not isinstance(task, Task):
        raise TaskNotFound(f"the module {shown(name)} has no task: expected an attribute TASK, as pdp.simulation.Task")
    numbers = all(type(one) is int and one > 0 for one in (task.steps, task.execute))
    if not numbers or not isinstance(task.name, str) or not isinstance(task.worlds, Collection):
        raise TaskNotFound(
            f"TASK of the module {shown(name)} is not as pdp.simulation.Task has it: expected name (a text), worlds (a "
            "collection of names), steps and execute (whole numbers from 1)"
        )
    return task


def known_tasks(folder: Path | None = None) -> list[str]:
    """Modules of tasks that the user has: `$PDP_TASKS`, with commas between them, else `tasks` of `[tool.pdp]` in the
    pyproject.toml of the working folder.

    Raises:
        ConfigError: the file cannot be read, or has something else there.
    """
    if named := os.environ.get("PDP_TASKS", "").strip():
        return [one.strip() for one in named.split(",") if one.strip()]
    path = (folder or Path.cwd()) / PROJECT_FILE
    if not path.is_file():
        return []
    try:
        found: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    for key, otherwise in (("tool", {}), ("pdp", {}), ("tasks", [])):
        found = found.get(key, otherwise) if isinstance(found, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ConfigError(f"tool.pdp.tasks in {path} is {shown(repr(found))}; expected a list of names of modules")
    return found


def find_task(recorded: str | None, names: Sequence[str]) -> Task:
    """The task that a version records, among those of these modules; the only one where it records none.

    Raises:
        TaskNotFound
    """
    if not names:
        raise TaskNotFound(
            "no task is known; give --task MODULE, or list the modules in $PDP_TASKS or under tasks of [tool.pdp] in "
            "pyproject.toml"
        )
    tasks: dict[str, Task] = {}
    broken = []
    for name in names:
        try:
            tasks[name] = load_task(name)
        except TaskNotFound as error:  # another may be the one
            broken.append(str(error))
    there = "; ".join([", ".join(f"{task.name} ({name})" for name, task in tasks.items()) or "none", *broken])
    if recorded is None:
        if len(tasks) == 1 and not broken:
            return next(iter(tasks.values()))
        raise TaskNotFound(f"the version records no task; choose one with --task MODULE. There are {there}")
    for task in tasks.values():
        if task.name == recorded:
            return task
    raise TaskNotFound(
        f"the version is of the task {shown(repr(recorded))}, which is none of those that are known; give --task "
        f"MODULE. There are {there}"
    )
