"""`registry check`, `fits` and `needs`: exit codes, what goes to which stream, models that users name, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.fixture
def net(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A class in the working folder that the adapters of the fixtures are for."""
    (here / "walknet.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, width=4):\n"
        "        super().__init__()\n"
        "        self.q_proj = torch.nn.Linear(width, width)\n"
        "        self.v_proj = torch.nn.Linear(width, width)\n"
        "class Broken(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        open('no-such-file')\n"
    )
    monkeypatch.delitem(sys.modules, "walknet", raising=False)
    return "walknet:Net"


def test_what_fits_exits_with_0_and_says_so_first(run: Run, here: Path) -> None:
    ran = run("check", "walk/perturb@1")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[0] == "walk/perturb@1 into walk/base@1: fits"


def test_what_does_not_fit_exits_with_1_and_says_why(run: Run, here: Path, artifacts: Path) -> None:
    assert run("push", artifacts / "nan", "walk/nan", "--base", "walk/base", "--force").code == 0
    ran = run("check", "walk/nan")
    assert ran.code == 1
    assert "does not fit" in ran.out
    assert "C17" in ran.out


def test_what_is_not_known_exits_with_0_and_says_what_on_standard_error(run: Run, here: Path) -> None:
    ran = run("check", "walk/perturb@3", "--base", "walk/base")
    assert ran.code == 0
    assert ran.out.splitlines()[0].endswith("undecided")
    assert "not decided: C04" in ran.err
    assert run("check", "walk/perturb@3", "--base", "walk/base", "--strict").code == 1


def test_json_has_the_verdict_and_every_finding(run: Run, here: Path) -> None:
    found = run("check", "walk/perturb@1", "--json").json
    assert (found["verdict"], found["purpose"], found["matched"]) == ("fits", "load", found["total"])
    assert found["findings"] == []


def test_a_class_that_the_user_names_is_built_without_weights(run: Run, here: Path, net: str) -> None:
    ran = run("check", "walk/perturb@1", "--model", net, "--kwargs", '{"width": 5}')
    assert ran.code == 1
    assert "C08" in ran.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "walknet"], "walknet"),
        (["--model", "no_such_module:Net"], "no_such_module"),
        (["--model", "walknet:Nett"], "Net"),
        (["--model", "walknet:Net", "--kwargs", '{"widht": 3}'], "widht"),
        (["--model", "walknet:Broken"], "no-such-file"),
        (["--model", "walknet:Net", "--kwargs", "not.json"], "not.json"),
        (["--model", "os:system"], "system"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_line(run: Run, here: Path, net: str, options: list[str], told: str) -> None:
    ran = run("check", "walk/perturb@1", *options)
    assert ran.code in (3, 4)
    assert told in ran.error


@pytest.mark.parametrize(
    "words",
    [
        ["check", "walk/perturb", "--kwargs", "{}"],
        ["check", "walk/perturb", "--base", "walk/base", "--model", "a:b"],
        ["fits"],
    ],
)
def test_wrong_usage_exits_with_2(run: Run, here: Path, words: list[str]) -> None:
    assert run(*words).code == 2


def test_fits_lists_what_fits_and_all_says_why_the_others_do_not(run: Run, here: Path, artifacts: Path) -> None:
    run("push", artifacts / "nan", "walk/nan", "--base", "walk/base", "--force")
    names = [entry["name"] for entry in run("fits", "walk/base", "--json").json]
    assert "walk/perturb" in names
    assert "walk/nan" not in names
    everything = {entry["name"]: entry for entry in run("fits", "walk/base", "--all", "--json").json}
    assert everything["walk/nan"]["verdict"] == "does not fit"
    assert everything["walk/nan"]["reason"].startswith("C17")
    assert "TARGETS" in run("fits", "walk/base", "--where", "r < 100").out
    assert run("fits", "walk/base", "--where", "r > 1000").err == "no adapter fits; --all shows why not\n"


def test_needs_spells_the_flags_of_servers_out(run: Run, here: Path) -> None:
    ran = run("needs", "walk/perturb@1")
    assert "--enable-lora" in ran.out
    assert run("needs", "walk/perturb@1", "--json").json["vllm"]["flags"][0] == "--enable-lora"


def test_a_llama_of_7_billion_parameters_is_checked_within_a_gigabyte(here: Path) -> None:
    program = (
        "import sys\nfrom registry.cli.app import app\n"
        "try:\n    app(['check', 'walk/perturb@1', '--model', 'transformers:LlamaForCausalLM', '--json'])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(code, peak, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    code, peak = ran.stderr.split()[-2:]
    assert (code, json.loads(ran.stdout)["verdict"]) == ("1", "does not fit")
    assert int(peak) < 1 << 20  # KiB
