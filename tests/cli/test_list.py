from __future__ import annotations

import re
from pathlib import Path

import pytest

from registry import Registry
from registry.cli.list import COLUMNS
from tests.cli.conftest import Run


def numbers(run: Run, *words: str) -> list[str]:
    ran = run("list", *words, "--json")
    assert (ran.code, ran.err) == (0, "")
    return [f"{one['name']}@{one['version']}" for one in ran.json]


def test_json_of_a_list_is_the_contract(run: Run, here: Path) -> None:
    first = run("list", "walk/perturb", "--where", "version = 1", "--json").json[0]
    assert set(first) >= {
        *("name", "version", "digest", "kind", "tags", "r", "lora_alpha", "target_modules", "base"),
        *("peft_version", "size", "created_at", "metadata", "metrics", "findings"),
    }
    expected = {
        "name": "walk/perturb",
        "version": 1,
        "kind": "adapter",
        "tags": [],
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "base": "walk/base@1",
        "peft_version": "0.18.0",
        "metadata": {"robot": "a1", "seed": 3},
        "metrics": {"reward": 912.5, "loss": "NaN"},
        "findings": 0,
    }
    assert first.items() >= expected.items()
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", first["digest"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first["created_at"])


def test_what_is_not_known_is_null_in_json(run: Run, here: Path) -> None:
    base, wide = run("list", "--where", "version != 2", "--where", "version != 1", "--json").json, None
    (wide,) = [one for one in base if one["version"] == 3]
    assert (wide["peft_version"], wide["base"]) == (None, None)
    (plain,) = run("list", "--kind", "base", "--json").json
    assert (plain["r"], plain["lora_alpha"], plain["target_modules"]) == (None, None, None)


def test_numbers_that_json_lacks_are_strings(run: Run, here: Path) -> None:
    (one,) = run("list", "--tag", "prod", "--json").json
    assert one["metrics"] == {"reward": "Infinity", "loss": "-Infinity"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["walk/base@1", "walk/perturb@3", "walk/perturb@2", "walk/perturb@1"]),
        (["walk/per*"], ["walk/perturb@3", "walk/perturb@2", "walk/perturb@1"]),
        (["--base", "walk/base"], ["walk/perturb@2", "walk/perturb@1"]),
        (["--tag", "prod"], ["walk/perturb@2"]),
        (["--tag", "latest"], ["walk/base@1", "walk/perturb@3"]),
        (["--kind", "base"], ["walk/base@1"]),
        (["--where", "r >= 8"], ["walk/perturb@3"]),
        (["--where", "meta.robot = a1 and metric.reward > 900"], ["walk/perturb@1"]),
        (["--where", "kind = adapter", "--where", "r < 8", "--limit", "1"], ["walk/perturb@2"]),
        (["--sort", "version", "--limit", "2"], ["walk/base@1", "walk/perturb@1"]),
        (["--sort", "-size", "walk/perturb", "--limit", "1"], ["walk/perturb@3"]),
        (["--limit", "0"], []),
        (["nobody/*"], []),
    ],
)
def test_a_list_holds_what_was_asked_for(run: Run, here: Path, words: list[str], expected: list[str]) -> None:
    assert numbers(run, *words) == expected


def test_a_table_has_one_line_for_each_version(run: Run, here: Path) -> None:
    ran = run("list")
    assert (ran.code, ran.err) == (0, "")
    header, *lines = ran.out.splitlines()
    assert header.split() == [column.header for column in COLUMNS]
    assert [line.split()[0] for line in lines] == ["walk/base", *["walk/perturb"] * 3]
    wide = lines[1].split()
    assert wide[:7] == ["walk/perturb", "3", "-", "adapter", "8", "16", "-"]
    assert "KiB" in lines[1] or " B " in lines[1]


def test_an_empty_list_is_told_on_standard_error(run: Run, here: Path, tmp_path: Path) -> None:
    ran = run("list", "nobody/*")
    assert (ran.code, ran.out, ran.err) == (0, "", "no version is like that\n")
    Registry.init(tmp_path / "empty").close()
    ran = run("list", "--registry", tmp_path / "empty")
    assert (ran.code, ran.out, ran.err) == (0, "", "no versions yet\n")
    assert run("list", "nobody/*", "--json").out == "[]\n"


LONG = "a-namespace.with-a-long-name/robot-walker-perturbed-on-rough-terrain-20261123"


@pytest.fixture
def long_names(here: Path, artifacts: Path) -> list[str]:
    """A long name that is the base of another one, with 24 tags."""
    tags = [f"candidate-2026-11-{number}" for number in range(24)]
    with Registry.open() as registry:
        registry.push(artifacts / "base.safetensors", LONG, tags=["v1"])
        registry.push(artifacts / "first", f"{LONG}-2", base=LONG, tags=tags)
    return tags


def test_nothing_is_cut_where_there_is_no_terminal(run: Run, long_names: list[str]) -> None:
    lines = run("list").out.splitlines()
    (line,) = [line for line in lines if line.startswith(f"{LONG}-2 ")]
    assert ", ".join(sorted(long_names)) in line
    assert f"{LONG}@1" in line


def test_a_table_fits_in_80_columns_with_long_names_and_many_tags(run: Run, long_names: list[str]) -> None:
    lines = run("list", columns=80).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == [column.header for column in COLUMNS]
    # Names are folded, not cut: below each other they give the whole.
    at = lines[0].index("VER")
    assert f"{LONG}-2" in "".join(line[:at].strip() for line in lines[1:])
    assert "+21" in "".join(lines)
    assert len(lines) < 25


def test_a_table_that_fits_says_the_hour_too(run: Run, here: Path) -> None:
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d$", run("list", columns=100).out)
    assert re.search(r"\d{4}-\d\d-\d\d$", run("list", columns=75).out)
