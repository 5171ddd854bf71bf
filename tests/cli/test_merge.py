"""`registry merge` and `remerge`: what goes to which stream, exit codes, and wrong usage."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run


def test_a_merge_says_what_it_made_of_what_and_how_exact_it_is(run: Run, here: Path) -> None:
    ran = run("merge", "walk/perturb@1", "walk/perturb@2", "--weights", "0.7,0.3", "-o", "walk/both:best")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("merged walk/both@1  cat  (2 sources, 2 modules, ")
    assert {"  0.7 * walk/perturb@1", "  0.3 * walk/perturb@2"} < set(lines)
    assert lines[-1] == "  relative error to the true weighted sum: 0"
    assert run("show", "walk/both:best").code == 0


def test_the_same_merge_again_says_that_nothing_was_computed(run: Run, here: Path) -> None:
    words = ("merge", "walk/perturb@1", "walk/perturb@2", "--method", "svd", "--rank", "2")
    assert run(*words, "-o", "walk/both").code == 0
    again = run(*words, "-o", "walk/both")
    assert again.out == "already there: walk/both@1  (the same recipe made walk/both@1; nothing was computed)\n"
    assert "merged: walk/other@1" in run(*words, "-o", "walk/other").out


def test_a_query_and_the_table_of_modules(run: Run, here: Path) -> None:
    ran = run(
        "merge", "--where", "base = walk/base", "-o", "walk/all", "--method", "svd", "--energy", "0.9", "--modules"
    )
    assert ran.code == 0
    assert "2 sources" in ran.out.splitlines()[0]
    assert any(line.startswith("MODULE") for line in ran.out.splitlines())
    assert sum("_proj" in line for line in ran.out.splitlines()) == 2


def test_json_has_every_module(run: Run, here: Path) -> None:
    found = run("merge", "walk/perturb@1", "--into-base", "-o", "walk/merged", "--json").json
    assert (found["reference"], found["into_base"], found["base"]) == ("walk/merged@1", True, "walk/base@1")
    assert {one["module"] for one in found["modules"]} == {"q_proj", "v_proj"}
    assert found["unmoved"] is not None


def test_cross_terms_of_a_factor_wise_form_are_said(run: Run, here: Path) -> None:
    ran = run("merge", "walk/perturb@1", "walk/perturb@2", "--method", "linear", "-o", "walk/linear")
    assert ran.code == 0
    assert "cross terms" in ran.out
    assert "cat or svd" in ran.err


def test_remerge_is_bit_equal(run: Run, here: Path) -> None:
    run("merge", "walk/perturb@1", "walk/perturb@2", "-o", "walk/both")
    ran = run("remerge", "walk/both")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("bit-equal: all 4 tensors of walk/both@1")
    assert run("remerge", "walk/both", "--json").json["bit_equal"] is True
    assert run("remerge", "walk/perturb@1").code == 3


def test_wrong_usage_and_refusals_have_their_exit_codes(run: Run, here: Path) -> None:
    for words, code, said in (
        (("walk/perturb@1",), 2, "--output"),
        (("walk/perturb@1", "-o", "walk/m", "--weights", "x"), 2, "expected numbers"),
        (("walk/perturb@1", "-o", "walk/m", "--module-weights", "x"), 2, "GLOB=W"),
        (("-o", "walk/m"), 3, "no source: give references"),
        (("walk/perturb@1", "-o", "walk/m", "--method", "tise"), 3, "did you mean ties"),
        (("walk/perturb@1", "-o", "walk/m:latest"), 3, "latest"),
        (("walk/nobody", "-o", "walk/m"), 4, "walk/nobody"),
    ):
        ran = run("merge", *words)
        assert (ran.code, said in ran.err) == (code, True), ran.err
