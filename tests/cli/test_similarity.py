"""`registry similarity`: a line a pair, the modules, JSON, and notes."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run


def test_a_line_for_each_pair_and_the_modules_below(run: Run, here: Path) -> None:
    ran = run("similarity", "walk/perturb@1", "walk/perturb@2", "walk/perturb@3", "--modules")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].split()[:4] == ["A", "B", "COSINE", "WRITES"]
    assert sum(line.startswith("walk/perturb@1  walk/perturb@") for line in lines) == 2
    assert sum("q_proj" in line for line in lines) == 3


def test_json_has_every_pair_and_module(run: Run, here: Path) -> None:
    found = run("similarity", "--where", "base = walk/base", "--json").json
    assert found["adapters"] == ["walk/perturb@2", "walk/perturb@1"]
    (pair,) = found["pairs"]
    assert -1 <= pair["cosine"] <= 1
    assert {one["module"] for one in pair["modules"]} == {"q_proj", "v_proj"}


def test_one_adapter_is_refused(run: Run, here: Path) -> None:
    ran = run("similarity", "walk/perturb@1")
    assert (ran.code, "two or more" in ran.err) == (3, True)
