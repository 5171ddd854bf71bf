from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_json_of_a_push_is_the_contract(run: Run, here: Path, artifacts: Path) -> None:
    ran = run(
        *("push", artifacts / "wide", "walk/new:best", "--base", "walk/base:v1", "--tag", "prod"),
        *(
            "--meta",
            "robot=a2",
            "--metric",
            "reward=1e3",
            "--step",
            "7",
            "--kind",
            "adapter",
            "-m",
            "why not",
            "--json",
        ),
    )
    assert (ran.code, ran.err) == (0, "")
    assert set(ran.json) == {
        *("name", "version", "digest", "kind", "created", "tags", "bytes_total", "bytes_new"),
        *("same_content_as", "findings", "notes"),
    }
    expected = {"name": "walk/new", "version": 1, "kind": "adapter", "created": True, "tags": ["best", "prod"]}
    assert ran.json.items() >= (expected | {"same_content_as": None, "findings": [], "notes": []}).items()
    assert ran.json["digest"].startswith("sha256:")
    assert len(ran.json["digest"]) == len("sha256:") + 64
    assert ran.json["bytes_total"] == sum(file.stat().st_size for file in (artifacts / "wide").iterdir())


def test_everything_said_at_a_push_is_there_afterwards(run: Run, here: Path, artifacts: Path) -> None:
    run(
        *("push", artifacts / "nan", "walk/new", "--base", "walk/base:v1", "--continued-from", "walk/perturb@1"),
        *("--meta", "robot=a=b", "--meta", "seed=3", "--metric", "reward=-inf", "--metric", "loss=.5", "--step", "7"),
        *("-m", "why not", "--force"),
    )
    shown = run("show", "walk/new", "--json").json
    assert shown["metadata"] == {"robot": "a=b", "seed": 3}
    assert shown["metrics"] == {"reward": "-Infinity", "loss": 0.5}
    assert {entry["step"] for entry in shown["history"]["metrics"]} == {7}
    assert (shown["base"], shown["message"]) == ("walk/base@1", "why not")
    edges = {(edge["relation"], edge["parent"]) for edge in run("log", "walk/new", "--json").json["ancestors"]}
    assert edges >= {("trained_on", "walk/base@1"), ("continued_from", "walk/perturb@1")}


def test_a_push_says_what_became_of_it(run: Run, here: Path, artifacts: Path) -> None:
    ran = run("push", artifacts / "first", "walk/new:best")
    assert ran.out.startswith("pushed walk/new@1  adapter  best  (")
    assert ran.out.count("\n") == 1


def test_the_same_again_says_already_there(run: Run, here: Path, artifacts: Path) -> None:
    again = ("push", artifacts / "first", "walk/perturb", "--base", "walk/base:v1")
    assert run(*again).out == "already there: walk/perturb@1\n"
    assert run(*again, "--tag", "old").out == "already there: walk/perturb@1  old\n"
    assert run(*again, "--json").json.items() >= {"created": False, "version": 1, "bytes_new": 0}.items()


def test_the_same_content_in_another_form_is_told(run: Run, here: Path, artifacts: Path) -> None:
    folder = here / "resaved"
    shutil.copytree(artifacts / "first", folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("0.18.0", "0.18.1"))
    ran = run("push", folder, "walk/perturb", "--base", "walk/base:v1")
    assert ran.out.startswith("pushed walk/perturb@4")
    assert ran.err == "note: same content as walk/perturb@1, in another form\n"
    assert run("push", folder, "walk/perturb", "--base", "walk/base:v1", "--json").json["same_content_as"] == 1


def test_findings_and_notes_go_to_standard_error_one_line_each(run: Run, here: Path, artifacts: Path) -> None:
    folder = here / "nan"
    shutil.copytree(artifacts / "nan", folder)
    (folder / "README.md").write_text("a model card")
    ran = run("push", folder, "walk/nan", "--no-attachments")
    assert ran.code == 0
    finding, note = ran.err.splitlines()
    assert finding.startswith("C17 error: base_model.model.q_proj.lora_A.weight: the tensor holds NaN or Inf")
    assert note == "note: left out (no attachments): README.md"
    document = run("push", folder, "walk/nan", "--no-attachments", "--json").json
    assert [finding["code"] for finding in document["findings"]] == ["C17"]
    assert len(document["notes"]) == 1


def test_other_files_of_a_folder_are_attachments(run: Run, here: Path, artifacts: Path) -> None:
    folder = here / "first"
    shutil.copytree(artifacts / "first", folder)
    (folder / "data.bin").write_bytes(bytes(3 << 20))
    refused = run("push", folder, "walk/data", "--attachment-limit", "2")
    assert refused.code == 3
    assert f"{folder / 'data.bin'} has 3145728 bytes; an attachment has 2097152 at most" in refused.err
    assert run("push", folder, "walk/data", "--attachment-limit", "3").code == 0
    run("pull", "walk/data", "again")
    assert (here / "again" / "data.bin").read_bytes() == bytes(3 << 20)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--meta", "robot"], "expected K=V, found 'robot'"),
        (["--meta", "=a1"], "expected K=V, found '=a1'"),
        (["--metric", "reward"], "expected K=V"),
        (["--meta", "a=1", "--meta", "a=2"], "'a' is given twice"),
        (["--step", "7"], "--step is the training step of --metric values"),
        (["--step", "soon", "--metric", "a=1"], "'soon' is not a valid integer"),
        (["--kind", "lora"], "'lora' is not one of"),
        (["--registry", ""], "it is empty"),
    ],
)
def test_wrong_usage_exits_2_and_pushes_nothing(
    run: Run, here: Path, artifacts: Path, words: list[str], named: str
) -> None:
    ran = run("push", artifacts / "first", "walk/new", *words)
    assert (ran.code, ran.out) == (2, "")
    assert named in ran.err
    assert run("show", "walk/new").code == 4


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--metric", "reward=high"], 3, "metric reward: expected a number, found 'high'"),
        (["--meta", "a b=1"], 3, "metadata key 'a b'"),
        (["--metric", "a=1", "--step", "-1"], 3, "step -1"),
        (["--base", "walk/nobody"], 4, "base walk/nobody is not in this registry"),
        (["--base", "walk"], 3, "invalid reference 'walk'"),
        (["--continued-from", "walk/perturb@9"], 4, "continued_from walk/perturb@9 is not in this registry"),
        (["--tag", "latest"], 3, "'latest' always means the highest version"),
        (["--tag", "17"], 3, "digits only"),
        (["--kind", "base"], 3, "cannot be pushed as base"),
    ],
)
def test_a_refused_push_is_one_line_and_pushes_nothing(
    run: Run, here: Path, artifacts: Path, words: list[str], code: int, named: str
) -> None:
    ran = run("push", artifacts / "first", "walk/new", *words, "--json")
    assert ran.code == code
    assert named in ran.error
    assert run("show", "walk/new").code == 4


def test_a_source_that_cannot_be_pushed_is_one_line(run: Run, here: Path, artifacts: Path) -> None:
    (here / "empty").mkdir()
    (here / "truncated.safetensors").write_bytes((artifacts / "base.safetensors").read_bytes()[:-8])
    (here / "nothing.safetensors").write_bytes(b"")
    (here / "model.pth").write_bytes(b"PK")
    for source, code in (("empty", 3), ("truncated.safetensors", 3), ("nothing.safetensors", 3), ("model.pth", 3)):
        ran = run("push", source, "walk/new")
        assert (ran.code, source in ran.error) == (code, True)
    assert run("push", "not/there", "walk/new").code == 4


def test_a_push_makes_the_users_registry_and_says_so(run: Run, nowhere: Path, artifacts: Path) -> None:
    ran = run("push", artifacts / "first", "walk/perturb")
    assert ran.code == 0
    assert ran.err == (
        f"note: made the registry {nowhere}/data/lora-registry; 'registry init' makes one for a project alone\n"
    )
    assert run("list", "--json").json[0]["name"] == "walk/perturb"
    assert run("push", artifacts / "first", "walk/perturb").err == ""


def test_a_push_does_not_make_a_registry_that_was_named(run: Run, nowhere: Path, artifacts: Path) -> None:
    ran = run("push", artifacts / "first", "walk/perturb", "--registry", nowhere / "mistyped")
    assert ran.code == 4
    assert "make one with 'registry init" in ran.error
    assert not (nowhere / "mistyped").exists()
    assert not (nowhere / "data").exists()
