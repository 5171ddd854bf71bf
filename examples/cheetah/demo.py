"""The study in its reduced form, for `make demo`: trains a base and two LoRAs for real, prints its tables, and shows
how the registry chooses while a policy runs. About two minutes on two cores.

    python -m examples.cheetah.demo [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy
from click.testing import CliRunner

from examples.cheetah.forms import REDUCED
from examples.cheetah.report import Results, at_home, costs, merging, speeds
from examples.cheetah.study import Place, quiet, run_study, switching_piece
from registry import Registry
from registry.cli.app import app


def title(text: str) -> None:
    print(f"\n# {text}", flush=True)


def shell(*words: str) -> None:
    """A command of the registry, and what it prints."""
    print(f"$ registry {' '.join(words)}")
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "120"})
    print(done.stdout, end="")
    if done.exit_code:
        sys.exit(f"registry {words[0]} ended with {done.exit_code}: {done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave everything there")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        show(given.keep or Path(temporary), given.processes)


def show(folder: Path, processes: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    quiet()
    place = Place(REDUCED, str(folder.absolute() / "registry"), folder.absolute() / "work")
    title("A diffusion policy imitates a running cheetah; LoRAs for worlds with weak motors and with more mass")
    results = Results(run_study(place, processes))
    (folder / "results.json").write_text(json.dumps(results.found), encoding="utf-8")
    for table in (speeds, at_home, costs, merging):
        print(f"\n{table(results)}")

    title("The registry chooses")
    os.environ["REGISTRY_URL"] = place.registry
    shell("list", "cheetah/*", "--where", "metric.speed > 3", "--sort", "-metric.speed")
    shell("fits", "cheetah/base", "--where", "tag = prod")
    with Registry.open(place.registry) as registry:
        best = registry.find("metric.gear/speed > 0", "kind = adapter", order_by="-metric.gear/speed")[0]
    print(f"fastest with weak motors: {best.reference}, {best.metrics['gear/speed']:.2f} m/s")

    title("An adapter is loaded into a policy that runs, and taken off again")
    switched = switching_piece(place, "gear")
    speed = numpy.array(switched["speed"])
    moments = [0, switched["loaded_at"], switched["unloaded_at"], speed.shape[1]]
    for name, begin, end in zip(("base", "with cheetah/gear:prod", "base again"), moments, moments[1:], strict=False):
        # The second half of each, when it has found its gait.
        print(f"{name:24} {speed[:, (begin + end) // 2 : end].mean():.2f} m/s")


if __name__ == "__main__":
    main()
