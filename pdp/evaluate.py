"""`python -m pdp.evaluate registry://cheetah/gear:prod --world gear`: rolls a policy out in one or more worlds of a
task, and notes with its version what came of it, as metrics that `registry list --where` asks for."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from pdp.errors import ConfigError
from pdp.simulation import INTERVAL, check_world, find_task, known_tasks, load_task
from registry.core.errors import RegistryError

if TYPE_CHECKING:
    from pdp.checkpoints import RegistryCheckpoint
    from pdp.simulation import Task
    from registry import Registry

RECORDED = ("task", "world")
"""Metadata that training takes from the recipe of its data."""


@dataclass(frozen=True)
class Evaluation:
    """How a policy did.

    Attributes:
        reference: the version, `namespace/name@number`; None of a file.
        task: its name.
        worlds: by world and measure, (mean, half of its 95 % interval over roll-outs).
        rollouts: in each world.
        metrics: as they are noted with the version.
        seconds: of all roll-outs.
    """

    reference: str | None
    task: str
    worlds: Mapping[str, Mapping[str, tuple[float, float]]]
    rollouts: int
    steps: int
    execute: int
    metrics: Mapping[str, float]
    seconds: float


def evaluate(
    path: str | os.PathLike[str],
    worlds: Sequence[str] = (),
    *,
    task: Task | None = None,
    base: str | os.PathLike[str] | None = None,
    rollouts: int = 50,
    steps: int | None = None,
    execute: int | None = None,
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
    fused: bool = False,
    push: bool = True,
    registry: Registry | str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Rolls a policy out, the same number of times in each world; with the same starts and noise in each, whatever
    other worlds are asked for.

    Args:
        path: a `registry://` URL or a file, as `DiffusionPolicy.from_checkpoint` takes it.
        worlds: of the task; by default the one that the version was trained in.
        task: by default the one that the version records, among those of `pdp.simulation.known_tasks`.
        base: of a file, or a version without a declared base, that holds an adapter alone: the checkpoint that it was
            trained from. A version is then not noted anything.
        steps, execute: by default the task's.
        threads: of torch: networks as small as a policy's are slower with more than one.
        fused: add an adapter into a copy of the weights first: the same function but for rounding, as fast as the base.
        push: note the metrics with the version, as `<world>/<measure>`. A measure in the world that the version was
            trained in has its own name as well, such as `speed`, if task, steps and execute are what the task has.
            `..._ci95` is half of an interval over roll-outs (NaN of one), `<world>/rollouts` and
            `<world>/episode_steps` say what was done.

    Raises:
        TaskNotFound, WorldNotFound: with what there is.
        Incompatible: a policy of other observations or actions; ActionNotFinite, SimulationDiverged: when and where.
        InvalidInput, NotFound, CheckpointError, StorageError
    """
    found, version = _evaluate(
        path, worlds, task, base, rollouts, steps, execute, seed, threads, device, fused, registry
    )
    if push and version is not None and base is None:
        version.registry.annotate(version.reference, metrics=found.metrics)
    return found


def _evaluate(
    path: str | os.PathLike[str],
    worlds: Sequence[str],
    task: Task | None,
    base: str | os.PathLike[str] | None,
    rollouts: int,
    steps: int | None,
    execute: int | None,
    seed: int,
    threads: int,
    device: str,
    fused: bool,
    registry: Registry | str | os.PathLike[str] | None,
) -> tuple[Evaluation, RegistryCheckpoint | None]:
    import torch

    from pdp.checkpoints import RegistryCheckpoint, read_checkpoint
    from pdp.device import check_device
    from pdp.lora_model import LoraTransformerForDiffusion
    from pdp.policy import DiffusionPolicy
    from pdp.rollout import mean_and_interval, roll_out
    from pdp.utils.lora_utils import merge_lora_weights

    for name, value, least, most in (
        ("rollouts", rollouts, 1, 1_000_000),
        ("seed", seed, 0, 2**63 - 1),
        ("threads", threads, 1, 1024),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{name} is {value}; expected {least} to {most}")
    where = check_device(device, "device")
    checkpoint = read_checkpoint(path, registry)
    version = checkpoint if isinstance(checkpoint, RegistryCheckpoint) else None
    recorded = {} if version is None else _recorded(version)
    if base is not None and (checkpoint.base or (version is not None and version.base_reference is not None)):
        which = "holds a whole network" if checkpoint.base else f"has its base, {version and version.base_reference}"
        raise ConfigError(f"{checkpoint.what} {which}; leave the base out (--base {base})")
    task = task or find_task(recorded.get("task"), known_tasks())
    wanted = list(dict.fromkeys(worlds)) or [recorded[key] for key in recorded if key == "world"]
    if not wanted:
        raise ConfigError(f"{checkpoint.what} does not say in which world it was trained; give --world")
    for world in wanted:
        check_world(task, world)
    policy = DiffusionPolicy.from_checkpoint(checkpoint, base, registry=registry).to(where)
    if fused and isinstance(policy.model, LoraTransformerForDiffusion):
        policy.model = merge_lora_weights(policy.model)
    steps = task.steps if steps is None else steps
    execute = task.execute if execute is None else execute
    results, seconds = {}, 0.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for world in wanted:
            done = roll_out(policy, task.simulation([world] * rollouts), steps=steps, execute=execute, seed=seed)
            results[world] = {name: mean_and_interval(values) for name, values in done.measures.items()}
            seconds += done.seconds
    finally:
        torch.set_num_threads(before)
    as_the_task_has_it = (steps, execute, recorded.get("task")) == (task.steps, task.execute, task.name)
    metrics = _metrics(results, recorded.get("world") if as_the_task_has_it else None, rollouts, steps)
    reference = None if version is None else version.reference
    return Evaluation(reference, task.name, results, rollouts, steps, execute, metrics, seconds), version


def _recorded(version: RegistryCheckpoint) -> dict[str, str]:
    """Task and world that a version was trained in, as far as it says."""
    metadata = version.registry.get(version.reference).metadata
    return {key: value for key in RECORDED if isinstance(value := metadata.get(key), str)}


def _metrics(
    results: Mapping[str, Mapping[str, tuple[float, float]]], own: str | None, rollouts: int, steps: int
) -> dict[str, float]:
    """All of a world's at once, so that none is left of an earlier time: an interval that there is not is NaN."""
    found: dict[str, float] = {}
    for world, measures in results.items():
        found |= {f"{world}/rollouts": rollouts, f"{world}/episode_steps": steps}
        for name, (mean, half) in measures.items():
            for place in (f"{world}/{name}", *([name] if world == own else [])):
                found |= {place: mean, f"{place}{INTERVAL}": half}
    return found


# ---------------------------------------------------------------- the command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("reference")
@click.option("--world", "worlds", multiple=True, help="World to act in, several times for several; else its own.")
@click.option("--task", "module", help="Module with the TASK; else one of tool.pdp.tasks in pyproject.toml.")
@click.option("--base", help="Of a file that holds an adapter alone: the checkpoint that it was trained from.")
@click.option("--rollouts", default=50, show_default=True, help="Episodes in each world.")
@click.option("--steps", type=int, help="Control steps of an episode; else the task's.")
@click.option("--execute", type=int, help="Actions of each prediction that are carried out; else the task's.")
@click.option("--seed", default=0, show_default=True, help="Of starts and noise.")
@click.option("--threads", default=1, show_default=True, help="Of torch: small networks are fastest with one.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--fused", is_flag=True, help="Add an adapter into the weights first: as fast as the base.")
@click.option("--no-push", is_flag=True, help="Do not note the metrics with the version.")
@click.option("--registry", help="The registry; else as the command registry finds it.")
@click.option("--json", "as_json", is_flag=True, help="One document on standard output.")
def command(
    reference: str,
    worlds: tuple[str, ...],
    module: str | None,
    base: str | None,
    rollouts: int,
    steps: int | None,
    execute: int | None,
    seed: int,
    threads: int,
    device: str,
    fused: bool,
    no_push: bool,
    registry: str | None,
    as_json: bool,
) -> None:
    r"""Rolls out a policy or an adapter REFERENCE (a registry:// URL or a file) and notes what came of it.

    \b
    python -m pdp.evaluate registry://cheetah/gear:prod --world gear
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        task = None if module is None else load_task(module)
        found, version = _evaluate(
            reference, worlds, task, base, rollouts, steps, execute, seed, threads, device, fused, registry
        )
        # Printed before it is noted: where that fails, it was not in vain.
        print(_document(found) if as_json else _lines(found, reference), flush=True)
        if not no_push and version is not None and base is None:
            version.registry.annotate(version.reference, metrics=found.metrics)
            if not as_json:
                print(f"noted {len(found.metrics)} metrics with {version.reference}")
    except RegistryError as error:
        print(f"pdp.evaluate: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _document(found: Evaluation) -> str:
    worlds = {
        world: {name: [mean, half if math.isfinite(half) else None] for name, (mean, half) in measures.items()}
        for world, measures in found.worlds.items()
    }
    return json.dumps({**asdict(found), "worlds": worlds}, sort_keys=True, allow_nan=False)


def _lines(found: Evaluation, what: str) -> str:
    lines = [f"{found.reference or what}: {found.rollouts} roll-outs of {found.steps} steps in {found.seconds:.1f} s"]
    for world, measures in found.worlds.items():
        cells = []
        for name, (mean, half) in measures.items():
            cells.append(f"{name} {mean:.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else ""))
        lines.append(f"{world:16}" + "  ".join(cells))
    return "\n".join(lines)


def main() -> None:
    """The command. Exit codes are those of the registry's error tree; 2 is wrong usage, 130 an interrupt."""
    try:
        command.main(prog_name="python -m pdp.evaluate", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        print("pdp.evaluate: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
