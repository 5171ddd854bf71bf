"""What a file says of how its network was built is kept as an architecture, or the push says why not and goes on."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from registry.core.architecture import ROLE, Architecture, read_architecture
from registry.formats.loaded_payload import load_payload
from registry.formats.model_config import MAX_TEXT, MODEL_CONFIG, described_by_header
from registry.formats.paths import read_path
from registry.formats.safetensors_tree import write_safetensors_tree

ARGUMENTS: dict[str, Any] = {"n_head": 4, "dropout": 0.0, "kernel": (3, 3), "name": None, "sizes": [1, 2]}
CONFIG: dict[str, Any] = {"class": "pdp.modules_v2.QKVTransformerForDiffusion", "arguments": ARGUMENTS}
IN_JSON = {**ARGUMENTS, "kernel": [3, 3]}
LORA = {"lora_r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def model() -> dict[str, torch.Tensor]:
    return {"q_proj.weight": torch.ones(4, 4)}


def adapter() -> dict[str, torch.Tensor]:
    at = "base_model.model.q_proj.lora_"
    return {f"{at}A.default.weight": torch.ones(2, 4), f"{at}B.default.weight": torch.ones(4, 2)}


def saved(path: Path, tree: Any) -> Path:
    if path.suffix == ".safetensors":
        with path.open("wb") as file:
            write_safetensors_tree(tree, file)
    else:
        torch.save(tree, path)
    return path


def flat(path: Path, text: str) -> Path:
    save_file(model(), path, {"format": "pt", MODEL_CONFIG: text})
    return path


def opened(path: Path) -> tuple[str, Architecture | None, tuple[str, ...]]:
    with read_path(path) as source:
        data = source.described.get(ROLE)
        assert set(source.described) <= {ROLE}
        return source.kind, None if data is None else read_architecture(data, "it"), source.notes


TREES: dict[str, tuple[Any, str]] = {
    "base": ({"model_state_dict": model(), "model_type": "base", MODEL_CONFIG: CONFIG}, "base"),
    "ordered": ({"model_state_dict": model(), MODEL_CONFIG: OrderedDict(CONFIG)}, "base"),
    "adapter": ({**LORA, "lora_state_dict": adapter(), MODEL_CONFIG: CONFIG}, "adapter"),
    "with LoRA": (
        {"model_state_dict": {**model(), **adapter()}, "lora_config": LORA, MODEL_CONFIG: CONFIG},
        "checkpoint",
    ),
    "workspace": (
        {"state_dicts": {"model": model()}, "pickles": {"epoch": 3, MODEL_CONFIG: CONFIG}},
        "checkpoint",
    ),
    "workspace of pickles": (
        {
            "state_dicts": {"model": model()},
            "pickles": {MODEL_CONFIG: pickle.dumps(CONFIG), "epoch": b"\x80\x02K\x03."},
        },
        "checkpoint",
    ),
}


@pytest.mark.parametrize("suffix", ["pth", "ckpt", "safetensors"])
@pytest.mark.parametrize("form", TREES)
def test_a_checkpoint_says_its_architecture(tmp_path: Path, form: str, suffix: str) -> None:
    tree, kind = TREES[form]
    path = saved(tmp_path / f"it.{suffix}", tree)
    assert opened(path) == (kind, Architecture(CONFIG["class"], ARGUMENTS), ())
    assert load_payload(path).training[MODEL_CONFIG] == CONFIG


@pytest.mark.parametrize("tensors", [model(), adapter(), {**model(), **adapter()}], ids=["base", "adapter", "both"])
def test_a_flat_file_says_it_in_its_header(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "it.safetensors", {MODEL_CONFIG: json.dumps(CONFIG)})
    assert opened(tmp_path / "it.safetensors")[1] == Architecture(CONFIG["class"], IN_JSON)


@pytest.mark.parametrize("value", [CONFIG, {"n_head": 4}, {"class": 5}, "text"])
def test_it_makes_no_checkpoint_of_a_model(tmp_path: Path, value: Any) -> None:
    tree = {"model_state_dict": model(), "model_type": "base"}
    assert opened(saved(tmp_path / "without.pth", tree))[0] == "base"
    assert opened(saved(tmp_path / "with.pth", {**tree, MODEL_CONFIG: value}))[0] == "base"
    assert opened(saved(tmp_path / "run.pth", {**tree, MODEL_CONFIG: value, "epoch": 1}))[0] == "checkpoint"


@pytest.mark.parametrize("value", [None, {}, {"n_head": 4}, {"arguments": {"n_head": 4}}])
def test_arguments_alone_give_none_and_no_note(tmp_path: Path, value: Any) -> None:
    assert opened(saved(tmp_path / "it.pth", {"model_state_dict": model(), MODEL_CONFIG: value}))[1:] == (None, ())
    assert opened(flat(tmp_path / "it.safetensors", json.dumps(value)))[1:] == (None, ())


def test_a_state_dict_of_that_name_stays_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "it.pth", {MODEL_CONFIG: model()})
    assert opened(path) == ("base", None, ())


class Thing:
    def __init__(self) -> None:
        self.arguments = ARGUMENTS


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def shared(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value] * 8
    return value


def looped() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


PLAIN: dict[str, tuple[Any, str]] = {
    "text": ("pdp.Net", "it is a str; expected a dict of class and arguments"),
    "a list": ([CONFIG], "it is a list"),
    "class no text": ({"class": 5, "arguments": {}}, "its class is a int; expected text"),
    "class a deep list": ({"class": nested(90), "arguments": {}}, "its class is a list"),
    "class null": ({"class": None, "arguments": {}}, "its class is a NoneType"),
    "class of lines": ({"class": "a\nb", "arguments": {}}, r"the class is 'a\\nb'; expected a name"),
    "class of 10 MB": ({"class": "x" * 10_000_000, "arguments": {}}, "expected a name of at most 512|is no JSON"),
    "no arguments": ({"class": "a.B"}, "its arguments are a NoneType"),
    "arguments in a list": ({"class": "a.B", "arguments": [1]}, "its arguments are a list"),
    "deep": ({"class": "a.B", "arguments": {"x": nested(40)}}, "nested over 32 deep"),
    "10 MB": ({"class": "a.B", "arguments": {"x": "y" * 10_000_000}}, "at most (1048576 bytes|8388608)"),
    "2 MB": ({"class": "a.B", "arguments": {"x": ["y" * 1000] * 2000}}, "expected at most 1048576 bytes"),
    "2 MB of keys": ({"class": "a.B", "arguments": {"y" * n: 1 for n in range(2000)}}, "at most 1048576 bytes"),
    "a large integer": ({"class": "a.B", "arguments": {"x": 2**70}}, "an integer of 71 bits"),
}
TORCH: dict[str, tuple[Any, str]] = {
    "a tensor": (
        {"class": "a.B", "arguments": {"x": [torch.ones(2)]}},
        r"arguments\['x'\]\[0\]: a tensor is no plain data",
    ),
    "class a tensor": ({"class": torch.ones(2), "arguments": {}}, "its class is a tensor; expected text"),
    "arguments a tensor": ({"class": "a.B", "arguments": torch.ones(2)}, "its arguments are a tensor"),
    "an object": (
        {"class": "a.B", "arguments": {"x": Thing()}},
        r"arguments\['x'\]: an object of .*Thing is no plain data",
    ),
    "all an object": (Thing(), "it is an object of .*Thing; expected a dict"),
    "a class": ({"class": "a.B", "arguments": {"act": nn.ReLU}}, r"\['act'\]: torch.nn.modules.activation.ReLU is no"),
    "a dtype": ({"class": "a.B", "arguments": {"x": torch.float16}}, r"\['x'\]: torch.float16 is no plain data"),
    "bytes": ({"class": "a.B", "arguments": {"x": b"y"}}, "a bytes is no plain data"),
    "a set": ({"class": "a.B", "arguments": {"x": {1}}}, "a set is no plain data"),
    "a number as key": ({"class": "a.B", "arguments": {"x": {1: 2}}}, "the key 1 is no text"),
    "a loop": ({"class": "a.B", "arguments": {"x": looped()}}, "a list that contains itself"),
    "shared": ({"class": "a.B", "arguments": {"x": shared(0, 6)}}, ""),
    "shared without end": ({"class": "a.B", "arguments": {"x": shared("y" * 1000, 6)}}, "expected at most 1048576"),
}


@pytest.mark.parametrize("name", [*PLAIN, *TORCH])
def test_a_hostile_one_in_a_pickle_is_noted_and_the_rest_is_pushed(tmp_path: Path, name: str) -> None:
    value, why = {**PLAIN, **TORCH}[name]
    kind, found, notes = opened(saved(tmp_path / "it.pth", {"model_state_dict": model(), MODEL_CONFIG: value}))
    assert kind == "base"
    if not why:
        assert (found is not None, notes) == (True, ())
        return
    assert found is None
    (note,) = [one for one in notes if one.startswith("no architecture is kept of model_config")]
    assert re.search(why, note), note
    assert len(note) < 400


@pytest.mark.parametrize("name", PLAIN)
def test_a_hostile_one_in_a_header_is_noted_and_the_rest_is_pushed(tmp_path: Path, name: str) -> None:
    value, why = PLAIN[name]
    kind, found, (note,) = opened(flat(tmp_path / "it.safetensors", json.dumps(value)))
    assert (kind, found) == ("base", None)
    assert re.match(rf"no architecture is kept of model_config.*({why})", note), note


@pytest.mark.parametrize(
    "text",
    ["", "{", "'a'", "[" * 100_000, '{"class": "a.B", "arguments": {"x": ' + "9" * 5000 + "}}", "x" * (MAX_TEXT + 1)],
    ids=["empty", "torn", "python", "deep", "digits", "long"],
)
def test_a_header_that_is_no_json_is_noted(tmp_path: Path, text: str) -> None:
    _, found, (note,) = opened(flat(tmp_path / "it.safetensors", text))
    assert found is None
    assert note.startswith("no architecture is kept of model_config in the header, which is no JSON: ")


def test_half_a_character_is_noted() -> None:
    described, (note,) = described_by_header({MODEL_CONFIG: r'{"class": "a.B", "arguments": {"x": "\ud800"}}'})
    assert described == {}
    assert "cannot be written as canonical JSON" in note


def test_nan_and_infinities_are_floats_as_in_a_live_model(tmp_path: Path) -> None:
    config = {"class": "a.B", "arguments": {"x": math.nan, "y": -math.inf}}
    paths = [
        saved(tmp_path / "it.pth", {"model_state_dict": model(), MODEL_CONFIG: config}),
        flat(tmp_path / "it.safetensors", json.dumps(config)),
    ]
    for path in paths:
        _, found, notes = opened(path)
        assert found is not None
        assert (math.isnan(found.arguments["x"]), found.arguments["y"], notes) == (True, -math.inf, ())


def test_nothing_is_imported_by_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"class": "a_trap.Net", "arguments": {}}
    path = saved(tmp_path / "it.pth", {"model_state_dict": model(), MODEL_CONFIG: config})
    assert opened(path)[1] == Architecture("a_trap.Net", {})
