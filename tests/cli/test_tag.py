from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run


def where(run: Run, pointer: str) -> int:
    number: int = run("show", pointer, "--json").json["version"]
    return number


def test_a_tag_moves_to_the_version_that_is_named(run: Run, here: Path) -> None:
    ran = run("tag", "walk/perturb@1", "prod", "-m", "went back")
    assert (ran.code, ran.out, ran.err) == (0, "walk/perturb:prod -> @1 (was @2)\n", "")
    assert run("tag", "walk/perturb@1", "prod").out == "walk/perturb:prod -> @1 as before\n"
    assert run("tag", "walk/perturb:prod", "best").out == "walk/perturb:best -> @1 (new)\n"


def test_a_name_alone_is_its_latest_version(run: Run, here: Path) -> None:
    assert run("tag", "walk/perturb", "prod").out == "walk/perturb:prod -> @3 (was @2)\n"


def test_json_of_a_tag_tells_where_it_stands(run: Run, here: Path) -> None:
    assert run("tag", "walk/perturb@1", "prod", "--json").json == {
        "name": "walk/perturb",
        "tag": "prod",
        "version": 1,
        "protected": False,
        "previous": 2,
        "moved": True,
        "changed": True,
    }


def test_protect_of_a_name_alone_keeps_the_tag_where_it_is(run: Run, here: Path) -> None:
    assert run("tag", "walk/perturb", "prod", "--protect").out == "walk/perturb:prod -> @2, protected\n"
    ran = run("tag", "walk/perturb", "prod", "--protect")
    assert ran.out == "walk/perturb:prod -> @2 as before, protected\n"


@pytest.mark.parametrize(("reference", "number"), [("walk/perturb@1", 1), ("walk/perturb:latest", 3)])
def test_protect_of_a_version_moves_the_tag_first(run: Run, here: Path, reference: str, number: int) -> None:
    ran = run("tag", reference, "prod", "--protect")
    assert ran.out == f"walk/perturb:prod -> @{number} (was @2), protected\n"


def test_protect_makes_a_tag_that_is_not_there_at_the_latest_version(run: Run, here: Path) -> None:
    assert run("tag", "walk/perturb", "best", "--protect").out == "walk/perturb:best -> @3 (new), protected\n"


def test_a_protected_tag_stays_until_it_is_unprotected(run: Run, here: Path) -> None:
    run("tag", "walk/perturb", "prod", "--protect")
    for words in (
        ["walk/perturb@1", "prod"],
        ["walk/perturb@1", "prod", "--protect"],
        ["walk/perturb", "prod", "--delete"],
    ):
        ran = run("tag", *words)
        assert ran.code == 5
        assert ran.error.endswith("registry tag walk/perturb prod --unprotect")
    assert where(run, "walk/perturb:prod") == 2
    assert run("tag", "walk/perturb", "prod", "--unprotect").out == "walk/perturb:prod -> @2, no longer protected\n"
    assert run("tag", "walk/perturb@1", "prod").code == 0


def test_a_deleted_tag_is_gone_and_its_history_stays(run: Run, here: Path) -> None:
    assert run("tag", "walk/perturb", "prod", "--delete", "-m", "no longer used").out == (
        "walk/perturb:prod is deleted (was @2)\n"
    )
    assert run("show", "walk/perturb:prod").code == 4
    events = run("tag", "--history", "walk/perturb:prod", "--json").json
    assert [(one["event"], one["from"], one["to"], one["why"]) for one in events] == [
        ("moved", None, 2, None),
        ("deleted", 2, None, "no longer used"),
    ]


@pytest.mark.parametrize("action", ["--delete", "--unprotect"])
def test_an_action_on_a_version_needs_the_tag_to_point_there(run: Run, here: Path, action: str) -> None:
    ran = run("tag", "walk/perturb@1", "prod", action)
    assert ran.code == 5
    assert ran.error == "walk/perturb:prod points to @2, expected @1; somebody moved it: look again and repeat"
    assert where(run, "walk/perturb:prod") == 2
    assert run("tag", "walk/perturb@2", "prod", action).code == 0


def test_history_is_a_table_of_every_move(run: Run, here: Path) -> None:
    run("tag", "walk/perturb@1", "prod", "-m", "went \x1b[31mback")
    run("tag", "walk/perturb", "prod", "--protect")
    ran = run("tag", "--history", "walk/perturb:prod", columns=80)
    header, *lines = ran.out.splitlines()
    assert header.split() == ["WHEN", "(UTC)", "EVENT", "FROM", "TO", "BY", "WHY"]
    assert [line.split()[2:5] for line in lines] == [
        ["moved", "-", "@2"],
        ["moved", "@2", "@1"],
        ["protected", "@1", "@1"],
    ]
    assert lines[1].endswith(r"went \x1b[31mback")


def test_history_of_a_tag_that_never_was_is_not_found(run: Run, here: Path) -> None:
    ran = run("tag", "--history", "walk/perturb:staging", "--json")
    assert (ran.code, ran.error) == (4, "walk/perturb never had a tag staging")


@pytest.mark.parametrize("pointer", ["walk/perturb", "walk/perturb@1", "walk/perturb:prod@{2026-01-01}"])
def test_history_takes_a_name_with_a_tag(run: Run, here: Path, pointer: str) -> None:
    ran = run("tag", "--history", pointer)
    assert (ran.code, "expected namespace/name:tag" in ran.error) == (3, True)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["walk/perturb"],
        ["walk/perturb@1", "prod", "--history", "walk/perturb:prod"],
        ["--history", "walk/perturb:prod", "--delete"],
        ["--history", "walk/perturb:prod", "-m", "why"],
    ],
)
def test_words_that_make_no_sense_together_are_wrong_usage(run: Run, here: Path, words: list[str]) -> None:
    ran = run("tag", *words)
    assert (ran.code, ran.out) == (2, "")


def test_a_tag_can_be_asked_for_as_it_was(run: Run, here: Path) -> None:
    at = run("tag", "--history", "walk/perturb:prod", "--json").json[0]["at"]
    run("tag", "walk/perturb@1", "prod")
    assert where(run, f"walk/perturb:prod@{{{at}}}") == 2
    assert where(run, "walk/perturb:prod") == 1
