from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.artifacts import write_adapter
from tests.cli.conftest import Run
from tests.cli.test_startup import HEAVY, imported


def test_different_versions_are_told_apart_by_the_exit_code(run: Run, here: Path) -> None:
    ran = run("diff", "walk/perturb@1", "walk/perturb:prod")
    assert (ran.code, ran.err) == (1, "")
    lines = ran.out.splitlines()
    assert lines[:3] == ["A  walk/perturb@1", "B  walk/perturb@2", "the content differs"]
    assert re.search(r"^message +the first one +-$", ran.out, re.MULTILINE)
    assert re.search(r"^metadata robot +a1 +-$", ran.out, re.MULTILINE)
    assert re.search(r"^metric loss +NaN +-Infinity$", ran.out, re.MULTILINE)
    assert "Modules by what is added to their weight: 2 differ, 0 the same" in lines
    assert re.search(r"^MODULE +NORM A +NORM B +DISTANCE +RELATIVE +COSINE$", ran.out, re.MULTILINE)
    assert "lora_A" not in ran.out


def test_equal_versions_exit_with_0(run: Run, here: Path) -> None:
    ran = run("diff", "walk/perturb@2", "walk/perturb:prod")
    assert (ran.code, ran.out.splitlines()[2]) == (0, "A and B are the same, to the last byte")


def test_equal_content_in_another_form_exits_with_0_and_shows_the_form(run: Run, here: Path, artifacts: Path) -> None:
    folder = write_adapter(here / "again", seed=1, target_modules=".*_proj")
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(".weight", ".x.weight"): one for name, one in load_file(path).items()}, path)
    run("push", folder, "walk/again")
    ran = run("diff", "walk/perturb@1", "walk/again")
    assert (ran.code, ran.out.splitlines()[2]) == (0, "A and B have the same content")
    assert re.search(r'^config target_modules +\["q_proj", "v_proj"\] +\.\*_proj$', ran.out, re.MULTILINE)
    assert re.search(r"^file adapter_model.safetensors +", ran.out, re.MULTILINE)
    assert "Tensors of adapter: 4 the same" in ran.out


def test_json_is_one_document_with_everything(run: Run, here: Path) -> None:
    ran = run("diff", "walk/perturb@1", "walk/perturb@3", "--json", "--limit", "0")
    assert (ran.code, ran.err) == (1, "")
    document = ran.json
    assert document["a"].items() >= {"name": "walk/perturb", "version": 1, "kind": "adapter"}.items()
    assert (document["same_content"], document["weights"], document["notes"]) == (False, True, [])
    assert {"key": "r", "change": "changed", "a": 4, "b": 8} in document["config"]
    assert {"key": "base", "change": "changed", "a": "walk/base@1", "b": None} in document["facts"]
    assert {"key": "loss", "change": "removed", "a": "NaN", "b": None} in document["metrics"]
    assert [one["path"] for one in document["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    (component,) = document["components"]
    counted = ("name", "change", "tensors_a", "tensors_b", "same_tensors", "same_modules")
    assert [component[key] for key in counted] == ["adapter", "changed", 4, 4, 0, 0]
    module = component["modules"][0]
    assert module["a"] == {"kind": "linear", "r": 4, "scaling": 2}
    assert module["norms"]["relative"] == module["norms"]["distance"] / max(module["norms"]["a"], module["norms"]["b"])
    assert component["tensors"][0].items() >= {"change": "changed", "norms": None}.items()
    assert len(component["tensors"]) == 4


def test_numbers_that_json_has_not_are_text(run: Run, here: Path, artifacts: Path) -> None:
    run("push", artifacts / "nan", "walk/nan")
    ran = run("diff", "walk/perturb@1", "walk/nan", "--json")
    modules = {one["module"]: one["norms"] for one in ran.json["components"][0]["modules"]}
    assert modules["q_proj"]["distance"] == modules["q_proj"]["cosine"] == "NaN"
    assert isinstance(modules["v_proj"]["distance"], float)


def test_a_long_table_says_how_many_rows_are_left_out(run: Run, here: Path) -> None:
    for seed in (1, 2):
        path = here / f"{seed}.safetensors"
        generator = np.random.default_rng(seed)
        save_file({f"layer{i}.weight": generator.normal(size=(4, 4)) for i in range(30)}, path)
        run("push", path, "walk/wide")
    ran = run("diff", "walk/wide@1", "walk/wide@2", columns=80)
    assert len(re.findall(r"^layer\d", ran.out, re.MULTILINE)) == 20
    assert "... and 10 more; --limit 30 shows them" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    relative = [float(line.split()[4]) for line in ran.out.splitlines() if line.startswith("layer")]
    assert relative == sorted(relative, reverse=True)
    assert "more" not in run("diff", "walk/wide@1", "walk/wide@2", "--limit", "30").out
    assert run("diff", "walk/wide@1", "walk/wide@2", "--limit", "-1").code == 2


def test_what_does_not_fit_is_said_beside_the_tensor(run: Run, here: Path) -> None:
    first = {"a": np.zeros((2, 3), np.float32), "mask": np.zeros(4, bool), "gone": np.zeros(2, np.int32)}
    second = {"a": np.zeros((3, 2), np.float32), "mask": np.arange(4) == 2, "new": np.float64(1)}
    for name, tensors in (("first", first), ("second", second)):
        save_file({key: np.asarray(value) for key, value in tensors.items()}, here / f"{name}.safetensors")
        run("push", here / f"{name}.safetensors", f"walk/{name}")
    out = run("diff", "walk/first", "walk/second").out
    assert "Tensors of model: 2 changed, 1 removed, 1 added, 0 the same" in out
    for line in (
        r"a +F32 2 x 3 -> F32 3 x 2",
        "mask +1 of 4 elements differ",
        "gone +in A alone, I32 2",
        "new +in B alone, F64 scalar",
    ):
        assert re.search(rf"^{line}$", out, re.MULTILINE), line


def test_an_adapter_and_its_base_have_an_honest_answer(run: Run, here: Path) -> None:
    ran = run("diff", "walk/perturb:prod", "walk/base", columns=80)
    assert ran.code == 1
    assert "they have no component in common" in " ".join(ran.out.split())
    assert "Tensors of adapter: 4, in A alone" in ran.out
    assert "Tensors of model: 2, in B alone" in ran.out


def test_text_from_data_cannot_steer_a_terminal(run: Run, here: Path, artifacts: Path) -> None:
    run("push", artifacts / "evil", "walk/evil", "-m", "\x1b[2J", "--meta", "note=\x1b]0;title\x07")
    for words in (["walk/evil", "walk/perturb@1"], ["walk/perturb@1", "walk/evil", "--json"]):
        out = run("diff", *words).out
        assert all(character.isprintable() or character == "\n" for character in out)


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_without_weights_no_tensor_library_is_imported(here: Path, tmp_path: Path, flags: list[str]) -> None:
    found = imported(tmp_path, "diff", "walk/perturb@1", "walk/perturb@3", "--no-weights", *flags, code=1)
    assert not found & set(HEAVY)


def test_without_weights_digests_and_configurations_are_compared(run: Run, here: Path) -> None:
    ran = run("diff", "walk/perturb@1", "walk/perturb@3", "--no-weights")
    assert ran.code == 1
    assert re.search(r"^q_proj +r 4 -> 8$", ran.out, re.MULTILINE)
    assert "NORM" not in ran.out
    assert json.loads(run("diff", "walk/perturb@1", "walk/perturb@3", "--no-weights", "--json").out)["weights"] is False


def test_an_unknown_reference_is_not_found(run: Run, here: Path) -> None:
    ran = run("diff", "walk/perturb@1", "walk/perturb:stage")
    assert ran.code == 4
    assert "stage" in ran.error
    assert run("diff", "walk/perturb@1").code == 2
