from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from registry.cli import list as list_module
from registry.core import errors
from registry.core.errors import DigestMismatch, Incompatible, ReadOnly, RegistryError
from registry.core.findings import Finding
from tests.cli.conftest import Run

BAD_NAMES = [
    ("../etc/passwd", "found 2"),
    ("walk/..", "'..'"),
    ("walk/a..b", "have no '..'"),
    ("./a", "'.'"),
    ("perturb", "one '/', found 0"),
    ("walk/perturb/x", "one '/', found 2"),
    ("/perturb", "the namespace ''"),
    ("walk/", "the name ''"),
    ("", "found 0"),
    ("walk/per\x1bturb", "x1bturb"),
    ("walk/per\nturb", "nturb"),
    ("walk/" + "x" * 300, "300 characters; 128 is the most"),
    ("Walk/perturb", "the namespace 'Walk' must be of a-z"),
    ("walk/Perturb", "the name 'Perturb' must be of a-z"),
    ("walk/pertürb", "must be of a-z"),
    ("walk/per turb", "must be of a-z"),
    ("-x/perturb", "begin and end with a letter or digit"),
]

BAD_REFERENCES = [
    ("walk/perturb@0", 3, "neither a number from 1"),
    ("walk/perturb@one", 3, "neither a number from 1"),
    ("walk/perturb@sha256:xyz", 3, "nor a digest"),
    ("walk/perturb:prod@2", 3, "both a tag and a pin"),
    ("walk/perturb:17", 3, "digits only; write @17"),
    ("walk/perturb:a/b", 3, "the tag 'a/b'"),
    ("walk/perturb:prod@{yesterday}", 3, "is not a date or time"),
    ("walk/perturb:prod@{2001-01-01}", 4, "not set then"),
    ("walk/perturb@2@{2026-01-01}", 3, "takes no @{time}"),
    ("walk/perturb@9", 4, "the highest number of walk/perturb is 3"),
    ("walk/perturb:staging", 4, "walk/perturb has prod, latest"),
    ("walk/perturb@sha256:0000000000000000", 4, "no version of walk/perturb has this digest"),
    ("walk/pertub", 4, "did you mean walk/perturb"),
    ("walk/" + "x" * 600, 3, "512 is the most"),
]

BAD_QUERIES = [
    (["--where", "r"], "cannot read 'r'"),
    (["--where", ""], "expected 'field op value'"),
    (["--where", "r >> 8"], "'r >> 8'"),
    (["--where", "r >= 8 or r = 4"], "'or' is not part of the language"),
    (["--where", "rank >= 8"], "unknown field 'rank'"),
    (["--where", "lora_alfa >= 8"], "did you mean lora_alpha? Known: name, version"),
    (["--where", "r >= eight"], "r is a number, 'eight' is not"),
    (["--where", "r ~ 8"], "'~' compares text"),
    (["--where", "use_dora = maybe"], "true or false"),
    (["--where", "created_at > soon"], "is not a date or time"),
    (["--where", "peft_version > new"], "is not a version such as 0.18"),
    (["--where", "metric.reward > high"], "'high' is not"),
    (["--where", "meta. = 1"], "'meta.' needs a key"),
    (["--where", "r = 1; DROP TABLE version"], "expected 'and' before"),
    (["--where", " and ".join(["r = 1"] * 51)], "51 conditions; 50 is the most"),
    (["--sort", "reward"], "unknown field 'reward'"),
    (["--sort", "tag"], "cannot sort by tag"),
    (["--tag", "17"], "digits only"),
]


@pytest.mark.parametrize(("name", "named"), BAD_NAMES, ids=range(len(BAD_NAMES)))
@pytest.mark.parametrize("words", [["push", "--", "SOURCE", "NAME"], ["show", "--", "NAME"]], ids=["push", "show"])
def test_a_bad_name_is_one_line(run: Run, here: Path, artifacts: Path, words: list[str], name: str, named: str) -> None:
    ran = run(*(str(artifacts / "first") if word == "SOURCE" else word.replace("NAME", name) for word in words))
    assert ran.code == 3
    assert named in ran.error
    assert ran.error.isprintable()
    assert len(ran.error) < 300


@pytest.mark.parametrize(("reference", "code", "named"), BAD_REFERENCES)
def test_a_reference_that_names_nothing_is_one_line(
    run: Run, here: Path, reference: str, code: int, named: str
) -> None:
    for words in (["show", reference], ["log", reference, "--json"], ["pull", reference, "out"]):
        ran = run(*words)
        assert ran.code == code
        assert named in ran.error
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("tag", ["17", "latest", "a/b", "a b", "-x", "..", "x" * 300, "\x1b[2J", ""])
def test_a_bad_tag_is_one_line(run: Run, here: Path, tag: str) -> None:
    ran = run("tag", "--", "walk/perturb@1", tag)
    assert ran.code == 3
    assert ran.error.isprintable()


@pytest.mark.parametrize(("words", "named"), BAD_QUERIES)
def test_a_bad_query_is_one_line(run: Run, here: Path, words: list[str], named: str) -> None:
    ran = run("list", *words, "--json")
    assert ran.code == 3
    assert named in ran.error


def test_an_unknown_field_lists_the_known_ones(run: Run, here: Path) -> None:
    error = run("list", "--where", "alpha > 1").error
    for field in ("r", "lora_alpha", "target", "peft_version", "meta.KEY", "metric.KEY"):
        assert f" {field}" in error


def test_a_limit_that_is_no_number_is_wrong_usage(run: Run, here: Path) -> None:
    for limit in ("-1", "many", "99999999999999999999999"):
        assert run("list", "--limit", limit).code == 2


@pytest.mark.parametrize(
    "error",
    [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, RegistryError)],
    ids=lambda cls: cls.__name__,
)
def test_every_error_exits_with_the_code_of_its_branch(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, error: type[RegistryError]
) -> None:
    monkeypatch.setattr(list_module, "row", raising(error))
    ran = run("list")
    assert (ran.code, ran.out) == (error.exit_code, "")
    assert 3 <= ran.code <= 9
    assert ran.err.count("\n") == 1


def raising(error: type[RegistryError]) -> object:
    def row(*_: object, **__: object) -> None:
        raise (error("blob", expected="a", actual="b") if issubclass(error, DigestMismatch) else error("it is so"))

    return row


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ReadOnly(30, "the folder cannot be written"), "registry: the folder cannot be written\n"),
        (RegistryError("two\nlines \x1b[2J\u2028"), "registry: two\\nlines \\x1b[2J\\u2028\n"),
        (RegistryError(""), "registry: \n"),
        (
            Incompatible("it does not fit", [Finding("C03", "error", "q\x1b_proj", "rank", "4", "8", "retrain")] * 2),
            "registry: it does not fit\n" + "  C03 error: q\\x1b_proj: rank (expected 4, found 8); retrain\n" * 2,
        ),
    ],
)
def test_a_refusal_is_its_message_escaped(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, error: RegistryError, expected: str
) -> None:
    def row(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(list_module, "row", row)
    assert run("list").err == expected


def test_a_bug_keeps_its_traceback(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(*_: object, **__: object) -> None:
        raise ZeroDivisionError("not a refusal")

    monkeypatch.setattr(list_module, "row", row)
    ran = run("list", "--json")
    assert ran.code == 0  # rows are for tables
    ran = run("list")
    assert (ran.code, ran.out) == (70, "")
    assert ran.err.startswith("Traceback (most recent call last):\n")
    assert "ZeroDivisionError: not a refusal\n" in ran.err
    assert ran.err.endswith("this is a bug in lora-registry; please report the lines above\n")


def test_an_interrupt_is_one_line(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(list_module, "row", row)
    ran = run("list")
    assert (ran.code, ran.out, ran.err) == (130, "", "registry: interrupted\n")
