"""pdp on an accelerator. CI has none; run these where there is one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pdp.lora_model import LoraTransformerForDiffusion
from pdp.policy import DiffusionPolicy
from pdp.utils.lora_utils import load_lora_checkpoint, merge_lora_weights, save_lora_checkpoint
from registry import Registry
from tests.pdp.models import FORWARD, close, lora, network, output
from tests.pdp.runs import LORA, workspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

SUFFIXES = [".pth", ".safetensors"]


def on_cuda(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(*(FORWARD[key].cuda() for key in ("sample", "timestep", "cond"))).cpu()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saving_goes_through_the_cpu_and_loading_lands_there_first(suffix: str, tmp_path: Path) -> None:
    model = lora()
    expected = output(model)
    model.to("cuda")
    for save in (model.save_lora_adapters, model.save_full_checkpoint):
        path = save(tmp_path / f"{save.__name__}{suffix}")
        if suffix == ".pth":
            saved = torch.load(path, weights_only=True)
            tensors = saved.get("lora_state_dict") or saved["model_state_dict"]
            assert {one.device.type for one in tensors.values()} == {"cpu"}
    made = LoraTransformerForDiffusion.from_checkpoint(tmp_path / f"save_full_checkpoint{suffix}")
    assert {one.device.type for one in made.parameters()} == {"cpu"}
    assert torch.equal(output(made), expected)
    other = lora(network(), seed=2).to("cuda")
    other.load_lora_adapters(tmp_path / f"save_lora_adapters{suffix}")
    assert {one.device.type for one in other.parameters()} == {"cuda"}
    assert close(on_cuda(other), expected, at_most=1e-4)


def test_a_model_on_an_accelerator_is_the_same_version(tmp_path: Path) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        first = lora().save_lora_adapters("registry://walk/perturb", registry=registry)
        again = lora().to("cuda").save_lora_adapters("registry://walk/perturb", registry=registry)
        assert first == again == "registry://walk/perturb@1"
        other = lora(seed=2).to("cuda")
        other.load_lora_adapters("registry://walk/perturb", registry=registry)
        assert close(on_cuda(other), output(lora()), at_most=1e-4)


def test_an_optimizer_comes_back_onto_its_device(tmp_path: Path) -> None:
    model = lora().to("cuda")
    optimizer = torch.optim.AdamW(model.get_optim_groups(0.1), lr=1e-3)
    model(*(FORWARD[key].cuda() for key in ("sample", "timestep", "cond"))).sum().backward()
    optimizer.step()
    save_lora_checkpoint(model, tmp_path / "c.pth", optimizer)
    load_lora_checkpoint(tmp_path / "c.pth", model, optimizer)
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"cuda"}
    merged = merge_lora_weights(model)
    assert close(on_cuda(merged), on_cuda(model), at_most=1e-5)


@pytest.mark.parametrize("lora_settings", [None, LORA])
def test_a_run_learns_in_bf16_and_goes_on_where_it_stopped(lora_settings: Any, tmp_path: Path) -> None:
    changed = {"policy__lora": lora_settings, "training__device": "cuda", "training__num_epochs": 12}
    whole = workspace(tmp_path, "whole", **changed)
    dtypes = set()
    whole.model.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    metrics = whole.run()
    assert torch.bfloat16 in dtypes
    assert {one.dtype for one in whole.model.parameters()} == {torch.float32}
    assert metrics["val_loss"] < 1.0
    workspace(tmp_path, "parts", **changed).run(until_step=13)
    second = workspace(tmp_path, "parts", **changed)
    second.load_checkpoint()
    second.run()
    mine, others = whole.model.state_dict(), second.model.state_dict()
    distance = max(float((mine[name].float() - one.float()).abs().max()) for name, one in others.items())
    assert distance < 1e-3, distance  # kernels may add up in another order
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = DiffusionPolicy.from_checkpoint(second.get_checkpoint_path()).to("cuda")
    action = policy.predict_action({"obs": torch.randn(3, 2, 11)})["action"]
    assert (action.device.type, tuple(action.shape)) == ("cuda", (3, 4, 3))
    other = workspace(tmp_path, "cpu", **{**changed, "training__device": "cpu"})
    other.load_checkpoint(second.get_checkpoint_path())
    assert {one.device.type for one in other.model.parameters()} == {"cpu"}
