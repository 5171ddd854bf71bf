from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_a_pull_gives_the_very_files_back(run: Run, here: Path, artifacts: Path) -> None:
    ran = run("pull", "walk/perturb:prod", "back")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("pulled walk/perturb@2 to back  (2 files, ")
    for file in (artifacts / "second").iterdir():
        assert (here / "back" / file.name).read_bytes() == file.read_bytes()


def test_json_of_a_pull_names_every_file(run: Run, here: Path) -> None:
    document = run("pull", "walk/base", "base.safetensors", "--json").json
    digest = run("show", "walk/base", "--json").json["digest"]
    size = (here / "base.safetensors").stat().st_size
    assert document == {
        "name": "walk/base",
        "version": 1,
        "digest": digest,
        "path": "base.safetensors",
        "files": ["base.safetensors"],
        "bytes": size,
    }


def test_a_pull_as_peft_has_a_config(run: Run, here: Path) -> None:
    assert run("pull", "walk/perturb@1", "peft", "--format", "peft").code == 0
    assert json.loads((here / "peft" / "adapter_config.json").read_text())["r"] == 4


def test_a_base_has_no_peft_form(run: Run, here: Path) -> None:
    ran = run("pull", "walk/base", "peft", "--format", "peft", "--json")
    assert (ran.code, "pull it as native" in ran.error) == (3, True)
    assert list(here.iterdir()) == []


def test_a_pull_does_not_overwrite_without_force(run: Run, here: Path) -> None:
    (here / "mine").write_text("mine")
    ran = run("pull", "walk/base", "mine")
    assert (ran.code, "--force" in ran.error) == (5, True)
    assert (here / "mine").read_text() == "mine"
    assert run("pull", "walk/base", "mine", "--force").code == 0
    assert (here / "mine").stat().st_size > 1000


def test_another_format_is_wrong_usage(run: Run, here: Path) -> None:
    assert run("pull", "walk/base", "x", "--format", "onnx").code == 2
