from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run


def test_a_removed_version_is_hidden_and_can_be_brought_back(run: Run, here: Path) -> None:
    ran = run("rm", "walk/perturb@3", "-m", "trained on bad data")
    assert (ran.code, ran.out, ran.err) == (0, "removed walk/perturb@3\n", "")
    assert run("show", "walk/perturb", "--json").json["version"] == 2
    assert run("show", "walk/perturb@3").error == (
        "walk/perturb@3 was removed; to bring it back: registry restore walk/perturb@3"
    )
    assert run("restore", "walk/perturb@3").out == "restored walk/perturb@3\n"
    assert run("restore", "walk/perturb@3").out == "walk/perturb@3 was not removed\n"
    shown = run("show", "walk/perturb@3")
    assert "removed: trained on bad data" in shown.out
    notes = run("show", "walk/perturb@3", "--json").json["history"]["notes"]
    assert [(one["kind"], one["text"]) for one in notes] == [("removed", "trained on bad data"), ("restored", None)]


def test_tags_that_point_to_a_removed_version_are_told(run: Run, here: Path) -> None:
    ran = run("rm", "walk/perturb@2", "walk/perturb@3")
    assert ran.out == "removed walk/perturb@2\nremoved walk/perturb@3\n"
    assert ran.err == "note: walk/perturb:prod still points to it; move it with: registry tag REF prod\n"


def test_what_others_came_from_stays_with_all_that_was_named(run: Run, here: Path) -> None:
    ran = run("rm", "walk/perturb@3", "walk/base@1")
    assert ran.code == 5
    assert ran.error.startswith("walk/base@1 is the base or a parent of walk/perturb@1, walk/perturb@2;")
    assert run("show", "walk/perturb@3").code == 0


def test_json_of_a_removal_names_each_version(run: Run, here: Path) -> None:
    [removed] = run("rm", "walk/perturb", "--json").json
    assert removed.pop("digest").startswith("sha256:")
    assert removed == {"name": "walk/perturb", "version": 3, "tags": [], "changed": True}
    assert run("restore", "walk/perturb@3", "--json").json[0]["changed"]


def test_a_name_alone_is_not_enough_to_restore(run: Run, here: Path) -> None:
    ran = run("restore", "walk/perturb")
    assert (ran.code, ran.out) == (3, "")
    assert "which version of it" in ran.error


def test_the_log_marks_a_removed_version(run: Run, here: Path) -> None:
    run("rm", "walk/perturb@3")
    assert "walk/perturb@3, removed  (continued_from it)" in run("log", "walk/perturb@2").out
    assert run("log", "walk/perturb@2", "--json").json["removed"] == ["walk/perturb@3"]


def test_nothing_to_remove_is_wrong_usage(run: Run, here: Path) -> None:
    assert run("rm").code == 2
    assert run("restore").code == 2
