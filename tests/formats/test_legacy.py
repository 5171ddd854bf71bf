"""The files that the framework before us wrote: every form goes in, tensor for tensor, and comes out byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.core.tensor_names import canonical_name

LEGACY = Path(__file__).parent / "legacy"
EXPECTED: dict[str, Any] = json.loads((LEGACY / "expected.json").read_bytes())
FILES = {
    "lora_adapters.pth": ("adapter", {"adapter"}),
    "lora_full.pth": ("checkpoint", {"model"}),
    "lora_checkpoint.pth": ("checkpoint", {"model", "ema", "optimizer", "scheduler", "training"}),
    "lora_checkpoint_later.pth": ("checkpoint", {"model", "optimizer", "scheduler", "training"}),
    "merged.pth": ("base", {"model", "training"}),
    "workspace.ckpt": ("checkpoint", {"model", "optimizer", "training"}),
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry.init(tmp_path_factory.mktemp("legacy") / "registry") as made:
        for name in FILES:
            made.push(LEGACY / name, f"legacy/{Path(name).stem}")
        yield made


def digest(tensor: torch.Tensor) -> str:
    return sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_its_kind_and_its_components(registry: Registry, name: str) -> None:
    details = registry.show(f"legacy/{Path(name).stem}")
    assert (details.found.record.kind, set(details.contents.components)) == FILES[name]


@pytest.mark.parametrize("name", FILES)
def test_a_file_comes_back_byte_for_byte(registry: Registry, name: str, tmp_path: Path) -> None:
    registry.pull(f"legacy/{Path(name).stem}", tmp_path / name)
    assert (tmp_path / name).read_bytes() == (LEGACY / name).read_bytes()


@pytest.mark.parametrize("name", ["lora_adapters", "lora_full", "lora_checkpoint", "lora_checkpoint_later"])
def test_the_adapters_tensors_are_those_that_were_saved(registry: Registry, name: str) -> None:
    tensors = registry.load(f"legacy/{name}")
    found = {key: digest(tensor) for key, tensor in tensors.items() if ".lora_" in key}
    assert found == EXPECTED["adapter_tensors"]


@pytest.mark.parametrize("name", ["merged"])
def test_merged_tensors_are_those_that_were_saved(registry: Registry, name: str) -> None:
    assert {key: digest(tensor) for key, tensor in registry.load(f"legacy/{name}").items()} == EXPECTED[
        "merged_tensors"
    ]


@pytest.mark.parametrize("name", ["lora_adapters", "lora_full", "lora_checkpoint", "lora_checkpoint_later"])
def test_the_settings_become_a_configuration(registry: Registry, name: str) -> None:
    version = registry.get(f"legacy/{name}")
    assert (version.r, version.lora_alpha, version.peft_type) == (4, 8.0, "LORA")
    assert version.findings == 0
    modules = {canonical_name(key).rpartition(".lora_")[0] for key in EXPECTED["adapter_tensors"]}
    assert set(version.target_modules or ()) == modules


def test_a_tensor_that_stands_under_two_names_is_kept_under_one(registry: Registry) -> None:
    pushed = registry.push(LEGACY / "lora_checkpoint_later.pth", "legacy/lora_checkpoint_later")
    assert not pushed.created
    assert any("110 tensors stand under two names (base_model.cond_pos_emb, ...)" in note for note in pushed.notes)
    assert any("lora_model is the model again" in note for note in pushed.notes)
    one, other = (registry.load(f"legacy/{name}") for name in ("lora_checkpoint_later", "lora_full"))
    assert one.keys() == other.keys()


def test_an_optimizer_comes_back_as_it_was_saved(registry: Registry) -> None:
    saved = torch.load(LEGACY / "lora_checkpoint.pth", weights_only=True)["state_dicts"]
    loaded = registry.load("legacy/lora_checkpoint", component="optimizer")
    assert loaded["param_groups"] == saved["optimizer"]["param_groups"]
    assert loaded["state"].keys() == saved["optimizer"]["state"].keys()
    for key, state in saved["optimizer"]["state"].items():
        assert all(torch.equal(loaded["state"][key][name], tensor) for name, tensor in state.items())
    assert registry.load("legacy/lora_checkpoint", component="scheduler") == saved["scheduler"]
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True) for _ in range(36)], lr=0.1)
    groups = loaded["param_groups"]
    assert len(groups) == 2
    assert optimizer.state_dict().keys() == loaded.keys()


def test_what_is_said_of_a_run_can_be_asked_for(registry: Registry) -> None:
    (found,) = registry.find("meta.description = 'Fine-tuned model'", "meta.epoch >= 10")
    assert found.name == "legacy/lora_checkpoint"
    assert found.metadata == {"description": "Fine-tuned model", "version": "1.0.0", "epoch": 10, "global_step": 1000}
    assert registry.get("legacy/workspace").metadata == {"epoch": 10, "global_step": 1000}
    assert registry.get("legacy/merged").metadata == {"model_type": "merged_lora"}


def test_a_configuration_object_comes_back_as_plain_data(registry: Registry) -> None:
    training = registry.load("legacy/workspace", component="training")
    assert training["cfg"]["_target_"] == "pdp.workspace.DiffusionPolicyWorkspace"
    assert training["cfg"]["policy"]["model"]["emb_dim"] == EXPECTED["model"]["emb_dim"]
    assert training["epoch"] == 10
