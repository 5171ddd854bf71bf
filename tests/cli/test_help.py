from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

import registry
from registry.cli.app import COMMANDS, app
from registry.cli.options import FORMATS, KINDS, Command
from registry.core.manifest import KINDS as MANIFEST_KINDS
from registry.operations.pull import FORMATS as PULL_FORMATS
from tests.cli.conftest import Run


def command(name: str) -> Command:
    found = app.get_command(click.Context(app), name)
    assert isinstance(found, Command)
    return found


def examples(name: str) -> list[list[str]]:
    """Words of each example, without `registry`."""
    text = "\n".join(command(name).examples).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(run: Run, name: str) -> None:
    ran = run(name, "--help", columns=80)
    assert ran.code == 0
    assert ran.err == ""
    assert (
        re.search(rf"^Examples?:\n  registry {name} ", ran.out + " ", re.MULTILINE) or f"registry {name}\n" in ran.out
    )
    for option in ("--registry", "--json"):
        assert option in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_runs(run: Run, here: Path, artifacts: Path, name: str) -> None:
    shutil.copy(artifacts / "base.safetensors", here / "base.safetensors")
    shutil.copytree(artifacts / "first", here / "out")
    if name == "import":
        assert run("export", "walk/perturb:prod", "--to", "perturb.tar").code == 0
    before = {
        "remerge": ("merge", "walk/perturb@1", "walk/perturb@2", "-o", "walk/both"),
        "extract": ("merge", "walk/perturb:prod", "--into-base", "-o", "walk/perturbed"),
    }
    if name in before:
        assert run(*before[name]).code == 0
    for words in examples(name):
        if any(word.startswith("postgresql://") for word in words):
            continue  # tested on a server in test_places.py
        ran = run(*words)
        assert ran.code == 0 or (name == "diff" and ran.code == 1), (words, ran)


def test_help_of_the_group_names_every_command_and_how_to_begin(run: Run) -> None:
    ran = run("--help", columns=80)
    assert ran.code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]", ran.out, re.MULTILINE)
        assert "..." not in command(name).get_short_help_str(68)
    assert "Examples:\n  registry init\n" in ran.out
    assert run("-h", columns=80).out == ran.out


def test_version_is_the_packages(run: Run) -> None:
    assert run("--version").out == f"registry {registry.__version__}\n"


def test_a_mistyped_command_is_told_the_nearest(run: Run) -> None:
    ran = run("lst")
    assert (ran.code, ran.out) == (2, "")
    assert "no command 'lst'; did you mean list?" in ran.err


def test_an_unknown_option_is_wrong_usage(run: Run, here: Path) -> None:
    for words in (["--frob"], ["list", "--frob"], ["list", "a", "b"], ["show"], ["list", "--kind", "lora"]):
        ran = run(*words)
        assert (ran.code, ran.out) == (2, "")


def test_the_choices_are_those_of_the_facade() -> None:
    assert tuple(KINDS) == tuple(MANIFEST_KINDS)
    assert tuple(FORMATS) == tuple(PULL_FORMATS)


def test_completion_of_a_shell_names_the_commands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_REGISTRY_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "registry ann")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run().out == "plain,annotate\n"
