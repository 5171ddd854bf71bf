"""The older framework's files: each of the six forms gives the outputs that were recorded when it was written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pdp.ema import EMAModel
from pdp.errors import CheckpointWarning
from pdp.lora_model import LoraTransformerForDiffusion
from pdp.modules_v2 import QKVTransformerForDiffusion
from pdp.utils.lora_utils import load_lora_checkpoint, merge_lora_weights
from pdp.workspace import DiffusionPolicyWorkspace
from registry import Registry
from registry.core.errors import Incompatible
from tests.pdp.models import EXPECTED, FORWARD, LEGACY, close, lora, network, output

WITH_BASE = ["lora_full.pth", "lora_checkpoint.pth", "lora_checkpoint_later.pth"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry.init(tmp_path_factory.mktemp("legacy") / "registry") as made:
        made.push(LEGACY / "workspace.ckpt", "legacy/base", tags=["v1"])
        for name in ("lora_adapters.pth", "lora_full.pth", "lora_checkpoint.pth", "lora_checkpoint_later.pth"):
            made.push(LEGACY / name, f"legacy/{Path(name).stem}", base="legacy/base")
        made.push(LEGACY / "merged.pth", "legacy/merged")
        yield made


@pytest.fixture(autouse=True)
def what_no_shape_shows() -> Iterator[None]:
    """These files do not say how their network was made; what was assumed is right, and has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*does not say how its network was made", CheckpointWarning)
        yield


@pytest.mark.parametrize("name", WITH_BASE)
def test_a_file_with_base_and_adapter_gives_the_recorded_outputs(name: str) -> None:
    made = LoraTransformerForDiffusion.from_checkpoint(LEGACY / name)
    assert close(output(made), FORWARD["output"])
    assert (made.lora_r, made.lora_alpha, len(made.get_targeted_modules())) == (4, 8, 18)


def test_the_adapters_on_the_base_of_a_workspace_give_the_recorded_outputs() -> None:
    base = QKVTransformerForDiffusion.from_checkpoint(LEGACY / "workspace.ckpt")
    assert not close(output(base), FORWARD["output"])
    made = LoraTransformerForDiffusion.from_checkpoint(LEGACY / "lora_adapters.pth", LEGACY / "workspace.ckpt")
    assert close(output(made), FORWARD["output"])
    model = lora(base)
    model.load_lora_adapters(LEGACY / "lora_adapters.pth")
    assert close(output(model), FORWARD["output"])


def test_the_merged_file_gives_the_recorded_outputs_and_so_does_merging_again() -> None:
    merged = QKVTransformerForDiffusion.from_checkpoint(LEGACY / "merged.pth")
    assert close(output(merged), FORWARD["output"])
    again = merge_lora_weights(LoraTransformerForDiffusion.from_checkpoint(LEGACY / "lora_full.pth"))
    assert again.state_dict().keys() == EXPECTED["merged_tensors"].keys()
    assert all(close(one, merged.state_dict()[name]) for name, one in again.state_dict().items())


@pytest.mark.parametrize("name", WITH_BASE)
def test_a_file_is_loaded_into_a_live_model_with_optimizer_and_schedule(name: str) -> None:
    model = lora(network(seed=7), seed=8)
    optimizer = torch.optim.AdamW(model.get_optim_groups(1e-3), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    if name == "lora_full.pth":
        model.load_full_checkpoint(LEGACY / name)
    else:
        payload = load_lora_checkpoint(LEGACY / name, model, optimizer, scheduler)
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == 0.00993844170297569
        assert scheduler.last_epoch == 5
        assert {**payload, **payload["pickles"]}["global_step"] == 1000
    assert close(output(model), FORWARD["output"])


def test_the_moving_average_of_a_file_is_loaded() -> None:
    model = lora(network(seed=7), seed=8)
    ema = EMAModel(model)
    load_lora_checkpoint(LEGACY / "lora_checkpoint.pth", model, ema_model=ema)
    saved = torch.load(LEGACY / "lora_checkpoint.pth", weights_only=True)["state_dicts"]["ema_model"]
    found = ema.averaged_model.lora_model.state_dict()  # type: ignore[operator, union-attr]
    assert all(torch.equal(found[name], one) for name, one in saved.items())


def test_causal_cross_attention_is_chosen_by_the_caller() -> None:
    model = lora(network(causal_cross_attn=True))
    model.load_full_checkpoint(LEGACY / "lora_full.pth")
    assert close(output(model), FORWARD["output_causal_cross_attention"])


@pytest.mark.parametrize("name", WITH_BASE)
def test_a_pushed_file_gives_the_recorded_outputs(registry: Registry, name: str) -> None:
    made = LoraTransformerForDiffusion.from_checkpoint(f"registry://legacy/{Path(name).stem}", registry=registry)
    assert close(output(made), FORWARD["output"])
    model = lora(network(seed=7), seed=8)
    model.load_full_checkpoint(f"registry://legacy/{Path(name).stem}", registry=registry)
    assert close(output(model), FORWARD["output"])


def test_a_pushed_adapter_finds_its_base(registry: Registry) -> None:
    made = LoraTransformerForDiffusion.from_checkpoint("registry://legacy/lora_adapters", registry=registry)
    assert close(output(made), FORWARD["output"])
    assert made.base_reference == "legacy/base@1"
    merged = QKVTransformerForDiffusion.from_checkpoint("registry://legacy/merged", registry=registry)
    assert close(output(merged), FORWARD["output"])


def test_a_workspace_is_made_of_each_checkpoint_of_a_run(tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning) as caught:
        base = DiffusionPolicyWorkspace.create_from_checkpoint(
            LEGACY / "workspace.ckpt", exclude_keys=["optimizer"], output_dir=tmp_path
        )
    said = [str(one.message) for one in caught]
    assert any("has no policy.noise_scheduler; it is taken as the default" in one for one in said)
    assert any("holds no moving average; it begins with the weights" in one for one in said)
    assert (base.global_step, base.epoch, base.cfg.training.seed) == (1000, 10, 1)
    assert not base.is_lora_model()
    with pytest.warns(CheckpointWarning):
        made = DiffusionPolicyWorkspace.create_from_checkpoint(
            LEGACY / "lora_checkpoint_later.pth", output_dir=tmp_path, exclude_keys=["scheduler"]
        )
    assert made.is_lora_model()
    assert close(output(made.model.eval()), FORWARD["output"])


def test_a_payload_without_a_configuration_still_makes_a_workspace(tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning) as caught:
        made = DiffusionPolicyWorkspace.create_from_checkpoint(LEGACY / "lora_checkpoint.pth", output_dir=tmp_path)
    assert close(output(made.model.eval()), FORWARD["output"])
    assert made.optimizer.param_groups[0]["lr"] == 0.00993844170297569
    said = [str(one.message) for one in caught]
    assert any("has no configuration; training goes by the defaults" in one for one in said)
    assert any("the learning-rate schedule begins anew" in one for one in said)


def test_an_optimizer_of_other_parameters_is_refused_and_can_be_left_out(tmp_path: Path) -> None:
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(Incompatible, match=r"the optimizer of .*workspace.ckpt is of other parameters"),
    ):
        DiffusionPolicyWorkspace.create_from_checkpoint(LEGACY / "workspace.ckpt", output_dir=tmp_path)
