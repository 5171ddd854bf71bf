from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from registry.catalog.schema import HEAD
from tests.cli.conftest import Run

READING = [
    ["list"],
    ["list", "--json"],
    ["show", "walk/perturb"],
    ["log", "walk/perturb"],
    ["pull", "walk/perturb", "out"],
    ["tag", "walk/perturb", "prod"],
    ["tag", "--history", "walk/perturb:prod"],
    ["annotate", "walk/perturb", "--meta", "a=1"],
    ["upgrade"],
]


def test_init_makes_a_registry_in_the_working_folder(run: Run, nowhere: Path) -> None:
    ran = run("init")
    assert (ran.code, ran.out, ran.err) == (0, f"made the registry {nowhere}/.registry\n", "")
    assert run("init").out == f"there is already a registry: {nowhere}/.registry\n"
    (nowhere / "sub").mkdir()
    assert run("list").err == "no versions yet\n"


def test_json_of_init_says_whether_it_made_one(run: Run, nowhere: Path) -> None:
    made = run("init", "team", "--json").json
    assert made == {"registry": f"{nowhere}/team", "id": made["id"], "created": True}
    assert len(made["id"]) == 32
    assert run("init", "team", "--json").json == made | {"created": False}


def test_the_nearest_registry_upward_is_used(
    run: Run, nowhere: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("init")
    (nowhere / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(nowhere / "a" / "b")
    assert run("push", artifacts / "first", "walk/perturb").err == ""
    assert not (nowhere / "data").exists()
    assert len(run("list", "--json").json) == 1


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_a_command_that_reads_says_where_it_looked_and_makes_nothing(run: Run, nowhere: Path, words: list[str]) -> None:
    ran = run(*words)
    assert ran.code == 4
    assert ran.error == (
        f"no registry: $REGISTRY_URL is not set, there is no .registry in {nowhere} or above it, and none in "
        f"{nowhere}/data/lora-registry; make one with 'registry init', or name one with --registry"
    )
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_a_registry_that_was_named_and_is_not_there_is_named_in_the_error(
    run: Run, nowhere: Path, words: list[str]
) -> None:
    ran = run("--registry", nowhere / "mistyped", *words)
    assert (ran.code, f"{nowhere}/mistyped" in ran.error) == (4, True)
    assert list(nowhere.iterdir()) == []


def test_registry_is_taken_before_and_after_the_command(run: Run, here: Path, tmp_path: Path) -> None:
    run("init", tmp_path / "empty")
    for words in (["--registry", tmp_path / "empty", "list"], ["list", "--registry", tmp_path / "empty"]):
        assert run(*words).err == "no versions yet\n"
    assert run("--registry", tmp_path / "empty", "list", "--registry", tmp_path / "registry").out != ""
    assert run("--registry", f"file://{tmp_path}/registry", "list").out == run("list").out


def test_json_is_taken_before_and_after_the_command(run: Run, here: Path) -> None:
    assert run("--json", "list").json == run("list", "--json").json


def test_init_takes_its_place_once(run: Run, here: Path, tmp_path: Path) -> None:
    assert run("init", "--registry", tmp_path / "x").code == 0
    assert (tmp_path / "x" / "registry.json").is_file()
    assert run("init", tmp_path / "y", "--registry", tmp_path / "z").code == 2
    assert run("init", "").code == 2


def test_init_says_where_another_registry_is_in_the_way(run: Run, here: Path) -> None:
    ran = run("init")
    assert ran.code == 0
    assert ran.err == "note: $REGISTRY_URL is set, so commands use the registry that it names, not this one\n"


def test_init_refuses_what_is_no_place_for_a_registry(run: Run, nowhere: Path) -> None:
    (nowhere / "file").write_text("")
    (nowhere / "full").mkdir()
    (nowhere / "full" / "thesis.tex").write_text("")
    for words, code, named in (
        (["file"], 3, "is a file; a registry is a folder"),
        (["full"], 5, "thesis.tex"),
        (["new", "--store", "elsewhere"], 3, "--store goes with a postgresql:// URL"),
        (["mysql://host/models"], 3, "postgresql://"),
    ):
        ran = run("init", *words)
        assert ran.code == code
        assert named in ran.error


@pytest.mark.parametrize("words", [["init"], ["list"], ["upgrade"], ["push", "x", "walk/perturb"]], ids=" ".join)
def test_a_working_folder_that_was_removed_is_one_line(run: Run, nowhere: Path, words: list[str]) -> None:
    (nowhere / "gone").mkdir()
    os.chdir(nowhere / "gone")  # `nowhere` goes back
    (nowhere / "gone").rmdir()
    ran = run(*words)
    assert (ran.code, "cannot find the working folder" in ran.error) == (9, True)


def test_upgrade_says_from_where_to_where(run: Run, here: Path) -> None:
    assert run("upgrade").out == f"already at {HEAD}\n"
    assert run("upgrade", "--json").json == {"from": HEAD, "to": HEAD}


def test_a_database_of_a_newer_program_is_one_line(run: Run, here: Path, tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "registry" / "catalog.sqlite")
    with database:
        database.execute("UPDATE alembic_version SET version_num = '20990101_future'")
    database.close()
    for words in (["list"], ["upgrade"], ["push", "x", "walk/perturb"]):
        ran = run(*words)
        assert ran.code == 9
        assert "20990101_future" in ran.error
        assert "upgrade the program" in ran.error


def test_a_database_that_is_damaged_is_one_line(run: Run, here: Path, tmp_path: Path) -> None:
    (tmp_path / "registry" / "catalog.sqlite").write_bytes(b"no database at all, but quite long" * 100)
    ran = run("list")
    assert (ran.code, "not a" in ran.error) == (6, True)


def test_catalog_and_store_of_two_registries_are_one_line(run: Run, here: Path, tmp_path: Path) -> None:
    run("init", tmp_path / "other")
    (tmp_path / "other" / "registry.json").replace(tmp_path / "registry" / "registry.json")
    ran = run("list")
    assert (ran.code, "they do not belong together" in ran.error) == (9, True)


def test_a_registry_on_a_server_is_made_and_used(
    run: Run, nowhere: Path, artifacts: Path, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run("init", postgresql_url)
    assert (ran.code, "--store FOLDER" in ran.error) == (3, True)
    made = run("init", postgresql_url, "--store", nowhere / "blobs", "--json").json
    assert made["created"]
    assert (nowhere / "blobs" / "registry.json").is_file()
    assert run("init", postgresql_url, "--json").json == made | {"created": False}
    monkeypatch.setenv("REGISTRY_URL", postgresql_url)
    assert run("push", artifacts / "first", "walk/perturb:prod").code == 0
    assert run("list", "--where", "r >= 4 and peft_version < 0.19", "--json").json[0]["tags"] == ["prod"]
    assert run("show", "walk/perturb").code == 0
    assert run("upgrade").out == f"already at {HEAD}\n"


def test_a_password_is_never_shown(run: Run, nowhere: Path) -> None:
    url = make_url("postgresql://somebody:secret@127.0.0.1:1/models").render_as_string(hide_password=False)
    for words in (["list"], ["init", "--store", "blobs"], ["push", "x", "walk/perturb"], ["upgrade"]):
        ran = run(*words, "--registry", url)
        assert ran.code == 9
        assert "cannot reach" in ran.error
        assert "secret" not in ran.err
