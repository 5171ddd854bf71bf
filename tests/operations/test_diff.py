"""What `diff` says of real adapters and checkpoints, against dense matrices that PEFT or torch computed."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from registry import Registry
from registry.catalog.contents import StoredComponent
from registry.core.errors import BlobNotFound, DigestMismatch, TagNotFound
from registry.core.layout import Layout
from registry.operations import diff_weights
from registry.operations.diff_components import compare
from registry.operations.difference import ComponentDifference, Difference, Norms
from tests.merge.test_lora_modules import layers
from tests.operations.models import lora, train, walker, zoo


def only(difference: Difference) -> ComponentDifference:
    (component,) = difference.components
    return component


def dense(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    return {path: layer.get_delta_weight(adapter).detach().double() for path, layer in layers(model).items()}


def assert_norms(norms: Norms | None, a: Tensor, b: Tensor) -> None:
    assert norms is not None
    expected = (float(a.norm()), float(b.norm()), float((a - b).norm()))
    assert (norms.a, norms.b, norms.distance) == pytest.approx(expected, rel=1e-5)
    assert norms.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({}, {}),
        ({}, {"r": 8}),
        ({"r": 2, "lora_alpha": 3}, {"r": 16, "lora_alpha": 16, "use_rslora": True}),
        ({"rank_pattern": {"q_proj": 3}}, {"alpha_pattern": {"v_.*": 5}}),
    ],
    ids=["one form", "ranks", "ranks and scaling", "patterns"],
)
def test_modules_are_as_far_apart_as_what_peft_adds_to_them(
    a: dict[str, Any], b: dict[str, Any], registry: Registry
) -> None:
    one, two = lora(seed=1, **a), lora(seed=2, adapter="other", **b)
    registry.push(one, "walk/one")
    registry.push(two, "walk/two")
    found = registry.diff("walk/one", "walk/two")
    assert not found.same_content
    component = only(found)
    ours, theirs = dense(one), dense(two, "other")
    assert {module.module for module in component.modules} == {"q_proj", "v_proj"}
    for module in component.modules:
        assert (module.change, module.note) == ("changed", "")
        assert_norms(module.norms, ours[module.module], theirs[module.module])
    relative = [module.relative or 0 for module in component.modules]
    assert relative == sorted(relative, reverse=True)
    assert {tensor.module for tensor in component.tensors} == {"q_proj", "v_proj"}
    assert not any(tensor.norms for tensor in component.tensors)


def test_layers_of_every_kind_are_compared(registry: Registry) -> None:
    options: dict[str, Any] = {
        "target_modules": ["emb", "lin", "conv1", "conv2", "conv3", "mha"],
        "target_parameters": ["experts.down_proj"],
    }
    models = []
    for seed, r in ((1, 4), (2, 6)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models.append(get_peft_model(zoo(), LoraConfig(r=r, lora_alpha=6, **options)))
        train(models[-1], seed)
        registry.push(models[-1], "walk/zoo")
    found = only(registry.diff("walk/zoo@1", "walk/zoo@2"))
    ours, theirs = map(dense, models)
    assert {module.module for module in found.modules} == ours.keys()
    assert len(ours) == 8
    for module in found.modules:
        assert_norms(module.norms, ours[module.module], theirs[module.module])


def test_one_adapter_in_another_form_has_no_tensor_that_differs(registry: Registry, tmp_path: Path) -> None:
    registry.push(lora(adapter="best"), "walk/live", metadata={"robot": "a1"})
    lora().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "adapter_config.json"
    document = json.loads(path.read_bytes())
    document["target_modules"] = ".*_proj"
    path.write_text(json.dumps(document))
    registry.push(tmp_path / "saved", "walk/saved")
    state = {f"module.{name}": tensor for name, tensor in registry.load("walk/saved").items()}
    save_file({f"_orig_mod.{name}": one for name, one in state.items()}, tmp_path / "saved/adapter_model.safetensors")
    registry.push(tmp_path / "saved", "walk/wrapped")
    for other in ("walk/saved", "walk/wrapped"):
        found = registry.diff("walk/live", other)
        assert found.same_content
        component = only(found)
        assert (component.change, component.tensors, component.modules) == (None, (), ())
        assert (component.same, component.same_modules) == (4, 2)
        assert [(one.key, one.change) for one in found.config] == [("target_modules", "changed")]
        assert [(one.key, one.a, one.b) for one in found.metadata] == [("robot", "a1", None)]
    assert "adapter_model.safetensors" in {file.path for file in registry.diff("walk/live", "walk/wrapped").files}


def test_a_changed_alpha_changes_modules_and_no_tensor(registry: Registry) -> None:
    for alpha in (8, 12):
        registry.push(lora(lora_alpha=alpha), "walk/perturb")
    found = registry.diff("walk/perturb@1", "walk/perturb@2")
    assert not found.same_content
    assert [(one.key, one.a, one.b) for one in found.config] == [("lora_alpha", 8, 12)]
    component = only(found)
    assert (component.change, component.tensors) == ("changed", ())
    for module in component.modules:
        assert module.a is not None
        assert module.b is not None
        assert (module.a.scaling, module.b.scaling) == (2, 3)
        assert module.norms is not None
        assert module.norms.cosine == pytest.approx(1)
        assert module.relative == pytest.approx(1 / 3)


def test_an_adapter_that_leaves_a_module_alone_adds_zero_to_it(registry: Registry) -> None:
    both, one = lora(), lora(target_modules=["q_proj"])
    registry.push(both, "walk/both")
    registry.push(one, "walk/one")
    component = only(registry.diff("walk/both", "walk/one"))
    module = next(module for module in component.modules if module.module == "v_proj")
    size = float(dense(both)["v_proj"].norm())
    assert (module.change, module.b, module.relative) == ("removed", None, 1)
    assert module.norms == Norms(pytest.approx(size), 0, pytest.approx(size), None)
    back = only(registry.diff("walk/one", "walk/both"))
    assert {tensor.change for tensor in back.tensors if tensor.module == "v_proj"} == {"added"}


def test_a_module_that_one_adapter_replaces_is_not_taken_for_zero(registry: Registry) -> None:
    registry.push(lora(), "walk/factors")
    registry.push(lora(target_modules=["q_proj"], modules_to_save=["v_proj"]), "walk/copy")
    module = next(one for one in only(registry.diff("walk/factors", "walk/copy")).modules if one.module == "v_proj")
    assert (module.change, module.norms) == ("removed", None)
    assert module.note == "the other adapter changes it too, and not by a pair of factors"


def test_two_parameters_of_one_module_are_two_modules(registry: Registry) -> None:
    for name in ("up_proj", "down_proj"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(zoo(), LoraConfig(target_modules=[], target_parameters=[f"experts.{name}"]))
        train(model)
        registry.push(model, "walk/experts")
    found = {one.module: one for one in only(registry.diff("walk/experts@1", "walk/experts@2")).modules}
    assert {path: one.change for path, one in found.items()} == {
        "experts.up_proj": "removed",
        "experts.down_proj": "added",
    }
    assert all(one.norms is not None for one in found.values())


def test_adapters_that_were_never_trained_have_no_angle(registry: Registry) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        registry.push(get_peft_model(walker(), LoraConfig(target_modules=["q_proj"])), "walk/fresh")
    torch.manual_seed(5)
    registry.push(
        get_peft_model(walker(), LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian")), "walk/g"
    )
    (module,) = only(registry.diff("walk/fresh", "walk/g")).modules
    assert module.norms == Norms(0, 0, 0, None)
    assert module.relative is None


def test_an_ulp_in_one_factor_is_measured(registry: Registry) -> None:
    model = lora()
    registry.push(model, "walk/perturb")
    layer = model.base_model.model.q_proj
    assert isinstance(layer, LoraLayer)
    before = layer.lora_B["default"].weight.detach().double().clone()
    with torch.no_grad():
        layer.lora_B["default"].weight[3, 1] = torch.nextafter(before[3, 1].float(), torch.tensor(9.0))
    step = layer.lora_B["default"].weight.detach().double() - before
    expected = float((2 * step @ layer.lora_A["default"].weight.detach().double()).norm())
    registry.push(model, "walk/perturb")
    (module,) = only(registry.diff("walk/perturb@1", "walk/perturb@2")).modules
    assert module.norms is not None
    assert module.norms.distance == pytest.approx(expected, rel=1e-9)
    assert only(registry.diff("walk/perturb@1", "walk/perturb@2")).same_modules == 1


def test_dora_says_that_it_is_no_product_and_its_tensors_are_compared(registry: Registry) -> None:
    for seed in (1, 2):
        registry.push(lora(seed=seed, use_dora=True), "walk/dora")
    component = only(registry.diff("walk/dora@1", "walk/dora@2"))
    assert {module.norms for module in component.modules} == {None}
    assert {module.note for module in component.modules} == {"DoRA scales the whole weight by a magnitude"}
    assert all(tensor.norms is not None and not tensor.module for tensor in component.tensors)
    assert len(component.tensors) == 6


def test_copies_and_biases_are_compared_as_tensors(registry: Registry) -> None:
    models = [lora(seed=seed, modules_to_save=["head"], bias="lora_only") for seed in (1, 2)]
    for model in models:
        registry.push(model, "walk/perturb")
    component = only(registry.diff("walk/perturb@1", "walk/perturb@2"))
    norms = {tensor.name: tensor.norms for tensor in component.tensors if not tensor.module}
    assert norms.keys() == {"head.weight", "head.bias", "q_proj.base_layer.bias", "v_proj.base_layer.bias"}
    one, two = (model.base_model.model.head.modules_to_save["default"].weight.detach().double() for model in models)
    assert_norms(norms["head.weight"], one, two)
    assert len(component.modules) == 2


def test_an_unknown_alpha_is_said_and_the_tensors_are_compared(registry: Registry) -> None:
    registry.push(lora(seed=1), "walk/whole")
    registry.push(registry.load("walk/whole"), "walk/bare")
    registry.push(lora(seed=2), "walk/other")
    found = registry.diff("walk/bare", "walk/other")
    assert found.notes == ("walk/bare@1 has no configuration, so configurations and modules cannot be compared",)
    assert {module.note for module in only(found).modules} == {
        "lora_alpha is unknown: the adapter came without a configuration"
    }
    assert all(tensor.norms is not None for tensor in only(found).tensors)
    bare = only(registry.diff("walk/bare", "walk/whole"))
    assert bare.tensors == ()
    assert {module.relative for module in bare.modules} == {None}


def test_of_another_tuner_tensors_alone_are_compared(registry: Registry) -> None:
    from peft import IA3Config

    registry.push(lora(), "walk/lora")
    for seed in (1, 2):
        model = get_peft_model(walker(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
        train(model, seed)
        registry.push(model, "walk/ia3")
    found = registry.diff("walk/lora", "walk/ia3")
    assert only(found).modules == ()
    assert found.notes == ("walk/ia3@2 is of the tuner IA3, whose change to a weight is not known: tensors alone",)
    (tensor,) = only(registry.diff("walk/ia3@1", "walk/ia3@2")).tensors
    assert tensor.norms is not None


def test_modules_of_other_sizes_are_not_measured(registry: Registry) -> None:
    for out in (16, 12):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, out))
        registry.push(lora(model, target_modules=["0"]), "walk/sizes")
    (module,) = only(registry.diff("walk/sizes@1", "walk/sizes@2")).modules
    assert (module.norms, module.note) == (None, "the modules differ: linear 12 x 16 and linear 16 x 16")


def test_weights_with_nan_come_first_and_stay_nan(registry: Registry) -> None:
    model = lora()
    registry.push(model, "walk/nan")
    train(model, seed=3)
    with torch.no_grad():
        model.base_model.model.v_proj.lora_A["default"].weight[0, 0] = math.nan
    registry.push(model, "walk/nan")
    first, second = only(registry.diff("walk/nan@1", "walk/nan@2")).modules
    assert first.module == "v_proj"
    assert math.isnan(first.relative or 0)
    assert second.norms is not None
    assert second.norms.distance > 0


# ---------------------------------------------------------------- other state dicts


def test_tensors_of_every_dtype_are_compared_as_fits_them(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff_weights, "CHUNK_ELEMENTS", 7)  # several chunks, the last one short
    monkeypatch.setattr(diff_weights, "BATCH_BYTES", 300)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(5, 9, generator=generator)
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
    one: dict[str, Tensor] = {str(dtype): base.to(dtype) for dtype in floats}
    two: dict[str, Tensor] = {str(dtype): (base + 0.5 * base.flip(0)).to(dtype) for dtype in floats}
    one |= {"cast": base, "scalar": torch.tensor(2.0), "complex": torch.complex(base, -base)}
    two |= {"cast": base.bfloat16(), "scalar": torch.tensor(3.0), "complex": torch.complex(base, base)}
    whole = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64)
    for dtype in (*whole, torch.bool):
        values = torch.arange(45).reshape(5, 9) % 2
        one[str(dtype)] = values.to(dtype)
        two[str(dtype)] = values.index_fill(0, torch.tensor([0, 4]), 1).to(dtype)
    one |= {"shape": base, "kind": base, "packed": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    two |= {
        "shape": base.T,
        "kind": base.long(),
        "packed": torch.ones(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }
    registry.push(one | {"gone": base, "same": base}, "walk/run")
    registry.push(two | {"new": base, "same": base}, "walk/run")

    found = only(registry.diff("walk/run@1", "walk/run@2"))
    tensors = {tensor.name: tensor for tensor in found.tensors}
    assert (found.same, found.count_a, found.count_b) == (1, len(one) + 2, len(two) + 2)
    assert tensors.keys() == {*one, "gone", "new"}
    for name in (*map(str, floats), "cast", "scalar"):
        assert_norms(tensors[name].norms, one[name].double(), two[name].double())
    assert_norms(tensors["complex"].norms, torch.cat((base, -base)).double(), torch.cat((base, base)).double())
    for dtype in (*whole, torch.bool):
        assert tensors[str(dtype)].elements == int((one[str(dtype)] != two[str(dtype)]).sum())
        assert tensors[str(dtype)].relative == pytest.approx(10 / 45)
    notes = {"shape": "the shapes differ", "kind": "the dtypes differ", "packed": "torch does not compute with F4"}
    assert {name: tensor.note for name, tensor in tensors.items() if tensor.note} == notes
    assert (tensors["gone"].change, tensors["new"].change) == ("removed", "added")
    measured = [tensor.relative for tensor in found.tensors if tensor.relative is not None]
    assert measured == sorted(measured, reverse=True)


def test_a_wrapped_model_has_the_tensors_of_the_plain_one(registry: Registry) -> None:
    registry.push(walker(), "walk/plain")
    registry.push({f"module._orig_mod.{name}": one for name, one in walker().state_dict().items()}, "walk/wrapped")
    found = registry.diff("walk/plain", "walk/wrapped")
    assert found.same_content
    assert only(found).change is None


def test_two_adapters_in_one_model_are_kept_apart(registry: Registry) -> None:
    models = []
    for seed in (1, 2):
        model = lora(adapter="x")
        model.add_adapter("y", LoraConfig(target_modules=["q_proj"]))
        with torch.no_grad():
            model.base_model.model.q_proj.lora_B["y"].weight.fill_(seed)
        registry.push(model, "walk/both", kind="checkpoint")
        models.append(model)
    (tensor,) = only(registry.diff("walk/both@1", "walk/both@2")).tensors
    assert tensor.name == "base_model.model.q_proj.lora_B.y.weight"


def test_an_adapter_and_a_base_have_nothing_in_common(registry: Registry) -> None:
    registry.push(lora(), "walk/perturb")
    registry.push(walker(), "walk/base")
    found = registry.diff("walk/perturb", "walk/base")
    assert not found.same_content
    assert found.notes == (
        "walk/perturb@1 is of kind adapter (adapter) and walk/base@1 is of kind base (model): "
        "they have no component in common, so no tensors are compared",
    )
    assert [(one.role, one.change, one.tensors) for one in found.components] == [
        ("adapter", "removed", ()),
        ("model", "added", ()),
    ]
    assert ("kind", "adapter", "base") in {(one.key, one.a, one.b) for one in found.facts}


def test_a_component_may_be_empty() -> None:
    empty = StoredComponent("scheduler", Layout(()), (), ())
    difference, modules = compare(empty, empty, None, None)
    assert difference == ComponentDifference("scheduler", None, 0, 0, 0)
    assert modules == {}


# ---------------------------------------------------------------- without weights, and damage


def test_without_weights_only_the_catalog_and_the_configurations_are_read(registry: Registry, root: Path) -> None:
    for seed in (1, 2):
        registry.push(lora(seed=seed), "walk/perturb")
    contents = [registry.show(f"walk/perturb@{number}").contents for number in (1, 2)]
    for file in (file for one in contents for file in one.files if file.role):
        (root / "blobs" / "sha256" / file.blob[:2] / file.blob).unlink()
    found = registry.diff("walk/perturb@1", "walk/perturb@2", weights=False)
    assert not found.weights
    assert [(module.module, module.norms) for module in only(found).modules] == [("q_proj", None), ("v_proj", None)]
    assert only(registry.diff("walk/perturb@1", "walk/perturb@1")).change is None
    with pytest.raises(BlobNotFound):
        registry.diff("walk/perturb@1", "walk/perturb@2")


def test_damaged_weights_are_not_compared(registry: Registry, root: Path) -> None:
    for seed in (1, 2):
        registry.push(lora(seed=seed), "walk/perturb")
    (file,) = [file for file in registry.show("walk/perturb@2").contents.files if file.role]
    path = root / "blobs" / "sha256" / file.blob[:2] / file.blob
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(DigestMismatch):
        registry.diff("walk/perturb@1", "walk/perturb@2")


def test_references_of_any_form_name_the_two(registry: Registry) -> None:
    registry.push(lora(seed=1), "walk/perturb:prod")
    digest = registry.push(lora(seed=2), "walk/perturb").digest
    found = registry.diff("registry://walk/perturb:prod", f"walk/perturb@sha256:{digest[:12]}")
    assert (found.a.reference, found.b.reference) == ("walk/perturb@1", "walk/perturb@2")
    with pytest.raises(TagNotFound):
        registry.diff("walk/perturb:prod", "walk/perturb:stage")


# ---------------------------------------------------------------- what is no tensor, what is not there


def test_what_a_checkpoint_holds_beside_tensors_is_compared_by_its_path(registry: Registry, tmp_path: Path) -> None:
    model = {"w": torch.ones(3)}
    for step, rate in ((1, 1e-3), (2, 1.0)):
        groups = [{"lr": rate, "betas": (0.9, 0.99), "name": "all"}]
        payload = {
            "model": model,
            "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": groups},
            "epoch": step,
        }
        torch.save(payload, tmp_path / "run.ckpt")
        registry.push(tmp_path / "run.ckpt", "walk/run")
    found = registry.diff("walk/run@1", "walk/run@2")
    values = {one.role: [(value.key, value.a, value.b) for value in one.values] for one in found.components}
    assert values == {
        "model": [],
        "optimizer": [("param_groups.0.lr", 1e-3, 1.0)],
        "training": [("epoch", 1, 2)],
    }
    assert found.same_content
    assert registry.diff("walk/run@1", "walk/run@1").components[1].values == ()


def test_an_external_version_is_compared_by_digests(registry: Registry, tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        save_file({"w": torch.full((3,), value), "v": torch.ones(2)}, tmp_path / f"{name}.safetensors")
        registry.push(tmp_path / f"{name}.safetensors", f"walk/{name}", external=name == "one")
    found = registry.diff("walk/one", "walk/two")
    (component,) = found.components
    assert [(one.name, one.change, one.norms) for one in component.tensors] == [("w", "changed", None)]
    assert any("walk/one@1 is recorded without its bytes" in note for note in found.notes)
