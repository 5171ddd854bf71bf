"""Models on an accelerator. CI has none; run these where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from registry import Incompatible, Registry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(256, 256)
        self.v_proj = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(torch.relu(self.q_proj(x)))


def trained(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    lora = get_peft_model(Model(), LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return lora.to(device=device, dtype=dtype).eval()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.init(tmp_path / "registry")


def test_a_model_on_an_accelerator_is_the_same_version_as_on_the_cpu(registry: Registry) -> None:
    first = registry.push(trained("cpu"), "walk/perturb")
    again = registry.push(trained("cuda"), "walk/perturb")
    assert (again.version, again.created) == (first.version, False)
    checkpoint = registry.push(trained("cpu"), "walk/full", kind="checkpoint")
    assert not registry.push(trained("cuda"), "walk/full", kind="checkpoint").created
    assert checkpoint.version == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_is_loaded_onto_the_models_own_device_and_dtype(registry: Registry, dtype: torch.dtype) -> None:
    source = trained("cpu")
    registry.push(source, "walk/perturb")
    other = get_peft_model(Model(), LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    other = other.to(device="cuda", dtype=dtype)
    registry.load("walk/perturb", other)
    for (name, here), (_, there) in zip(other.named_parameters(), source.named_parameters(), strict=True):
        if "lora_" in name:
            assert here.device.type == "cuda"
            assert here.dtype == dtype
            assert torch.equal(here.cpu(), there.to(dtype)), name


def test_a_plain_base_on_an_accelerator_is_wrapped_and_gives_the_trained_outputs(registry: Registry) -> None:
    source = trained("cuda")
    registry.push(source, "walk/perturb")
    base = Model()
    base.load_state_dict(
        {
            k.replace("base_model.model.", "").replace(".base_layer", ""): v
            for k, v in source.state_dict().items()
            if "lora_" not in k
        }
    )
    loaded = registry.load("walk/perturb", base.to("cuda")).eval()
    x = torch.randn(16, 256, device="cuda")
    with torch.no_grad():
        assert torch.equal(loaded(x), source(x))


def test_a_checkpoint_is_loaded_onto_an_accelerator(registry: Registry) -> None:
    torch.manual_seed(1)
    source = Model()
    registry.push(source, "walk/base")
    target = registry.load("walk/base", Model().to("cuda"))
    x = torch.randn(4, 256)
    with torch.no_grad():
        assert torch.allclose(target(x.cuda()).cpu(), source(x), atol=1e-5)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor.cpu(), source.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("made_on", "loaded_on"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_a_probe_proves_a_model_on_another_device(
    registry: Registry, made_on: str, loaded_on: str, dtype: torch.dtype
) -> None:
    source = trained(made_on)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert registry.push(source, "walk/perturb").notes == ()
    assert all(map(torch.equal, states, (torch.get_rng_state(), torch.cuda.get_rng_state())))
    loaded = registry.load("walk/perturb", trained(loaded_on, dtype), prove=True)
    proof = registry.prove("walk/perturb", loaded)
    assert proof.worst.relative <= proof.allowed
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(1.2)
    assert not registry.prove("walk/perturb", loaded)


def test_a_refused_load_leaves_a_model_on_an_accelerator_as_it_was(registry: Registry) -> None:
    registry.push(trained("cpu"), "walk/perturb")
    other = get_peft_model(Model(), LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"])).to("cuda")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(Incompatible):
        registry.load("walk/perturb", other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
