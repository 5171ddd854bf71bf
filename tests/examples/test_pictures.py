"""The command that makes the pictures of docs/cheetah.md: results that miss something are refused in one line, and
where MuJoCo cannot draw the charts are made all the same."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples.cheetah import charts, pictures
from tests.examples.test_charts import made_up

ROOT = Path(__file__).parents[2]
NO_EGL = {"__EGL_VENDOR_LIBRARY_FILENAMES": "/nonexistent", "MUJOCO_GL": "egl"}


def test_all_charts_are_pngs_of_a_plausible_size(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(made_up()))
    results = charts.read_results(tmp_path / "results.json")
    for name in charts.CHARTS:
        path = pictures.make_chart(name, results, tmp_path)
        assert 10_000 < path.stat().st_size < charts.LIMIT
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width == 1600
            assert 600 < image.height < 2600


def test_results_that_miss_something_are_one_line_that_says_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, path = made_up(), tmp_path / "results.json"

    def refused(results: Any, *more: str) -> str:
        path.write_text(results if isinstance(results, str) else json.dumps(results))
        assert pictures.main(["--results", str(path), "--folder", str(tmp_path), *more]) == 3
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    for part, keys in charts.KEYS.items():
        assert f"{path}: {part} is missing" in refused({key: value for key, value in whole.items() if key != part})
        for key in keys:
            results = copy.deepcopy(whole)
            del (results[part] if part == "switching" else results[part][-1])[key]
            assert f": {key} is missing" in refused(results)
    assert "cannot be read as results" in refused("{")
    assert "expected an object" in refused([1])
    assert "no expert of the world" in refused(
        whole | {"records": [one for one in whole["records"] if one["what"] != "expert"]}, "--only", "merging"
    )
    assert "similarity: none of the pair gear-mass" in refused(whole | {"similarity": []}, "--only", "merging")
    assert "curves: there are none" in refused(whole | {"curves": []}, "--only", "learning")


def test_a_chart_needs_no_more_of_the_results_than_it_shows(tmp_path: Path) -> None:
    (tmp_path / "reduced.json").write_text(json.dumps({"records": made_up(seeds=1)["records"]}))
    words = ["--results", str(tmp_path / "reduced.json"), "--folder", str(tmp_path)]
    assert pictures.main([*words, "--only", "speeds"]) == 0
    assert (tmp_path / "speeds.png").is_file()
    assert pictures.main([*words, "--only", "switching"]) == 3


# ---------------------------------------------------------------- where MuJoCo cannot draw


def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "results.json").write_text(json.dumps(made_up()))
    places = ("--results", str(folder / "results.json"), "--folder", str(folder / "made"))
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "examples.cheetah.pictures", *places, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_without_egl_the_charts_are_made_and_what_is_missing_is_said_loudly(tmp_path: Path) -> None:
    done = command(tmp_path, **NO_EGL)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "made").iterdir()} == {f"{name}.png" for name in charts.CHARTS}
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING: ")]  # others may speak too
    assert line.startswith("WARNING: film.png and gait.gif NOT made: MuJoCo cannot draw with MUJOCO_GL=egl")
    assert "install libegl1" in line
    assert "MUJOCO_GL=osmesa" in line


@pytest.mark.parametrize("environment", [NO_EGL, {"MUJOCO_GL": "nonsense"}], ids=["no-egl", "wrong-name"])
def test_a_film_that_was_asked_for_and_cannot_be_made_is_an_error(tmp_path: Path, environment: dict[str, str]) -> None:
    done = command(tmp_path, "--only", "film", **environment)
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING: ")]  # others may speak too
    assert line.startswith("WARNING: film.png NOT made: MuJoCo cannot draw with MUJOCO_GL=")
