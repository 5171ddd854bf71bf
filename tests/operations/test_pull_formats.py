"""One adapter in every form: whatever it was pushed as, it comes out as what others read, and goes in again."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from registry import Registry
from registry.core.errors import DigestMismatch, InvalidInput, NoSpace
from tests.operations.models import QV, Walker

LEGACY = Path(__file__).parents[1] / "formats" / "legacy"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as made:
        yield made


def walker(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Walker(), LoraConfig(**{**QV, **options}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(32.0).reshape(2, 16) / 32)
    return result


def fresh() -> Walker:
    torch.manual_seed(0)
    return Walker()


def forms(registry: Registry, tmp_path: Path) -> dict[str, str]:
    """The same adapter, pushed in every way."""
    model = walker()
    model.save_pretrained(tmp_path / "peft")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "adapter_config.json").write_bytes((tmp_path / "peft" / "adapter_config.json").read_bytes())
    torch.save(load_file(tmp_path / "peft" / "adapter_model.safetensors"), tmp_path / "bin" / "adapter_model.bin")
    pushed = {
        "live": registry.push(model, "a/live"),
        "folder": registry.push(tmp_path / "peft", "a/folder"),
        "bin folder": registry.push(tmp_path / "bin", "a/bin"),
    }
    registry.pull("a/live", tmp_path / "a.pth", format="pth")
    registry.pull("a/live", tmp_path / "a.safetensors", format="safetensors")
    pushed["pth"] = registry.push(tmp_path / "a.pth", "a/pth")
    pushed["safetensors"] = registry.push(tmp_path / "a.safetensors", "a/safetensors")
    return {form: result.reference for form, result in pushed.items()}


def test_one_adapter_has_one_content_digest_in_every_form(registry: Registry, tmp_path: Path) -> None:
    digests = {form: registry.get(reference).content_digest for form, reference in forms(registry, tmp_path).items()}
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("form", ["live", "folder", "bin folder", "pth", "safetensors"])
def test_every_form_becomes_a_folder_that_peft_loads(registry: Registry, tmp_path: Path, form: str) -> None:
    reference = forms(registry, tmp_path)[form]
    expected = output(walker())
    registry.pull(reference, tmp_path / "out", format="peft")
    assert torch.equal(output(PeftModel.from_pretrained(fresh(), tmp_path / "out").eval()), expected)
    assert torch.equal(output(registry.load(reference, fresh()).eval()), expected)
    assert not torch.equal(output(fresh().eval()), expected)


def test_a_pth_is_plain_data_with_the_settings(registry: Registry, tmp_path: Path) -> None:
    registry.push(walker(), "a/live")
    assert registry.pull("a/live", tmp_path, format="pth").path == tmp_path / "live.pth"
    payload = torch.load(tmp_path / "live.pth", weights_only=True)
    tensors = payload.pop("lora_state_dict")
    assert payload == {
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "apply_to": "both",
    }
    live = {name: tensor for name, tensor in walker().state_dict().items() if "lora_" in name}
    assert tensors.keys() == live.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in live.items())


def test_a_checkpoint_becomes_a_pth_and_an_adapter(registry: Registry, tmp_path: Path) -> None:
    registry.push(LEGACY / "lora_checkpoint.pth", "a/run")
    registry.pull("a/run", tmp_path / "full.pth", format="pth")
    payload = torch.load(tmp_path / "full.pth", weights_only=True)
    theirs = torch.load(LEGACY / "lora_checkpoint.pth", weights_only=True)
    assert payload["lora_config"].pop("target_modules") == sorted(
        theirs["pickles"]["lora_config"].pop("target_modules")
    )
    assert payload["lora_config"] == theirs["pickles"]["lora_config"]
    model = theirs["state_dicts"]["model"]
    assert payload["model_state_dict"].keys() == model.keys()
    assert all(torch.equal(payload["model_state_dict"][name], tensor) for name, tensor in model.items())
    registry.pull("a/run", tmp_path / "peft", format="peft")
    adapters = registry.push(LEGACY / "lora_adapters.pth", "a/adapters")
    folder = registry.push(tmp_path / "peft", "a/adapters")
    assert folder.same_content_as == adapters.version


def test_a_base_becomes_a_pth(registry: Registry, tmp_path: Path) -> None:
    registry.push(fresh(), "a/base")
    registry.pull("a/base", tmp_path / "base.pth", format="pth")
    payload = torch.load(tmp_path / "base.pth", weights_only=True)
    assert payload["model_type"] == "base"
    assert all(torch.equal(payload["model_state_dict"][key], value) for key, value in fresh().state_dict().items())
    assert registry.push(tmp_path / "base.pth", "a/base").same_content_as == 1
    roles = [role for _, role in registry.show("a/base@2").contents.blobs]
    assert roles.count("tensors") == 0, "its tensors are stored already"


def test_a_safetensors_file_says_its_configuration(registry: Registry, tmp_path: Path) -> None:
    model = walker(rank_pattern={"v_proj": 2})
    registry.push(model, "a/live")
    registry.pull("a/live", tmp_path / "a.safetensors", format="safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["adapter_config"])
    assert (config["r"], config["rank_pattern"], config["peft_type"]) == (4, {"v_proj": 2}, "LORA")
    assert config["peft_version"]
    again = registry.push(tmp_path / "a.safetensors", "a/live")
    assert (again.same_content_as, again.notes) == (1, ())
    assert torch.equal(output(registry.load("a/live@2", fresh()).eval()), output(model))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "has use_dora"),
        ({"use_rslora": True}, "has use_rslora"),
        ({"rank_pattern": {"v_proj": 2}}, "v_proj is linear with rank 2, r is 4"),
        ({"alpha_pattern": {"v_proj": 2}}, "has alpha_pattern"),
        ({"modules_to_save": ["head"]}, "has modules_to_save"),
        ({"bias": "lora_only"}, "q_proj is linear+base_bias"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_settings_cannot_say_is_refused(
    registry: Registry, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    registry.push(walker(**options), "a/live")
    with pytest.raises(
        InvalidInput, match=rf"a/live@1 cannot be a .pth of r, alpha and dropout alone: .*{re.escape(reason)}"
    ):
        registry.pull("a/live", tmp_path / "a.pth", format="pth")
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize("form", ["peft", "pth"])
def test_an_adapter_without_a_configuration_is_refused(registry: Registry, tmp_path: Path, form: str) -> None:
    walker().save_pretrained(tmp_path / "peft")
    registry.push(tmp_path / "peft" / "adapter_model.safetensors", "a/bare")
    with pytest.raises(InvalidInput, match=r"a/bare@1 has no (adapter_config|configuration)"):
        registry.pull("a/bare", tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["peft", "safetensors", "pth"])
def test_a_damaged_tensor_is_found_on_the_way_out(registry: Registry, tmp_path: Path, form: str) -> None:
    torch.save({"lora_r": 2, "lora_alpha": 2, "lora_state_dict": lora(2)}, tmp_path / "a.pth")
    registry.push(tmp_path / "a.pth", "a/pth")
    contents = registry.show("a/pth").contents
    blob, _ = contents.components["adapter"].places[0]
    path = registry._context.store.blobs.local_path(blob)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(DigestMismatch, match="lora_"):
        registry.pull("a/pth", tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def lora(r: int) -> dict[str, torch.Tensor]:
    prefix = "base_model.model.encoder.q_proj"
    return {f"{prefix}.lora_A.default.weight": torch.ones(r, 4), f"{prefix}.lora_B.default.weight": torch.ones(4, r)}


def test_tied_tensors_stay_tied_in_a_pth(registry: Registry, tmp_path: Path) -> None:
    weight = torch.randn(300, 300)
    save_file({"a": weight, "b": weight.clone()}, tmp_path / "model.safetensors")
    registry.push(tmp_path / "model.safetensors", "a/tied")
    registry.pull("a/tied", tmp_path / "tied.pth", format="pth")
    assert (tmp_path / "tied.pth").stat().st_size < 1.2 * weight.nbytes


def test_a_pth_that_finds_no_room_is_told_and_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1 << 20)}, tmp_path / "model.safetensors")
    registry.push(tmp_path / "model.safetensors", "a/model")
    (tmp_path / "out").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(NoSpace, match="no space to write"):
            registry.pull("a/model", tmp_path / "out" / "model.pth", format="pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "out").iterdir()) == []
