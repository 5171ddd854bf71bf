"""The pictures of docs/cheetah.md: bars and curves from a file of results by matplotlib, and the cheetah itself by
MuJoCo with policies out of a registry. Each is under 1 MB, and the same thing has the same colour in all of them.

    python -m examples.cheetah.pictures --results docs/cheetah/results.json --registry .registry
    python -m examples.cheetah.pictures --only film --world mass
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from examples.cheetah.charts import CHARTS, WORLDS, read_results
from examples.cheetah.film import (
    CONTROL_SECONDS,
    PicturesUnavailable,
    Run,
    Stage,
    film_strip,
    gait_frames,
    record,
    write_gif,
)
from registry.core.errors import RegistryError

FOLDER = Path("docs/cheetah")
FILMS = {"film": "film.png", "gait": "gait.gif"}
BASE, ADAPTER = "registry://cheetah/base:v1", "registry://cheetah/{world}:prod"


def make_chart(name: str, results: Mapping[str, Any], folder: Path) -> Path:
    path = folder / f"{name}.png"
    # matplotlib's version in the file would change its bytes.
    CHARTS[name](results).savefig(path, metadata={"Software": None})
    return path


def make_films(names: Sequence[str], registry: str | None, folder: Path, world: str = "gear") -> list[Path]:
    """Of base and adapter, from the same start.

    Raises:
        PicturesUnavailable
        NotFound: the registry has no such version.
    """
    runs: list[Run] = []
    paths = []
    for name in names:
        with Stage(world, *((240, 200) if name == "film" else (320, 180))) as stage:
            # The stage comes first: where none can be had, nobody waits for the runs.
            runs = runs or _runs(registry, world)
            path = folder / FILMS[name]
            if name == "film":
                film_strip(stage, runs).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            else:
                write_gif(gait_frames(stage, runs), path, CONTROL_SECONDS)
        paths.append(path)
    return paths


def _runs(registry: str | None, world: str) -> list[Run]:
    from pdp.policy import DiffusionPolicy

    adapter = ADAPTER.format(world=world)
    labels = (("base", BASE, f"base in the world {world}"), ("lora", adapter, f"base + LoRA {adapter[11:]}"))
    return [
        record(DiffusionPolicy.from_checkpoint(url, registry=registry), what, label, world)
        for what, url, label in labels
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit codes are those of the registry's error tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER / "results.json")
    parser.add_argument("--registry", help="with the policies; else as the command registry finds it")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they are made")
    parser.add_argument("--only", choices=(*CHARTS, *FILMS), metavar="NAME", help="%(choices)s")
    parser.add_argument("--world", choices=WORLDS[1:], default="gear", help="of film and gait")
    given = parser.parse_args(arguments)
    charts = [name for name in CHARTS if given.only in (None, name)]
    films = [name for name in FILMS if given.only in (None, name)]
    try:
        results = read_results(given.results, charts) if charts else {}
        given.folder.mkdir(parents=True, exist_ok=True)
        for name in charts:
            print(f"wrote {make_chart(name, results, given.folder)}", flush=True)
        try:
            for path in make_films(films, given.registry, given.folder, given.world):
                print(f"wrote {path}")
        except PicturesUnavailable as error:
            missing = " and ".join(FILMS[name] for name in films)
            print(f"WARNING: {missing} NOT made: {error}", file=sys.stderr)
            return error.exit_code if given.only else 0
    except RegistryError as error:
        print(f"pictures: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
