"""`registry://` URLs as paths: pushed, checked, loaded, and built from what the registry recorded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pdp.errors import CheckpointError, CheckpointWarning
from pdp.lora_model import LoraTransformerForDiffusion
from pdp.modules_v2 import QKVTransformerForDiffusion
from pdp.utils.lora_utils import load_lora_checkpoint, merge_lora_weights, save_lora_checkpoint, save_merged_model
from registry import Registry
from registry.core.errors import Incompatible, InvalidInput, InvalidReference, NotFound, TagNotFound
from tests.pdp.models import SIZES, close, lora, network, output, same_tensors


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The one that URLs are looked up in when nobody names another."""
    monkeypatch.chdir(tmp_path)
    with Registry.init() as made:
        made.push(network(), "walk/base:v1")
        yield made


def test_saving_to_a_url_pushes_and_a_tag_in_it_is_moved(registry: Registry) -> None:
    model = lora()
    assert model.save_lora_adapters("registry://walk/perturb", base="walk/base:v1") == "registry://walk/perturb@1"
    assert model.save_lora_adapters("registry://walk/perturb:prod", base="walk/base:v1") == "registry://walk/perturb@1"
    version = registry.get("walk/perturb:prod")
    assert (version.kind, version.r, version.lora_alpha, version.base) == ("adapter", 4, 8.0, "walk/base@1")
    later = lora(seed=9)
    later.save_lora_adapters(
        "registry://walk/perturb:prod", base="walk/base:v1", continued_from="walk/perturb@1", metrics={"reward": 9.0}
    )
    assert registry.resolve("walk/perturb:prod") == "walk/perturb@2"
    assert registry.get("walk/perturb@2").metrics == {"reward": 9.0}


def test_one_adapter_is_one_content_from_live_pth_and_safetensors(registry: Registry, tmp_path: Path) -> None:
    model = lora(use_rslora=True)
    model.save_lora_adapters("registry://walk/live")
    model.save_lora_adapters(tmp_path / "a.pth")
    model.save_lora_adapters(tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        registry.push(tmp_path / name, f"walk/{name}")
    digests = {registry.get(name).content_digest for name in ("walk/live", "walk/a.pth", "walk/a.safetensors")}
    assert len(digests) == 1


def test_an_adapter_is_checked_and_loaded(registry: Registry) -> None:
    model, other = lora(), lora(seed=2)
    model.save_lora_adapters("registry://walk/perturb:prod")
    other.load_lora_adapters("registry://walk/perturb:prod")
    assert same_tensors(model, other)
    before = copy.deepcopy(other)
    for settings, subject in (
        ({"lora_alpha": 16}, "C10"),
        ({"lora_r": 2}, "C08"),
        ({"target_modules": ["fc1"]}, "C05"),
    ):
        lora(**settings).save_lora_adapters("registry://walk/other")
        with pytest.raises(Incompatible, match=subject):
            other.load_lora_adapters("registry://walk/other")
    assert same_tensors(other, before)


def test_model_and_adapter_are_made_in_one_step_from_what_was_recorded(registry: Registry) -> None:
    base = network(n_head=2, causal_cross_attn=True)
    registry.push(base, "walk/other-base")
    model = lora(base)
    model.save_lora_adapters("registry://walk/perturb:prod", base="walk/other-base")
    made = LoraTransformerForDiffusion.from_checkpoint("registry://walk/perturb:prod")
    assert made.base_model.constructor_arguments == base.constructor_arguments
    assert torch.equal(output(made), output(model))
    assert made.base_reference == "walk/other-base@1"
    assert made.save_lora_adapters("registry://walk/perturb") == "registry://walk/perturb@1"
    assert registry.prove("walk/perturb:prod", made.lora_model)


def test_an_adapter_of_another_network_is_refused_whichever_way_it_comes(registry: Registry, tmp_path: Path) -> None:
    model = lora(network(n_head=2))
    model.save_lora_adapters("registry://walk/perturb")
    model.save_lora_adapters(tmp_path / "a.pth")
    torch.save({"model_state_dict": network().state_dict()}, tmp_path / "says-nothing.pth")
    merged = save_merged_model(network(), tmp_path / "base.pth")
    other = lora(seed=3)
    before = copy.deepcopy(other)
    for adapter in ("registry://walk/perturb", tmp_path / "a.pth"):
        for strict in (None, False):
            with pytest.raises(Incompatible, match="n_head"):
                other.load_lora_adapters(adapter, strict=strict)
        for base in ("registry://walk/base:v1", merged):
            with pytest.raises(Incompatible, match="n_head"):
                LoraTransformerForDiffusion.from_checkpoint(adapter, base)
        made = LoraTransformerForDiffusion.from_checkpoint(adapter, tmp_path / "says-nothing.pth")
        assert made.base_model.n_head == 2
    assert same_tensors(other, before)


def test_a_lenient_load_of_a_version_says_what_it_lets_pass_in_the_guides_words(registry: Registry) -> None:
    lora(lora_alpha=16, target_modules=["q_proj", "fc1"]).save_lora_adapters("registry://walk/perturb")
    with pytest.warns(CheckpointWarning) as caught:
        lora(seed=2).load_lora_adapters("registry://walk/perturb", strict=False)
    said = [str(one.message) for one in caught]
    assert any("LoRA configuration mismatch!" in one and "lora_alpha: 16 and 8" in one for one in said)
    assert any(one.startswith("Unexpected keys: [") for one in said)


def test_pefts_own_folders_and_files_are_loaded(registry: Registry, tmp_path: Path) -> None:
    model = lora()
    model.save_lora_adapters("registry://walk/perturb")
    registry.pull("walk/perturb", tmp_path / "pulled", format="peft")
    model.lora_model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "pulled", tmp_path / "saved" / "adapter_model.safetensors"):
        other = lora(seed=2)
        other.load_lora_adapters(path, strict=True)
        assert same_tensors(model, other)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    other = lora(seed=2)
    with pytest.warns(CheckpointWarning, match="lora_alpha: unknown and 8"):
        other.load_full_checkpoint(tmp_path / "bare.pth")
    assert same_tensors(model, other)
    with pytest.raises(CheckpointError, match=r"is a folder without adapter_model\.safetensors"):
        other.load_lora_adapters(tmp_path)


def test_a_payload_from_a_registry_has_the_form_of_a_files(registry: Registry, tmp_path: Path) -> None:
    model = lora()
    save_lora_checkpoint(model, "registry://walk/run", epoch=2, global_step=20, metadata={"why": "test"})
    save_lora_checkpoint(model, tmp_path / "c.pth", epoch=2, global_step=20, metadata={"why": "test"})
    found = [load_lora_checkpoint(path, lora()) for path in ("registry://walk/run", tmp_path / "c.pth")]
    for payload in found:
        assert (payload["epoch"], payload["global_step"], payload["metadata"]) == (2, 20, {"why": "test"})
        assert payload["state_dicts"].keys() == {"model"}
        assert payload["pickles"]["lora_config"]["lora_r"] == 4
        assert payload["pickles"]["model_config"]["arguments"]["n_head"] == 4


def test_an_option_that_no_push_has_is_answered_with_the_near_one(registry: Registry) -> None:
    with pytest.raises(InvalidInput, match="a push has no option tag; did you mean tags"):
        lora().save_lora_adapters("registry://walk/perturb", tag="prod")


def test_registries_that_were_opened_for_a_url_are_closed(registry: Registry, tmp_path: Path) -> None:
    import gc
    import os

    model, other = lora(), lora(seed=2)

    def files_open() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    model.save_lora_adapters("registry://walk/perturb")
    other.load_lora_adapters("registry://walk/perturb")
    before = files_open()
    for _ in range(5):
        model.save_lora_adapters("registry://walk/perturb")
        other.load_lora_adapters("registry://walk/perturb")
    assert files_open() <= before


def test_a_full_checkpoint_needs_no_base_in_the_registry(registry: Registry) -> None:
    model = lora(network(n_head=2))
    assert model.save_full_checkpoint("registry://walk/full") == "registry://walk/full@1"
    assert registry.get("walk/full").kind == "checkpoint"
    made = LoraTransformerForDiffusion.from_checkpoint("registry://walk/full")
    assert torch.equal(output(made), output(model))
    assert made.base_model.n_head == 2
    other = lora(network(seed=5, n_head=2), seed=6)
    other.load_full_checkpoint("registry://walk/full")
    assert same_tensors(other, model)
    with pytest.raises(Incompatible, match="n_head"):
        lora().load_full_checkpoint("registry://walk/full")


def test_a_class_of_the_users_own_is_passed_and_never_imported(registry: Registry) -> None:
    class Mine(QKVTransformerForDiffusion):
        pass

    model = lora(Mine(**SIZES))
    model.save_full_checkpoint("registry://walk/mine")
    with pytest.raises(CheckpointError, match="looked up, never imported"):
        LoraTransformerForDiffusion.from_checkpoint("registry://walk/mine")
    made = LoraTransformerForDiffusion.from_checkpoint("registry://walk/mine", classes=[Mine])
    assert type(made.base_model) is Mine


def test_an_adapter_without_a_declared_base_asks_for_one(registry: Registry) -> None:
    model = lora()
    model.save_lora_adapters("registry://walk/perturb")
    with pytest.raises(CheckpointError, match="as base_model_path"):
        LoraTransformerForDiffusion.from_checkpoint("registry://walk/perturb")
    made = LoraTransformerForDiffusion.from_checkpoint("registry://walk/perturb", "registry://walk/base:v1")
    assert torch.equal(output(made), output(model))
    assert made.base_reference == "walk/base@1"


def test_a_checkpoint_in_training_travels_with_its_optimizer(registry: Registry) -> None:
    model = lora()
    optimizer = torch.optim.AdamW(model.get_optim_groups(0.1), lr=1e-2)
    output_sum = model.train()(torch.randn(2, 2, 3), 1, torch.randn(2, 4, 11)).sum()
    output_sum.backward()
    optimizer.step()
    url = save_lora_checkpoint(
        model, "registry://walk/run", optimizer, epoch=2, global_step=20, metrics={"loss": 0.5}, base="walk/base:v1"
    )
    version = registry.get("walk/run")
    assert (version.metadata, version.metrics, version.base) == (
        {"epoch": 2, "global_step": 20},
        {"loss": 0.5},
        "walk/base@1",
    )
    other = lora(seed=3)
    its = torch.optim.AdamW(other.get_optim_groups(0.1), lr=1e-2)
    payload = load_lora_checkpoint(url, other, its)
    assert (payload["epoch"], payload["global_step"]) == (2, 20)
    assert same_tensors(other, model)
    assert torch.equal(its.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    registry.pull("walk/run", "again.ckpt")
    assert torch.load("again.ckpt", weights_only=True)["epoch"] == 2


def test_a_merged_model_is_pushed_as_a_base(registry: Registry) -> None:
    model = lora()
    merged = merge_lora_weights(model)
    assert save_merged_model(merged, "registry://walk/merged:v1") == "registry://walk/merged@1"
    assert registry.get("walk/merged").metadata == {"model_type": "merged_lora"}
    made = QKVTransformerForDiffusion.from_checkpoint("registry://walk/merged:v1")
    assert close(output(made), output(model))


def test_a_registry_that_is_named_is_used_instead(registry: Registry, tmp_path: Path) -> None:
    with Registry.init(tmp_path / "other") as other:
        model = lora()
        model.save_lora_adapters("registry://walk/elsewhere", registry=other)
        assert other.get("walk/elsewhere").kind == "adapter"
    lora(seed=2).load_lora_adapters("registry://walk/elsewhere", registry=tmp_path / "other")
    with pytest.raises(NotFound):
        lora().load_lora_adapters("registry://walk/elsewhere")


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("registry://walk", InvalidReference),
        ("registry://walk/perturb/more", InvalidReference),
        ("registry://../etc:prod", InvalidReference),
        ("registry://walk/perturb:latest", InvalidReference),
        ("registry://walk/perturb@1", InvalidReference),
        ("registry://", InvalidReference),
    ],
)
def test_a_url_that_cannot_be_pushed_to_is_refused_before_anything_is_made(
    url: str, error: type[Exception], registry: Registry, tmp_path: Path
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    saves: list[Any] = [lora().save_lora_adapters, lora().save_full_checkpoint]
    for save in saves:
        with pytest.raises(error):
            save(url)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert [version.name for version in registry.find()] == ["walk/base"]


def test_what_is_not_there_is_named(registry: Registry) -> None:
    with pytest.raises(NotFound, match="walk/nothing"):
        lora().load_lora_adapters("registry://walk/nothing")
    with pytest.raises(TagNotFound, match="prod"):
        LoraTransformerForDiffusion.from_checkpoint("registry://walk/base:prod")
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        LoraTransformerForDiffusion.from_checkpoint("registry://walk/base:v1")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        lora().load_full_checkpoint("registry://walk/base:v1")
