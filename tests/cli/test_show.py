from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import pytest
import torch

from registry import Registry
from tests.cli.conftest import Run


def test_json_of_show_has_all_that_list_has_and_the_contents(run: Run, here: Path, artifacts: Path) -> None:
    listed = run("list", "walk/perturb", "--where", "version = 1", "--json").json[0]
    shown = run("show", "walk/perturb@1", "--json").json
    assert shown.items() >= {key: value for key, value in listed.items() if key != "findings"}.items()
    assert (shown["findings"], shown["base_model"], shown["lora_dropout"]) == ([], "acme/walker", 0)
    assert shown["base_digest"] == run("show", "walk/base@1", "--json").json["digest"]
    assert [(file["path"], file["digest"]) for file in shown["files"]] == [
        (name, "sha256:" + hashlib.sha256((artifacts / "first" / name).read_bytes()).hexdigest())
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert shown["components"] == [{"name": "adapter", "tensors": 4, "parameters": 256, "bytes": 1024, "data": None}]
    assert shown["environment"]["python_version"]
    assert "tensors" not in shown


def test_tensors_are_named_where_they_are_asked_for(run: Run, here: Path) -> None:
    tensors = run("show", "walk/perturb@1", "--tensors", "--json").json["tensors"]
    assert len(tensors) == 4
    first = next(one for one in tensors if one["name"] == "base_model.model.q_proj.lora_A.weight")
    assert re.fullmatch(r"blake3:[0-9a-f]{64}", first.pop("digest"))
    assert first == {
        "component": "adapter",
        "name": "base_model.model.q_proj.lora_A.weight",
        "dtype": "F32",
        "shape": [4, 16],
        "bytes": 256,
    }
    assert re.search(
        r"^  base_model\.model\.q_proj\.lora_A\.weight +F32 +4 x 16$",
        run("show", "walk/perturb@1", "--tensors").out,
        re.MULTILINE,
    )


def test_history_tells_every_value_that_was_ever_said(run: Run, here: Path) -> None:
    run("annotate", "walk/perturb@1", "--meta", "robot=a2", "--metric", "reward=nan", "--step", "200")
    run("tag", "walk/perturb@1", "prod", "-m", "went back")
    history = run("show", "walk/perturb@1", "--json").json["history"]
    assert [(one["key"], one["value"]) for one in history["metadata"]] == [
        ("robot", "a1"),
        ("seed", "3"),
        ("robot", "a2"),
    ]
    rewards = [(one["value"], one["step"]) for one in history["metrics"] if one["key"] == "reward"]
    assert rewards == [(912.5, 100), ("NaN", 200)]
    (moved,) = history["tags"]
    assert moved.items() >= {"tag": "prod", "event": "moved", "from": 2, "to": 1, "why": "went back"}.items()
    assert moved["at"].endswith("Z")
    page = run("show", "walk/perturb@1").out
    assert "metrics reward=NaN at step 200" in page
    assert "tag prod moved here (from @2): went back" in page


def test_a_page_tells_what_is_known_and_what_is_not(run: Run, here: Path) -> None:
    page = run("show", "walk/perturb@1").out
    for line in (
        "walk/perturb@1",
        "kind     adapter",
        "base     walk/base@1",
        "model    acme/walker (as the adapter says)",
        "adapter  LORA, r 4, lora_alpha 8, lora_dropout 0",
        "targets  q_proj, v_proj",
        "peft     0.18.0",
        "message  the first one",
        "  robot  a1",
        "  reward  912.5",
        "  loss    NaN",
    ):
        assert line in page.splitlines()
    assert "peft     unknown" in run("show", "walk/perturb@3").out.splitlines()
    assert "\npeft " not in run("show", "walk/base").out


def test_a_page_fits_in_80_columns(run: Run, here: Path, artifacts: Path) -> None:
    run("push", artifacts / "first", "walk/long", "-m", "word " * 100, "--meta", f"text={'x' * 200}")
    page = run("show", "walk/long", "--tensors", columns=80).out
    assert max(map(len, page.splitlines())) <= 80
    assert "x" * 200 in page.replace("\n", "").replace(" ", "")
    assert re.search(r"^digest   sha256:[0-9a-f]{64}$", page, re.MULTILINE)
    assert any(len(line) > 200 for line in run("show", "walk/long").out.splitlines())


def test_findings_are_on_the_page(run: Run, here: Path, artifacts: Path) -> None:
    run("push", artifacts / "nan", "walk/nan")
    assert "\nFindings\n  C17 error: base_model.model.q_proj.lora_A.weight" in run("show", "walk/nan").out
    assert run("list", "walk/nan", "--json").json[0]["findings"] == 1
    (finding,) = run("show", "walk/nan", "--json").json["findings"]
    assert finding.items() >= {"code": "C17", "severity": "error", "expected": "finite values"}.items()


@pytest.mark.parametrize(
    "reference", ["walk/perturb", "walk/perturb:latest", "walk/perturb@3", "registry://walk/perturb"]
)
def test_every_way_to_name_a_version_finds_it(run: Run, here: Path, reference: str) -> None:
    assert run("show", reference, "--json").json["version"] == 3


def test_a_digest_from_json_names_the_version(run: Run, here: Path) -> None:
    digest = run("show", "walk/perturb:prod", "--json").json["digest"]
    assert run("show", f"walk/perturb@{digest}", "--json").json["version"] == 2
    assert run("show", f"walk/perturb@{digest[:15]}", "--json").json["version"] == 2


def test_text_from_data_cannot_steer_a_terminal(run: Run, here: Path, artifacts: Path) -> None:
    run(
        *("push", artifacts / "evil", "walk/evil", "-m", "one\ntwo \x1b[2J", "--meta", "note=\x1b]0;title\x07\x9b31m"),
        *("--meta", "markup=[red]x[/red]"),
    )
    for words in (["show", "walk/evil", "--tensors"], ["show", "walk/evil", "--json"], ["list", "--json"]):
        out = run(*words).out
        assert all(character.isprintable() or character == "\n" for character in out)
    page = run("show", "walk/evil").out
    assert r"acme/\x1b[31mred\u202e[bold]x[/bold] (as the adapter says)" in page
    assert r"message  one\ntwo \x1b[2J" in page
    assert r"note    \x1b]0;title\x07\x9b31m" in page
    assert "markup  [red]x[/red]" in page
    assert run("show", "walk/evil", "--json").json["message"] == "one\ntwo \x1b[2J"


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(4, 4)
        self.constructor_arguments = {"n_head": 4, "dropout": 0.0, "kernel": (3, 3), "act": "re\nlu", "best": math.inf}


def test_how_a_model_was_built_is_told_on_one_line(run: Run, here: Path, tmp_path: Path) -> None:
    with Registry.open() as registry:
        registry.push(Net(), "walk/net", probe=False)
        registry.push({"q_proj.weight": torch.ones(4, 4)}, "walk/later", base="walk/net")
    name = f"{__name__}.Net"
    line = f"class    {name}(act='re\\nlu', best=inf, dropout=0.0, kernel=(3, 3), n_head=4)"
    for reference in ("walk/net", "walk/later"):
        assert line in run("show", reference).out.splitlines()
        assert run("show", reference, "--json").json["architecture"] == {
            "class": name,
            "arguments": {"act": "re\nlu", "best": "Infinity", "dropout": 0.0, "kernel": [3, 3], "n_head": 4},
        }
    assert run("show", "walk/perturb@1", "--json").json["architecture"] is None
    assert "class " not in run("show", "walk/perturb@1").out


def test_all_else_is_shown_where_the_architecture_is_damaged(run: Run, here: Path) -> None:
    with Registry.open() as registry:
        registry.push(Net(), "walk/net", probe=False)
        (payload,) = (event.payload for event in registry.events("walk/net") if event.kind == "described")
    blob = next((here.parent / "registry" / "blobs").rglob(payload["blobs"]["architecture"]))
    blob.unlink()
    ran = run("show", "walk/net")
    assert "walk/net@1" in ran.out
    assert "the architecture cannot be read: " in ran.err
    assert run("show", "walk/net", "--json").json["architecture"] is None
