"""How long `registry list` takes, against `python -c 'import sqlalchemy, click'`; the goal is 1.1, the limit 1.5.

    python benchmarks/cli_startup.py [--runs 21] [--versions 20]

Commands run interleaved, so that whatever else the machine does falls on all of them alike. Printed are medians of wall
and processor time, each with its ratio to the first line; `(as it stands)` is `list` without `registry.cli.startup`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BASELINE = "import sqlalchemy, click"
PLAIN_LIST = """
import contextlib, registry.cli.opening
registry.cli.opening.quick_imports = contextlib.nullcontext
from registry.cli.main import main
main()
"""


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall and processor milliseconds of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1000 * wall, 1000 * processor


def fill(folder: Path, versions: int) -> None:
    """A registry with some versions of one adapter."""
    import numpy as np
    from safetensors.numpy import save_file

    from registry import Registry

    source = folder / "adapter"
    source.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_version": "0.18.0"}
    (source / "adapter_config.json").write_text(json.dumps(config))
    with Registry.init(folder / "registry") as registry:
        for number in range(versions):
            tensors = {
                "base_model.model.q_proj.lora_A.weight": np.full((4, 64), number, np.float32),
                "base_model.model.q_proj.lora_B.weight": np.full((64, 4), number, np.float32),
            }
            save_file(tensors, source / "adapter_model.safetensors")
            registry.push(source, f"bench/adapter-{number % 5}", tags=["best"], metrics={"reward": number})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--versions", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        fill(Path(name), arguments.versions)
        checkout = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {"REGISTRY_URL": f"{name}/registry", "PYTHONPATH": checkout}
        python = [sys.executable, "-m", "registry"]
        commands = {
            BASELINE: [sys.executable, "-c", BASELINE],
            "registry list": [*python, "list"],
            "registry list --json": [*python, "list", "--json"],
            "registry show REF": [*python, "show", "bench/adapter-1:best"],
            "registry log REF": [*python, "log", "bench/adapter-1:best"],
            "registry --help": [*python, "--help"],
            "registry list (as it stands)": [sys.executable, "-c", PLAIN_LIST, "list"],
        }
        taken: dict[str, list[tuple[float, float]]] = {what: [] for what in commands}
        for run in range(arguments.runs + 1):
            for what, command in commands.items():
                one = measure(command, environment)
                if run:  # the first compiles and fills caches
                    taken[what].append(one)
    medians = {what: [statistics.median(column) for column in zip(*runs, strict=True)] for what, runs in taken.items()}
    wall_base, processor_base = medians[BASELINE]
    print(f"medians of {arguments.runs} interleaved runs, {arguments.versions} versions")
    for what, (wall, processor) in medians.items():
        print(
            f"{what:30} wall {wall:5.0f} ms ({wall / wall_base:.2f})   "
            f"processor {processor:5.0f} ms ({processor / processor_base:.2f})"
        )


if __name__ == "__main__":
    main()
