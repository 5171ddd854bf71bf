"""`model_config` of files: a push keeps it as the version's architecture, and a pull writes it, so that who loads the
pulled file builds the same network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from registry import Registry
from registry.core.architecture import Architecture
from registry.core.errors import DigestMismatch
from registry.formats.loaded_payload import load_payload
from tests.operations.models import train
from tests.operations.test_architectures import blob_path

ARGUMENTS: dict[str, Any] = {
    "n_head": 4,
    "dropout": 0.0,
    "kernel": (3, 3),
    "seed": 2**63,
    "name": None,
    "more": {"a": [1]},
}
IN_JSON = {**ARGUMENTS, "kernel": [3, 3]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)

    @property
    def constructor_arguments(self) -> Mapping[str, Any]:
        return ARGUMENTS

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


class Silent(Net):
    constructor_arguments = None  # type: ignore[assignment]


NAME = f"{__name__}.Net"
CONFIG = {"class": NAME, "arguments": ARGUMENTS}


def lora(base: nn.Module) -> PeftModel:
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    train(model)
    return model


def pulled(registry: Registry, reference: str, path: Path) -> Any:
    """What a pulled file says of its network."""
    registry.pull(reference, path, format=path.suffix[1:])
    found = load_payload(path)
    if path.suffix == ".safetensors":
        return json.loads(found.header["model_config"]) if "model_config" in found.header else None
    payload = torch.load(path, weights_only=True)
    assert payload.get("model_config") == found.training.get("model_config")
    return payload.get("model_config")


@pytest.mark.parametrize("kind", ["base", "adapter", "checkpoint"])
def test_n_head_outlives_a_pull_and_a_push(registry: Registry, tmp_path: Path, kind: str) -> None:
    model = Net() if kind == "base" else lora(Net())
    first = registry.push(model, "walk/live", kind="checkpoint" if kind == "checkpoint" else None, probe=False)
    assert first.kind == kind
    for suffix, arguments in (("pth", ARGUMENTS), ("safetensors", IN_JSON)):
        path = tmp_path / f"it.{suffix}"
        assert pulled(registry, "walk/live", path) == {"class": NAME, "arguments": arguments}
        again = registry.push(path, f"walk/{suffix}")
        assert (again.kind, again.notes) == (kind, ())
        assert registry.architecture(f"walk/{suffix}") == Architecture(NAME, arguments)
        assert registry.get(f"walk/{suffix}").content_digest == registry.get("walk/live").content_digest
        assert pulled(registry, f"walk/{suffix}", tmp_path / f"again.{suffix}") == {
            "class": NAME,
            "arguments": arguments,
        }


def test_an_adapter_says_the_architecture_of_its_base(registry: Registry, tmp_path: Path) -> None:
    registry.push(Net(), "walk/base", probe=False)
    adapter = lora(Net())
    adapter.save_pretrained(tmp_path / "peft")
    registry.push(tmp_path / "peft", "walk/lora", base="walk/base")
    registry.push(tmp_path / "peft", "walk/alone")
    assert pulled(registry, "walk/lora", tmp_path / "a.pth") == CONFIG
    assert pulled(registry, "walk/lora", tmp_path / "a.safetensors") == {**CONFIG, "arguments": IN_JSON}
    for suffix in ("pth", "safetensors"):
        assert pulled(registry, "walk/alone", tmp_path / f"alone.{suffix}") is None


def test_peft_and_native_files_are_as_they_were(registry: Registry, tmp_path: Path) -> None:
    registry.push(lora(Net()), "walk/lora", probe=False)
    registry.pull("walk/lora", tmp_path / "peft", format="peft")
    registry.pull("walk/lora", tmp_path / "native")
    for folder in ("peft", "native"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_version_keeps_the_one_that_it_has(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "it.pth"
    torch.save({"model_state_dict": Net().state_dict(), "model_config": CONFIG}, path)
    pushed, again = registry.push(path, "walk/net"), registry.push(path, "walk/net")
    assert (pushed.notes, again.notes, again.created) == ((), (), False)
    assert [event.kind for event in registry.events("walk/net")].count("described") == 1


def test_a_malformed_one_is_noted_and_the_file_comes_back_as_it_was(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "it.pth"
    config = {"class": "a.B", "arguments": {"weight": torch.ones(3)}}
    torch.save({"model_state_dict": Net().state_dict(), "model_config": config}, path)
    (note,) = registry.push(path, "walk/net").notes
    assert note.startswith("no architecture is kept of model_config: arguments['weight']: a tensor is no plain data")
    assert registry.architecture("walk/net") is None
    registry.pull("walk/net", tmp_path / "native.pth")
    assert (tmp_path / "native.pth").read_bytes() == path.read_bytes()
    assert registry.load("walk/net", component="training")["model_config"]["arguments"]["weight"].tolist() == [1] * 3
    assert pulled(registry, "walk/net", tmp_path / "out.pth") is None


def test_it_goes_along_to_another_registry_and_comes_of_an_adopted_tree(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    torch.save({"model_state_dict": Net().state_dict(), "model_config": CONFIG}, tmp_path / "runs" / "net.pth")
    save_file(Net().state_dict(), tmp_path / "runs" / "flat.safetensors", {"model_config": json.dumps(CONFIG)})
    registry.adopt(tmp_path / "runs", namespace="walk")
    found = {one.name: registry.architecture(one.reference) for one in registry.find()}
    assert sorted(map(repr, found.values())) == sorted(
        map(
            repr,
            (Architecture(NAME, dict(sorted(ARGUMENTS.items()))), Architecture(NAME, dict(sorted(IN_JSON.items())))),
        )
    )
    name = next(iter(found))
    registry.export(name, to=tmp_path / "bundle.tar")
    with Registry.init(tmp_path / "other") as other:
        other.import_(tmp_path / "bundle.tar")
        assert other.architecture(name) == found[name]


def test_a_damaged_one_is_told_in_a_pull_that_would_write_it(registry: Registry, root: Path, tmp_path: Path) -> None:
    registry.push(Net(), "walk/net", probe=False)
    path = blob_path(registry, root, "walk/net")
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-1])
    with pytest.raises(DigestMismatch):
        registry.pull("walk/net", tmp_path / "net.pth", format="pth")
    assert not (tmp_path / "net.pth").exists()
    registry.pull("walk/net", tmp_path / "net.safetensors")
