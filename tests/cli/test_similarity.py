"""`registry similarity`: a line a pair, the matrix, verdicts, the modules, JSON, notes, and refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from registry import Registry
from tests.cli.artifacts import write_adapter
from tests.cli.conftest import CHECKOUT, Run


def test_two_adapters_are_one_line_and_a_verdict(run: Run, here: Path) -> None:
    ran = run("similarity", "walk/perturb@1", "walk/perturb@2")
    assert (ran.code, ran.err) == (0, "")
    header, line, empty, verdict = ran.out.splitlines()
    assert header.split() == ["A", "B", "COSINE", "WRITES", "READS", "CONFLICT", "BY", "SIZE", "SHARED"]
    assert line.split()[:2] == ["walk/perturb@1", "walk/perturb@2"]
    assert line.split()[-1] == "2/2"
    assert empty == ""
    assert verdict.startswith("walk/perturb@1 and walk/perturb@2: nearly orthogonal: a plain sum keeps both (")
    assert verdict.endswith("; random subspaces would share 0.250 in writes, 0.250 in reads")


def test_more_than_two_are_a_line_for_each_pair_and_a_symmetric_matrix(run: Run, here: Path) -> None:
    ran = run("similarity", "walk/perturb@1", "walk/perturb@2", "walk/perturb@3")
    assert ran.code == 0
    lines = ran.out.splitlines()
    pairs = [line.split() for line in lines if line.startswith("walk/") and " and " not in line]
    assert [tuple(words[:2]) for words in pairs] == [
        ("walk/perturb@1", "walk/perturb@2"),
        ("walk/perturb@1", "walk/perturb@3"),
        ("walk/perturb@2", "walk/perturb@3"),
    ]
    start = next(place for place, line in enumerate(lines) if re.fullmatch(r"COSINE +1 +2 +3", line))
    rows = [line.split()[2:] for line in lines[start + 1 : start + 4]]
    assert rows == [
        [pairs[0][2], pairs[1][2]],
        [pairs[0][2], pairs[2][2]],
        [pairs[1][2], pairs[2][2]],
    ]
    assert sum(" and walk/" in line for line in lines) == 3


def test_modules_are_the_most_opposed_first(run: Run, here: Path, artifacts: Path) -> None:
    ran = run("similarity", "walk/perturb@1", "walk/perturb@2", "walk/perturb@3", "--modules")
    assert ran.code == 0
    rows = [line.split() for line in ran.out.splitlines() if "_proj" in line]
    assert len(rows) == 6
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert {first[0], second[0]} == {"q_proj", "v_proj"}
        assert float(first[1]) <= float(second[1])
    assert ran.out.count("MODULE  COSINE  WRITES  CHANCE  READS  CHANCE  CONFLICT  BY SIZE") == 3


@pytest.mark.parametrize("columns", [60, 80])
def test_a_terminal_of_any_width_has_all_of_it(run: Run, here: Path, columns: int) -> None:
    ran = run("similarity", "walk/perturb@1", "walk/perturb@2", "walk/perturb@3", "--modules", columns=columns)
    assert (ran.code, ran.err) == (0, "")
    if columns == 80:
        assert max(map(len, ran.out.splitlines())) <= columns


def test_json_has_every_pair_and_module(run: Run, here: Path) -> None:
    found = run("similarity", "--where", "base = walk/base", "--json").json
    assert found["adapters"] == ["walk/perturb@2", "walk/perturb@1"]
    assert found["notes"] == []
    (pair,) = found["pairs"]
    assert -1 <= pair["cosine"] <= 1
    assert pair["by_chance"] == [0.25, 0.25]
    assert {one["module"] for one in pair["modules"]} == {"q_proj", "v_proj"}
    assert pair["verdict"].startswith("nearly orthogonal")


def test_what_was_not_compared_is_a_note_for_each_reason(run: Run, here: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "pissa", seed=6, init_lora_weights="pissa")
    with Registry.open(os.environ["REGISTRY_URL"]) as registry:
        registry.push(tmp_path / "pissa", "walk/pissa", force=True)
    ran = run("similarity", "walk/perturb@1", "walk/pissa")
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == ("walk/perturb@1 and walk/pissa@1: they share no module that could be compared")
    (note,) = ran.err.splitlines()
    assert note.startswith("note: q_proj, v_proj of walk/perturb@1 and walk/pissa@1 were not compared: walk/pissa@1: ")
    assert "changed the base weight" in note


def test_a_sample_says_how_large_it_is(run: Run, here: Path, tmp_path: Path) -> None:
    with Registry.open(os.environ["REGISTRY_URL"]) as registry:
        for seed in (1, 2):
            folder = write_adapter(tmp_path / str(seed), seed=seed)
            tensors = load_file(folder / "adapter_model.safetensors")
            generator = np.random.default_rng(seed)
            large = {
                name: generator.normal(size=(4, 1500) if "lora_A" in name else (1500, 4)).astype(np.float32)
                for name in tensors
            }
            save_file(large, folder / "adapter_model.safetensors")
            registry.push(folder, f"walk/large{seed}")
    ran = run("similarity", "walk/large1", "walk/large2")
    assert ran.code == 0
    (note,) = ran.err.splitlines()
    assert note == (
        "note: signs of walk/large1@1 and walk/large2@1 were compared in 20.0% of the elements: "
        "evenly spaced rows of large modules"
    )


def test_what_cannot_be_compared_is_refused(run: Run, here: Path, artifacts: Path) -> None:
    with Registry.open(os.environ["REGISTRY_URL"]) as registry:
        registry.push(artifacts / "nan", "walk/nan", force=True)
    for words, code, reason in (
        (["walk/perturb@1"], 3, "two or more"),
        (["walk/perturb:prod", "walk/perturb@2"], 3, "are one version"),
        (["walk/perturb", "walk/base"], 3, "walk/base@1 is a base"),
        (["walk/perturb", "walk/nan"], 3, "walk/nan@1: base_model.model.q_proj.lora_A.weight holds NaN"),
        (["walk/perturb", "walk/nobody"], 4, "walk/nobody"),
    ):
        ran = run("similarity", *words)
        assert ran.code == code
        assert reason in ran.error


def test_help_and_the_facade_need_no_torch() -> None:
    code = """
import sys
import registry.questions, registry.cli.similarity
from registry.cli.app import app
try:
    app(["similarity", "--help"])
finally:
    assert not {"torch", "numpy", "rich"} & set(sys.modules), sorted(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "similarity" in done.stdout
