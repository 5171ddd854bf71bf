"""Ctrl-C at every stage of a push, a pull and an init: no temporary file stays, nothing half is visible, and the same
object goes on working."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from registry import Registry
from registry.core.errors import ArtifactNotFound
from tests.failures.stages import acting_at, ctrl_c, interrupted_at_every_stage
from tests.failures.support import own_process, peft_folder, photograph, quick_folder, succeeds_alone, warm_up, whole

WHEN = pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.exhaustive)])


def interrupted_pushes(template: str, when: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        source = peft_folder(folder / "adapter")
        root = Path(shutil.copytree(template, folder / "registry"))
        registry = Registry.open(root)

        def push() -> str:
            return registry.push(source, "walk/new", base="walk/base", tags=["prod"], metrics={"reward": 1}).digest

        expected = push()

        def prepare(_: int) -> Callable[[], object]:
            registry.close()
            shutil.rmtree(root)
            shutil.copytree(template, root)
            return push

        found = {"absent": 0, "whole": 0}
        # Statements only once: to be cut off after one is the harder case, as a query may then still be open.
        for _ in interrupted_at_every_stage(prepare, after=when == "after", statements=when == "after"):
            assert not any((root / "tmp").iterdir()), "a temporary file was left"
            try:
                registry.get("walk/new")
            except ArtifactNotFound:
                found["absent"] += 1
            else:
                found["whole"] += 1
                Registry.open(root).close()
                whole(registry, root, "walk/new")
            assert push() == expected
            whole(registry, root, "walk/new")
        assert found["absent"] > 20, found
        assert found["whole"] > 5, found
        registry.close()
        print(found)


@WHEN
def test_a_push_that_is_interrupted_at_any_stage_leaves_nothing_half(template: Path, when: str) -> None:
    print(succeeds_alone(interrupted_pushes, template, when))


def interrupted_pulls(template: str, when: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        root = Path(shutil.copytree(template, folder / "registry"))
        out = folder / "out"
        out.mkdir()
        with Registry.open(root) as registry:
            registry.push(peft_folder(folder / "adapter"), "walk/new", base="walk/base")
            before = photograph(root)
            for number in interrupted_at_every_stage(
                lambda number: partial(registry.pull, "walk/new", out / str(number)), after=when == "after"
            ):
                left = sorted(path.name for path in out.iterdir())
                assert left in ([], [str(number)]), f"left behind: {left}"
                if left:  # it came after the one rename
                    assert len(list((out / left[0]).iterdir())) == 2
                    shutil.rmtree(out / left[0])
            assert photograph(root) == before
            assert number > 5
            print(number)


@WHEN
def test_a_pull_that_is_interrupted_at_any_stage_leaves_all_or_nothing(template: Path, when: str) -> None:
    print(succeeds_alone(interrupted_pulls, template, when))


def interrupted_inits() -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        source = peft_folder(folder / "adapter")

        def prepare(number: int) -> Callable[[], object]:
            return lambda: Registry.init(folder / str(number)).close()

        for number in interrupted_at_every_stage(prepare, after=True):
            tmp = folder / str(number) / "tmp"
            assert not tmp.exists() or not any(tmp.iterdir()), "a temporary file was left"
            with Registry.init(folder / str(number)) as registry:
                assert registry.push(source, "walk/new").created
            shutil.rmtree(folder / str(number))
        assert number > 20
        print(number)


@pytest.mark.exhaustive
def test_an_init_that_is_interrupted_at_any_stage_can_be_done_again() -> None:
    print(succeeds_alone(interrupted_inits))


def interrupted_command(stage: str, *arguments: str) -> None:
    """The command line as a user runs it, with a Ctrl-C at this stage."""
    from registry.cli.main import main

    sys.argv = ["registry", *arguments]
    with acting_at(int(stage), ctrl_c):
        main()


@pytest.mark.parametrize("stage", [1, 8, 25, 40])
def test_a_command_that_is_interrupted_exits_with_130_and_one_line(root: Path, tmp_path: Path, stage: int) -> None:
    source = peft_folder(tmp_path / "adapter")
    done = own_process(interrupted_command, stage, "push", source, "walk/new", "--registry", root)
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert "interrupted" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not any((root / "tmp").iterdir())
