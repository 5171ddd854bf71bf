"""The whole study by one command: a base, a LoRA and a full fine-tuning for each changed world, merged adapters, and
how all of them run. Everything is pushed to a registry and looked up there; the numbers go to a file that tables and
pictures are made from.

    python -m examples.cheetah.study                  in full: 3 training seeds, 35 to 40 minutes on 2 cores
    python -m examples.cheetah.study --form reduced   two worlds, one seed, about two minutes
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from examples.cheetah.demonstrations import Recipe, write
from examples.cheetah.expert import Expert
from examples.cheetah.forms import FORMS, METHODS, Form
from examples.cheetah.worlds import ORIGINAL

CONFIG = Path(__file__).parent / "config"
RESULTS = Path("docs/cheetah/results.json")
ROLLOUT_SEED = 20_000
"""Of all roll-outs' starts and noise: not one that data were made with or an expert was chosen by."""


@dataclass
class Part:
    """What one piece of the work found; see `docs/cheetah/results.json`."""

    records: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    similarity: list[dict[str, Any]] = field(default_factory=list)
    made: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Part) -> None:
        for name, value in vars(other).items():
            getattr(self, name).extend(value)


@dataclass(frozen=True)
class Place:
    """Where a study works.

    Attributes:
        registry: what `Registry.open` takes.
        folder: of data sets and of what training writes.
    """

    form: Form
    registry: str
    folder: Path

    def data(self, seed: int, *worlds: str) -> Path:
        """The data set of a world, or of several; made where it is not there."""
        recipes = [self._recipe(world, seed) for world in worlds]
        sizes = "x".join(f"{one.episodes}.{one.steps}" for one in recipes)
        path = self.folder / f"{'-and-'.join(worlds)}-{sizes}-{seed}.zarr"
        if not path.exists():
            write(path, recipes)
        return path

    def _recipe(self, world: str, seed: int) -> Recipe:
        original = world == ORIGINAL
        episodes, steps = self.form.base_data if original else self.form.adapter_data
        return Recipe(world, episodes, steps, 0.3 if original else 0.2, seed)


# ---------------------------------------------------------------- training and acting


@dataclass(frozen=True)
class Trained:
    """A training's outcome.

    Attributes:
        url: of the version that was pushed.
        parameters: that were trained.
        seconds: of processor time, on the one thread that it uses: data read, trained, pushed.
        curve: `step` and mean `speed` on the way.
    """

    url: str
    parameters: int
    seconds: float
    curve: list[dict[str, Any]]


def train(place: Place, config: str, overrides: Iterable[str], *, curve_of: str | None = None) -> Trained:
    """Trains as a file in `config/` says, as `python -m pdp.train` does it.

    Args:
        curve_of: stop every `form.curve_every` steps and see how the policy runs in this world.
    """
    from hydra import compose, initialize_config_dir

    from pdp.train import CONFIG_FOLDER
    from pdp.workspace import DiffusionPolicyWorkspace

    with initialize_config_dir(config_dir=str(CONFIG.absolute()), version_base="1.3"):
        cfg = compose(config, [f"hydra.searchpath=[file://{CONFIG_FOLDER}]", "logging.progress=false", *overrides])
    folder = place.folder / f"run-{os.getpid()}-{time.monotonic_ns()}"
    curve, seconds, began = [], 0.0, time.process_time()
    run = DiffusionPolicyWorkspace(cfg, folder, registry=place.registry)
    steps = cfg.training.max_steps
    for end in range(0, steps, place.form.curve_every) if curve_of else ():
        # A run that stops on its way is, bit for bit, the run that does not.
        if end:
            run.run(until_step=end)
        seconds += time.process_time() - began
        curve.append({"step": end, "speed": speed_of(place, run, curve_of)})
        began = time.process_time()
    run.run()
    seconds += time.process_time() - began
    if curve_of:
        curve.append({"step": steps, "speed": speed_of(place, run, curve_of)})
    parameters = sum(one.numel() for one in run.model.parameters() if one.requires_grad)
    return Trained(run.pushed[0], parameters, seconds, curve)


def act(place: Place, reference: str, worlds: Sequence[str], **said: Any) -> list[dict[str, Any]]:
    """Rolls a version out in worlds, and notes the metrics with it."""
    from pdp.evaluate import evaluate

    form = place.form
    found = evaluate(
        f"registry://{reference}",
        worlds,
        task=form.task,
        rollouts=form.rollouts,
        seed=ROLLOUT_SEED,
        fused=True,
        registry=place.registry,
    )
    return [
        {
            **said,
            "world": world,
            "rollouts": form.rollouts,
            **{name: measures[name][0] for name in ("speed", "success", "upright")},
        }
        for world, measures in found.worlds.items()
    ]


def made(place: Place, url: str, seconds: float, parameters: int, **said: Any) -> dict[str, Any]:
    """What a version cost."""
    from registry import Registry

    with Registry.open(place.registry) as registry:
        version = registry.show(url.removeprefix("registry://")).found.record
    return {
        **said,
        "reference": version.reference,
        "seconds": seconds,
        "parameters": parameters,
        "bytes": version.size,
        "bytes_new": version.bytes_new,
    }


def experts(form: Form, worlds: Sequence[str]) -> Part:
    """The experts themselves, from the same starts."""
    from pdp.rollout import mean_and_interval

    part = Part()
    for world in worlds:
        expert, simulation = Expert.load(world), form.task.simulation([world] * form.rollouts)
        obs = simulation.reset(ROLLOUT_SEED)
        for _ in range(form.task.steps):
            obs = simulation.step(expert.act(obs))
        measures = {name: mean_and_interval(values) for name, values in simulation.measures().items()}
        said = {"what": "expert", "trained_on": world, "world": world, "seed": None, "rollouts": form.rollouts}
        means = {name: mean for name, (mean, _) in measures.items()}
        part.records.append({**said, **means, "speed_ci95": measures["speed"][1]})
    return part


# ---------------------------------------------------------------- the pieces, each in a process of its own


def base_piece(place: Place, seed: int) -> Part:
    form = place.form
    tag = "v1" if seed == form.seeds[0] else f"seed-{seed}"
    overrides = [
        f"dataset.path={place.data(seed, ORIGINAL)}",
        f"training.seed={seed}",
        f"registry.push_policy=registry://cheetah/base:{tag}",
        *form.base,
    ]
    trained = train(place, "cheetah_base", overrides)
    said = {"what": "base", "trained_on": ORIGINAL, "seed": seed}
    worlds = [ORIGINAL, *form.worlds, *(f"{a}-{b}" for a, b in form.pairs)]
    cost = made(place, trained.url, trained.seconds, trained.parameters, **said)
    return Part(act(place, f"cheetah/base:{tag}", worlds, **said), made=[cost])


def world_piece(place: Place, seed: int, world: str, what: str) -> Part:
    """A LoRA (`lora`) or a full fine-tuning (`full`) for one world."""
    form = place.form
    tag = "prod" if seed == form.seeds[0] else f"seed-{seed}"
    base = f"registry://cheetah/base:{'v1' if seed == form.seeds[0] else tag}"
    name = f"cheetah/{world}" if what == "lora" else f"cheetah/{world}-full"
    begin = "policy.lora.base_model_path" if what == "lora" else "policy.init_from"
    push = "registry.push_adapter" if what == "lora" else "registry.push_policy"
    overrides = [
        f"{begin}={base}",
        f"{push}=registry://{name}:{tag}",
        f"dataset.path={place.data(seed, world)}",
        f"dataset.world={world}",
        f"training.seed={seed}",
        *form.adapter,
    ]
    part = Part()
    trained = train(place, f"cheetah_{what}", overrides, curve_of=world if form.curves == world else None)
    part.curves += [{"what": what, "world": world, "seed": seed, **point} for point in trained.curve]
    said = {"what": what, "trained_on": world, "seed": seed}
    part.made.append(made(place, trained.url, trained.seconds, trained.parameters, **said))
    worlds = [world, ORIGINAL]
    if what == "lora":  # its pairs as well: what merged adapters are compared with
        both = [pair for pair in form.pairs if world in pair]
        worlds += [other for pair in both for other in pair if other != world] + [f"{a}-{b}" for a, b in both]
    part.records += act(place, f"{name}:{tag}", worlds, **said)
    return part


def pair_piece(place: Place, seed: int, pair: tuple[str, str]) -> Part:
    """Adapters of two worlds: merged by each method, and one trained on the data of both."""
    from registry import Registry

    form, name = place.form, "-".join(pair)
    first = seed == form.seeds[0]
    tag, base = ("prod", "v1") if first else (f"seed-{seed}", f"seed-{seed}")
    worlds = [*pair, name]
    part = Part()
    with Registry.open(place.registry) as registry:
        parents = [f"cheetah/{world}:{tag}" for world in pair]
        alike = registry.similarity(parents)
        part.similarity.append({"pair": list(pair), "seed": seed, **similarity_of(alike)})
        for method in form.methods:
            options: dict[str, Any] = dict(METHODS[method])
            sources = dict(zip(parents, options.pop("weights", (1.0, 1.0)), strict=True))
            began = time.process_time()
            merged = registry.merge(
                sources, f"cheetah/{name}-{method}", method=method.partition("-")[0], tags=[tag], **options
            )
            said = {"what": "merged", "method": method, "trained_on": name, "seed": seed}
            part.made.append(made(place, merged.reference, time.process_time() - began, 0, **said))
            part.records += act(place, merged.reference, worlds, **said)
    overrides = [
        f"policy.lora.base_model_path=registry://cheetah/base:{base}",
        f"registry.push_adapter=registry://cheetah/{name}-both:{tag}",
        f"dataset.path={place.data(seed, *pair)}",
        f"training.seed={seed}",
        *form.adapter,
    ]
    trained = train(place, "cheetah_lora", overrides)
    said = {"what": "both", "trained_on": name, "seed": seed}
    part.made.append(made(place, trained.url, trained.seconds, trained.parameters, **said))
    part.records += act(place, f"cheetah/{name}-both:{tag}", worlds, **said)
    return part


def similarity_of(found: Any) -> dict[str, float]:
    [pair] = found.pairs
    return {"cosine": pair.overall.cosine, "conflict": pair.overall.weighted_conflict}


def speed_of(place: Place, run: Any, world: str) -> float:
    """Mean speed of the policy that a run would push now, measured as all others are."""
    from pdp.policy import DiffusionPolicy
    from pdp.rollout import roll_out

    policy = DiffusionPolicy.from_checkpoint(run.save_policy(run.output_dir / "now.pth"))
    simulation = place.form.task.simulation([world] * place.form.rollouts)
    found = roll_out(
        policy, simulation, steps=place.form.task.steps, execute=place.form.task.execute, seed=ROLLOUT_SEED
    )
    return float(found.measures["speed"].mean())


def switching_piece(place: Place, world: str) -> dict[str, Any]:
    """Loads an adapter into a policy that runs, and takes it off again: forward speed at each control step."""
    from pdp.policy import DiffusionPolicy
    from pdp.rollout import roll_out

    adapter, loaded_at, unloaded_at, steps = f"cheetah/{world}:prod", 100, 200, 300
    policy = DiffusionPolicy.from_checkpoint("registry://cheetah/base:v1", registry=place.registry)
    task = place.form.task
    simulation = task.simulation([world] * place.form.rollouts)
    way = []

    def watch(step: int) -> None:
        way.append(simulation.way())
        if step == loaded_at:
            policy.load_adapter(f"registry://{adapter}", registry=place.registry)
        if step == unloaded_at:
            policy.unload_adapter()

    roll_out(policy, simulation, steps=steps, execute=task.execute, seed=ROLLOUT_SEED, watch=watch)
    way.append(simulation.way())
    speed = numpy.diff(numpy.stack(way, axis=1), axis=1) / simulation.batch.control_seconds
    return {
        "world": world,
        "adapter": adapter,
        "control_seconds": simulation.batch.control_seconds,
        "loaded_at": loaded_at,
        "unloaded_at": unloaded_at,
        "speed": [[round(float(one), 3) for one in row] for row in speed],
    }


# ---------------------------------------------------------------- all of it


def run_study(place: Place, processes: int) -> dict[str, Any]:
    """Everything of a form.

    Returns:
        What `docs/cheetah/results.json` holds.
    """
    from registry import Registry

    form = place.form
    began = time.perf_counter()
    place.folder.mkdir(parents=True, exist_ok=True)
    Registry.init(place.registry).close()
    whole = experts(form, [ORIGINAL, *form.worlds, *("-".join(pair) for pair in form.pairs)])
    whats = ("lora", "full") if form.full else ("lora",)
    rounds: list[list[Callable[[], Part]]] = [
        [partial(base_piece, place, seed) for seed in form.seeds],
        [
            partial(world_piece, place, seed, world, what)
            for what in whats
            for world in form.worlds
            for seed in form.seeds
        ],
        [partial(pair_piece, place, seed, pair) for pair in form.pairs for seed in form.seeds],
    ]
    # Data before the processes part: two that need the same would both make it.
    for seed in form.seeds:
        for world in (ORIGINAL, *form.worlds):
            place.data(seed, world)
    tell(f"{len(form.seeds) * (len(form.worlds) + 1)} data sets", began)
    # Fresh processes: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=quiet) as pool:
        for pieces in rounds:
            for future in [pool.submit(piece) for piece in pieces]:
                part = future.result()
                whole.add(part)
                for one in part.made:
                    tell(one["reference"], began)
    found = vars(whole)
    if form.curves:
        found["switching"] = switching_piece(place, form.curves)
    found["form"] = {
        "seeds": list(form.seeds),
        "rollouts": form.rollouts,
        "steps": form.task.steps,
        "execute": form.task.execute,
    }
    found["minutes"] = (time.perf_counter() - began) / 60
    found["processor_minutes"] = processor_seconds() / 60
    found["processes"] = processes
    return found


def processor_seconds() -> float:
    """Of this process and of those that it had."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def quiet() -> None:
    """One thread for each process, and no word of alembic's."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def tell(what: str, began: float) -> None:
    print(f"{time.perf_counter() - began:6.0f} s  {what}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, default="full")
    parser.add_argument("--folder", type=Path, help="of registry, data and runs; by default .cheetah/FORM")
    parser.add_argument("--results", type=Path, help=f"by default {RESULTS}, of another form in its folder")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    quiet()
    folder = (given.folder or Path(".cheetah") / given.form).absolute()
    results = given.results or (RESULTS if given.form == "full" else folder / "results.json")
    place = Place(FORMS[given.form], str(folder / "registry"), folder / "work")
    refuse_leftovers(place)
    results.parent.mkdir(parents=True, exist_ok=True)
    found = run_study(place, given.processes)
    results.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{found['minutes']:.1f} minutes, {found['processor_minutes']:.1f} of a processor; wrote {results}")


def refuse_leftovers(place: Place) -> None:
    """A registry in which versions are already would mix two studies under the same names."""
    if Path(place.registry).exists():
        sys.exit(f"{place.registry} is there already; take it away, or give another --folder")


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
