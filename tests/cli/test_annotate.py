from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_what_is_said_later_is_there_and_found(run: Run, here: Path) -> None:
    ran = run("annotate", "walk/perturb:prod", "--meta", "approved=yes", "--metric", "reward=nan", "--step", "5")
    assert (ran.code, ran.out, ran.err) == (0, "walk/perturb@2: noted 2 values\n", "")
    (one,) = run("list", "--where", "meta.approved = yes", "--json").json
    assert one["metrics"]["reward"] == "NaN"


def test_json_of_annotate_is_the_version(run: Run, here: Path) -> None:
    document = run("annotate", "walk/perturb", "--meta", "note=", "--json").json
    assert document == run("list", "--where", "version = 3", "--json").json[0]
    assert document["metadata"] == {"note": ""}


def test_saying_nothing_is_wrong_usage(run: Run, here: Path) -> None:
    for words in ([], ["--step", "3"], ["--meta", "a=1", "--step", "3"]):
        ran = run("annotate", "walk/perturb", *words)
        assert (ran.code, ran.out) == (2, "")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["walk/perturb", "--metric", "reward=much"], 3),
        (["walk/perturb", "--meta", f"text={'x' * 501}"], 3),
        (["walk/perturb", "--meta", "-k=1"], 3),
        (["walk/perturb", "--metric", "reward=1", "--step", "99999999999999999999"], 3),
        (["walk/perturb@9", "--meta", "a=1"], 4),
        (["walk/nobody", "--meta", "a=1"], 4),
    ],
)
def test_a_refusal_is_one_line(run: Run, here: Path, words: list[str], code: int) -> None:
    ran = run("annotate", *words, "--json")
    assert (ran.code, bool(ran.error)) == (code, True)


def test_a_place_without_a_registry_is_not_made_one(run: Run, nowhere: Path) -> None:
    assert run("annotate", "walk/perturb", "--meta", "a=1").code == 4
    assert list(nowhere.iterdir()) == []
