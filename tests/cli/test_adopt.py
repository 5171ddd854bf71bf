from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from registry import Registry
from tests.cli.artifacts import write_adapter, write_base
from tests.cli.conftest import Run, finished, start


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A base, two adapters on it of which one is a copy of the other, one with NaN, and a note."""
    folder = tmp_path / "Team Runs"
    folder.mkdir()
    write_base(folder / "walker.safetensors", seed=9)
    write_adapter(folder / "carry", seed=11, base_model_name_or_path="models/walker")
    shutil.copytree(folder / "carry", folder / "copy of carry")
    write_adapter(folder / "stairs", seed=12, nan=True, base_model_name_or_path="acme/other")
    (folder / "notes.md").write_text("notes")
    return folder


def test_a_dry_run_shows_the_plan_and_writes_nothing(run: Run, here: Path, tree: Path) -> None:
    before = run("list").out
    ran = run("adopt", tree, "--dry-run")
    assert ran.code == 0
    assert [line.split(maxsplit=3)[0] for line in ran.out.splitlines()] == [
        *("PATH", "walker.safetensors", "carry", "copy", "stairs")
    ]
    lines = ran.out.splitlines()
    assert "team-runs/carry" in lines[2]
    assert "walker.safetensors" in lines[2]
    assert lines[2].endswith("new: recorded as models/walker, and all targets are there")
    assert "undecided" in lines[4]
    assert f"4 new in {tree}\n" in ran.err
    assert "no artifacts: 1 texts\n" in ran.err
    assert run("list").out == before


def test_adopting_tells_the_verdict_of_each(run: Run, here: Path, tree: Path) -> None:
    ran = run("adopt", tree, "--namespace", "team")
    assert ran.code == 0
    said = {line.split("  ")[0]: line for line in ran.out.splitlines()[1:]}
    assert said["carry"].endswith("adopted as team/carry@1")
    assert "team/walker@1" in said["carry"]
    assert said["copy of carry"].endswith("duplicate: same content as team/carry@1, from carry")
    assert "adopted as team/stairs@1, 1 finding: no base: 2 bases have all its targets" in said["stairs"]
    assert "3 adopted, 1 duplicate" in ran.err
    assert "1 adapters have no base; the table says why" in ran.err
    again = run("adopt", tree, "--namespace", "team")
    assert again.code == 0
    assert "3 there, 1 duplicate" in again.err
    assert "0 B added to the store" in again.err
    assert run("list", "team/*", "--where", "meta.adopted_from = carry").out.count("team/carry") == 1


def test_json_of_an_adoption_is_the_contract(run: Run, here: Path, tree: Path) -> None:
    ran = run("adopt", tree, "--json")
    assert ran.code == 0
    assert set(ran.json) == {
        *("root", "namespace", "dry_run", "whole", "verdicts", "bytes_new", "items", "skipped", "counted")
    }
    assert ran.json["namespace"] == "team-runs"
    item = next(item for item in ran.json["items"] if item["path"] == "carry")
    assert set(item) == {
        *("path", "form", "kind", "name", "step", "size", "external", "verdict", "reference", "why", "base"),
        *("guess", "continued_from", "findings", "bytes_new", "notes"),
    }
    assert (item["verdict"], item["reference"], item["base"]) == ("adopted", "team-runs/carry@1", "team-runs/walker@1")
    assert item["guess"] == {
        "how": "recorded",
        "recorded": "models/walker",
        "bases": ["walker.safetensors"],
        "why": "recorded as models/walker, and all targets are there",
    }


def test_something_broken_is_exit_code_1_and_the_rest_is_in(run: Run, here: Path, tree: Path) -> None:
    (tree / "carry/adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    ran = run("adopt", tree)
    assert ran.code == 1
    assert "Git LFS pointer" in next(line for line in ran.out.splitlines() if line.startswith("carry "))
    assert "3 adopted, 1 broken" in ran.err
    assert run("show", "team-runs/copy-of-carry").code == 0


def test_what_is_wrong_with_the_folder_is_one_line(run: Run, here: Path, tree: Path) -> None:
    assert run("adopt", tree / "gone").error == f"no such folder: {tree / 'gone'}"
    assert "is a file; push it" in run("adopt", tree / "walker.safetensors").error
    assert run("adopt", tree, "--namespace", "Team").code == 3


@pytest.mark.parametrize(("size", "external"), [("1", True), ("1.5k", True), ("2MiB", False), ("none", False)])
def test_bases_over_a_size_are_recorded_as_external(
    run: Run, here: Path, tree: Path, size: str, external: bool
) -> None:
    ran = run("adopt", tree, "--external-over", size, "--json")
    item = next(item for item in ran.json["items"] if item["kind"] == "base")
    assert item["external"] is external


@pytest.mark.parametrize("size", ["", "much", "-1", "1X", "nan", "inf"])
def test_a_size_that_is_none_is_wrong_usage(run: Run, here: Path, tree: Path, size: str) -> None:
    assert run("adopt", tree, "--external-over", size).code == 2


def test_a_hostile_name_steers_no_terminal(run: Run, here: Path, tree: Path) -> None:
    (tree / "carry").rename(tree / "\x1b[31mred\u202e")
    ran = run("adopt", tree)
    assert "\x1b" not in ran.out + ran.err
    assert "\u202e" not in ran.out + ran.err
    assert "\\x1b[31mred\\u202e" in ran.out


@pytest.mark.exhaustive
def test_an_interrupted_adoption_says_how_it_goes_on(here: Path, tree: Path, tmp_path: Path) -> None:
    for number in range(100):
        write_adapter(tree / f"more-{number}", seed=1000 + number)
    process = start("adopt", tree, cwd=here)
    with Registry.open(tmp_path / "registry") as registry:
        while len(registry.find(pattern="team-runs/*")) < 3:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        ran = finished(process)
        assert ran.code == 130
        assert ran.err.splitlines() == [
            "what was adopted so far stays; the same command goes on from there",
            "registry: interrupted",
        ]
        there = len(registry.find(pattern="team-runs/*"))
        assert 3 <= there < 100
        document = json.loads(finished(start("adopt", tree, "--json", cwd=here)).out)
        assert document["verdicts"] == {"there": there, "adopted": 103 - there, "duplicate": 1}
