"""The guide's utility functions: checkpoints in training, merging, comparing, describing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from pdp.ema import EMAModel
from pdp.errors import CheckpointWarning, ConfigError
from pdp.lora_model import LoraTransformerForDiffusion
from pdp.modules_v2 import QKVTransformerForDiffusion
from pdp.utils.lora_utils import (
    compare_lora_configs,
    create_lora_model_from_checkpoint,
    get_lora_model_info,
    load_lora_checkpoint,
    lora_config_differences,
    merge_lora_weights,
    print_lora_model_summary,
    save_lora_checkpoint,
    save_merged_model,
)
from registry.core.errors import Incompatible, InvalidInput
from tests.pdp.models import FORWARD, LEGACY, close, lora, network, output, same_tensors

SUFFIXES = [".pth", ".safetensors"]


def trained(model: LoraTransformerForDiffusion) -> tuple[torch.optim.AdamW, CosineAnnealingLR, EMAModel]:
    """Two real steps, so that optimizer, schedule and average have a state."""
    optimizer = torch.optim.AdamW(model.get_optim_groups(0.01), lr=1e-2)
    scheduler = CosineAnnealingLR(optimizer, 10)
    ema = EMAModel(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(FORWARD["sample"], FORWARD["timestep"], FORWARD["cond"]).square().mean().backward()
        optimizer.step()
        scheduler.step()
        ema.step(model)
    return optimizer, scheduler, ema


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_checkpoint_in_training_comes_back_whole(suffix: str, tmp_path: Path) -> None:
    model = lora()
    optimizer, scheduler, ema = trained(model)
    path = save_lora_checkpoint(
        model=model,
        path=str(tmp_path / f"checkpoint{suffix}"),
        optimizer=optimizer,
        scheduler=scheduler,
        epoch=10,
        global_step=1000,
        metadata={"description": "Fine-tuned model", "numbers": [1, 2.0, None]},
        ema_model=ema,
    )
    other = lora(network(seed=3), seed=4)
    its_optimizer = torch.optim.AdamW(other.get_optim_groups(0.01), lr=1e-2)
    its_scheduler, its_ema = CosineAnnealingLR(its_optimizer, 10), EMAModel(other)
    payload = load_lora_checkpoint(path, other, its_optimizer, its_scheduler, ema_model=its_ema)
    assert (payload["epoch"], payload["global_step"]) == (10, 1000)
    assert payload["metadata"] == {"description": "Fine-tuned model", "numbers": [1, 2.0, None]}
    assert same_tensors(model, other)
    assert same_tensors(ema.averaged_model, its_ema.averaged_model)
    assert its_scheduler.state_dict() == scheduler.state_dict()
    mine, others = optimizer.state_dict(), its_optimizer.state_dict()
    assert mine["param_groups"] == others["param_groups"]
    for key, state in mine["state"].items():
        assert all(torch.equal(others["state"][key][name], one) for name, one in state.items())


def test_the_optimizer_stays_where_it_is_not_wanted(tmp_path: Path) -> None:
    model = lora()
    optimizer, _, _ = trained(model)
    save_lora_checkpoint(model, tmp_path / "c.pth", optimizer=optimizer)
    other = lora(seed=4)
    fresh = torch.optim.AdamW(other.get_optim_groups(0.01), lr=1e-2)
    load_lora_checkpoint(tmp_path / "c.pth", other, fresh, load_optimizer=False)
    assert not fresh.state_dict()["state"]
    save_lora_checkpoint(model, tmp_path / "bare.pth")
    with pytest.warns(CheckpointWarning, match="holds no optimizer; it stays as it is"):
        load_lora_checkpoint(tmp_path / "bare.pth", other, fresh)


def test_an_optimizer_of_other_parameters_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    model = lora()
    optimizer, _, _ = trained(model)
    save_lora_checkpoint(model, tmp_path / "c.pth", optimizer=optimizer)
    other = lora(seed=4)
    before = copy.deepcopy(other)
    one_group = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(Incompatible, match=r"parameters a group differ \(expected \[36\], found \[36, 0\]\)"):
        load_lora_checkpoint(tmp_path / "c.pth", other, one_group)
    turned = torch.optim.AdamW(
        [{"params": list(reversed([p for p in other.parameters() if p.requires_grad]))}, {"params": []}], lr=1e-2
    )
    with pytest.raises(Incompatible, match="the shapes differ"):
        load_lora_checkpoint(tmp_path / "c.pth", other, turned)
    assert same_tensors(other, before)


def test_loading_does_not_tie_two_optimizers_to_one_memory(tmp_path: Path) -> None:
    model = lora()
    optimizer, _, _ = trained(model)
    save_lora_checkpoint(model, tmp_path / "c.pth", optimizer=optimizer)
    payload = load_lora_checkpoint(tmp_path / "c.pth", model, optimizer)
    saved = payload["state_dicts"]["optimizer"]["state"][0]["exp_avg"].clone()
    model(FORWARD["sample"], FORWARD["timestep"], FORWARD["cond"]).sum().backward()
    optimizer.step()
    assert torch.equal(payload["state_dicts"]["optimizer"]["state"][0]["exp_avg"], saved)


def test_metadata_that_is_no_plain_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\['metadata'\]\['model'\]: a QKVTransformerForDiffusion is neither"):
        save_lora_checkpoint(lora(), tmp_path / "c.pth", metadata={"model": network()})
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="QKVTransformerForDiffusion is no LoRA model"):
        save_lora_checkpoint(network(), tmp_path / "c.pth")
    with pytest.raises(InvalidInput, match="is no LoRA model"):
        merge_lora_weights(network())


def test_a_lora_model_is_made_of_a_checkpoint_on_a_live_base_or_one_that_is_named(tmp_path: Path) -> None:
    base = network()
    model = lora(copy.deepcopy(base))
    model.save_lora_adapters(tmp_path / "a.pth")
    torch.save({"state_dict": base.state_dict(), "model_type": "merged_lora"}, tmp_path / "base.pth")
    by_path = create_lora_model_from_checkpoint(tmp_path / "a.pth", tmp_path / "base.pth")
    on_live = create_lora_model_from_checkpoint(tmp_path / "a.pth", base_model=base)
    assert torch.equal(output(by_path), output(model))
    assert torch.equal(output(on_live), output(model))
    with pytest.raises(InvalidInput, match="both given"):
        create_lora_model_from_checkpoint(tmp_path / "a.pth", tmp_path / "base.pth", base_model=network())
    with pytest.raises(Incompatible, match="n_head"):
        create_lora_model_from_checkpoint(tmp_path / "a.pth", base_model=network(n_head=2))


# ---------------------------------------------------------------- merging


def test_merging_gives_a_plain_network_with_the_loras_function_and_leaves_its_input() -> None:
    base = network()
    base_output = output(base)
    model = lora(base)
    before, function = copy.deepcopy(model), output(model)
    merged = merge_lora_weights(model, alpha=1.0)
    assert type(merged) is QKVTransformerForDiffusion
    assert merged.state_dict().keys() == network().state_dict().keys()
    assert close(output(merged), function)
    assert not close(function, base_output)
    assert same_tensors(model, before)
    assert torch.equal(output(model), function)
    assert all(one.requires_grad for one in merged.parameters())
    shared = {one.data_ptr() for one in model.state_dict().values()}
    assert not shared & {one.data_ptr() for one in merged.state_dict().values()}


def test_alpha_moves_from_the_base_to_the_lora_in_a_straight_line() -> None:
    base = network()
    plain, weights = output(base), copy.deepcopy(base.state_dict())
    model = lora(base)
    assert torch.equal(output(merge_lora_weights(model, alpha=0.0)), plain)
    whole = merge_lora_weights(lora_model=model).state_dict()
    for alpha in (0.25, 0.5, 2.0, -1.0):
        found = merge_lora_weights(model, alpha).state_dict()
        for name, weight in weights.items():
            expected = weight.double() + alpha * (whole[name].double() - weight.double())
            assert torch.allclose(found[name].double(), expected, atol=1e-7, rtol=0), name


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 32}},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "use_dora": True},
    ],
    ids=str,
)
def test_variants_are_merged_as_they_compute(options: dict[str, Any]) -> None:
    model = lora(**options)
    before = copy.deepcopy(model)
    assert close(output(merge_lora_weights(model)), output(model), at_most=2e-6)
    without = output(merge_lora_weights(model, alpha=0))
    with model.lora_model.disable_adapter():
        assert torch.equal(without, output(model))
    assert same_tensors(model, before)


@pytest.mark.parametrize("alpha", [1.0, 0.3, -2.0])
def test_a_network_in_bf16_is_rounded_once(alpha: float) -> None:
    model = lora(network().bfloat16())
    merged = merge_lora_weights(model, alpha)
    for path in model.get_targeted_modules():
        layer: Any = model.base_model.get_submodule(path)
        down, up = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
        exact = layer.get_base_layer().weight.double() + alpha * layer.scaling["default"] * (up @ down)
        found = merged.get_submodule(path).weight
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, exact.bfloat16())


def test_a_layer_that_is_scaled_otherwise_than_its_configuration_is_merged_as_it_computes() -> None:
    model = lora()
    first: Any = model.base_model.get_submodule(model.get_targeted_modules()[0])
    first.scale_layer(3.0)
    assert close(output(merge_lora_weights(model)), output(model))


def test_of_two_layers_with_one_weight_only_the_one_with_the_lora_is_changed() -> None:
    base = network()
    attention: Any = next(module for module in base.modules() if hasattr(module, "q_proj"))
    attention.k_proj.weight = attention.q_proj.weight
    model = lora(base, target_modules=["q_proj"])
    assert close(output(merge_lora_weights(model)), output(model))


def test_a_lora_that_is_not_finite_or_has_no_place_is_named_with_its_layer() -> None:
    model = lora()
    path = model.get_targeted_modules()[1]
    layer: Any = model.base_model.get_submodule(path)
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(InvalidInput, match=f"{path}: a factor holds NaN or Inf"):
        merge_lora_weights(model)
    biased = lora(lora_bias=True)
    layer = biased.base_model.get_submodule(path)
    layer.get_base_layer().bias = None
    with pytest.raises(InvalidInput, match=f"{path}: the adapter has a bias"):
        merge_lora_weights(biased)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "1", True])
def test_an_alpha_that_is_no_finite_number_is_named(alpha: Any) -> None:
    with pytest.raises(InvalidInput, match="alpha is"):
        merge_lora_weights(lora(), alpha)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_merged_model_is_saved_without_a_trace_of_the_lora(suffix: str, tmp_path: Path) -> None:
    model = lora()
    merged = merge_lora_weights(model)
    save_merged_model(merged, str(tmp_path / f"m{suffix}"))
    made = QKVTransformerForDiffusion.from_checkpoint(tmp_path / f"m{suffix}")
    assert torch.equal(output(made), output(merged))
    with pytest.raises(InvalidInput, match="still carries a LoRA"):
        save_merged_model(model, tmp_path / "x.pth")
    with pytest.raises(InvalidInput, match="belong to a push"):
        save_merged_model(merged, tmp_path / "x.pth", tags=["prod"])
    if suffix == ".pth":
        saved = torch.load(tmp_path / "m.pth", weights_only=True)
        assert (saved["model_type"], saved["model_state_dict"].keys()) == ("merged_lora", merged.state_dict().keys())


# ---------------------------------------------------------------- comparing and describing


def config(**changed: Any) -> dict[str, Any]:
    settings = {
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "mlp"],
        "apply_to": "both",
    }
    return settings | changed


def test_configurations_are_compared_by_what_they_resolve_to() -> None:
    assert compare_lora_configs(config(), config(target_modules={"fc1", "fc2", "q_proj"}))
    assert compare_lora_configs(config(), config(target_modules=["mlp", "attn.q_proj", "q_proj"]))
    assert compare_lora_configs(config(lora_alpha=16.0), config())
    assert not compare_lora_configs(config(), config(target_modules=["q_proj", "fc1"]))
    assert not compare_lora_configs(config(), config(apply_to="encoder"))
    assert not compare_lora_configs(config(target_modules=["linear1"]), config(target_modules=["linear2"]))
    assert compare_lora_configs(config(target_modules=["linear1"]), config(target_modules={"linear1"}))
    assert not compare_lora_configs(config(), config(lora_options={"use_rslora": True}))
    assert compare_lora_configs(config(), config(lora_options={"use_rslora": False}))


@pytest.mark.parametrize("key", ["lora_r", "lora_alpha"])
def test_numbers_that_differ_are_named(key: str) -> None:
    assert lora_config_differences(config(), config(**{key: 4})) == [f"{key}: {config()[key]} and 4"]


def test_a_saved_configuration_of_whole_paths_equals_the_targets_it_came_from() -> None:
    saved = torch.load(LEGACY / "lora_adapters.pth", weights_only=True)
    short = config(lora_r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "out_proj"])
    own = {key: saved[key] for key in short}
    assert compare_lora_configs(own, short)
    assert compare_lora_configs(own, lora().lora_model.peft_config["default"], model=lora())


def test_pefts_own_configuration_is_read_by_pefts_own_rule() -> None:
    """It keeps short endings of names: attn.q_proj, which is a part of self_attn.q_proj as well, but not its end."""
    peft_config = lora(network(n_encoder_layers=12, n_decoder_layers=12), apply_to="encoder").lora_model.peft_config
    assert {name for name in peft_config["default"].target_modules if "blocks" not in name}
    short = config(lora_r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "out_proj"])
    assert compare_lora_configs(peft_config["default"], short | {"apply_to": "encoder"})
    assert not compare_lora_configs(peft_config["default"], short)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (None, "found a NoneType"),
        ({"lora_r": 8}, "lora_alpha, target_modules missing"),
        (config() | {"lora_aplha": 1}, "did you mean lora_alpha"),
    ],
)
def test_what_is_no_configuration_is_named(given: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        compare_lora_configs(given, config())


def test_a_model_is_described_in_numbers_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    model = lora()
    info = get_lora_model_info(model)
    assert (info["lora_parameters"], info["trainable_parameters"]) == (4608, 4608)
    assert info["total_parameters"] == sum(one.numel() for one in model.parameters())
    assert info["trainable_fraction"] == pytest.approx(4608 / info["total_parameters"])
    assert (info["base_model"], info["device"], info["dtype"]) == ("QKVTransformerForDiffusion", "cpu", "float32")
    assert len(info["targeted_modules"]) == 18
    print_lora_model_summary(model)
    assert "rank 4, alpha 8" in capsys.readouterr().out
