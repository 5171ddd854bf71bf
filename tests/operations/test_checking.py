"""`Registry.check`, `fits`, `needs` and `swap_groups` on real versions: base identity in its grades, what a push and a
load refuse, and that `fits` and `check` say the same."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from registry import Incompatible, InvalidInput, Registry


class Walker(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.constructor_arguments = {"width": width, "heads": heads, "layers": layers}
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(width, width), "v": nn.Linear(width, 8)}) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = [layer["v"](torch.tanh(layer["q"](self.norm(x)))) for layer in self.layers]
        return torch.stack(out).sum(0)


def walker(seed: int = 0, **sizes: int) -> Walker:
    torch.manual_seed(seed)
    return Walker(**sizes)


def adapted(base: nn.Module, seed: int = 1, **options: Any) -> Any:
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q"], **options}))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def codes(found: Any, severity: str = "error") -> set[str]:
    return {one.code for one in found.findings if one.severity == severity}


@pytest.fixture
def team(registry: Registry) -> Registry:
    registry.push(walker(), "walk/base", probe=False)
    registry.push(adapted(walker()), "walk/perturb", base="walk/base", probe=False)
    return registry


# ---------------------------------------------------------------- base identity


def test_the_recorded_base_fits_and_nothing_is_said(team: Registry) -> None:
    found = team.check("walk/perturb")
    assert (found.verdict, found.findings, found.matched, found.total) == ("fits", (), 2, 2)
    assert found


def test_the_same_weights_under_another_name_are_said_in_these_words(team: Registry) -> None:
    team.push(walker(), "copies/base", probe=False)
    found = team.check("walk/perturb", "copies/base")
    assert found.verdict == "fits"
    assert [one.message for one in found.findings] == ["same weights under another name or path"]


def test_weights_that_differ_beside_the_targets_are_a_warning_that_names_them(team: Registry) -> None:
    other = walker()
    nn.init.normal_(other.norm.weight)
    team.push(other, "other/base", probe=False)
    found = team.check("walk/perturb", "other/base")
    assert (found.verdict, codes(found, "warning")) == ("fits", {"C04"})
    assert "norm.weight" in str(found)


def test_weights_that_differ_at_the_targets_are_an_error_that_counts_them(team: Registry) -> None:
    other = walker()
    nn.init.normal_(other.layers[1]["q"].weight)  # type: ignore[index]
    team.push(other, "other/base", probe=False)
    found = team.check("walk/perturb", "other/base")
    assert not found
    assert "1 of 2 targeted modules have other weights: layers.1.q" in found.errors[0].message


def test_a_cast_to_bfloat16_is_the_same_and_is_said(team: Registry) -> None:
    team.push(walker().to(torch.bfloat16), "walk/small", probe=False)
    found = team.check("walk/perturb", "walk/small")
    assert found.verdict == "fits"
    assert [one.message for one in found.findings] == ["same weights, cast to another dtype"]


def test_a_cast_that_rounding_does_not_tell_is_known_by_lineage(team: Registry) -> None:
    half = walker().to(torch.float16)
    team.push(half, "walk/half", probe=False)
    assert team.check("walk/perturb", "walk/half").verdict == "undecided"
    half.norm.bias.data += 1  # another version, so that it can say where it came from
    team.push(half, "walk/half", parents=[("converted_from", "walk/base", None)], probe=False)
    assert team.check("walk/perturb", "walk/half").verdict == "fits"


def test_an_adapter_without_a_recorded_base_is_undecided_and_says_what_is_missing(
    team: Registry, tmp_path: Path
) -> None:
    adapted(walker(), seed=9).save_pretrained(tmp_path / "saved")
    team.push(tmp_path / "saved", "walk/alone")
    for model in (None, "walk/base"):
        found = team.check("walk/alone", model)
        assert (found.verdict, codes(found, "undecided")) == ("undecided", {"C04"})
        assert found


# ---------------------------------------------------------------- models at hand


def test_a_live_model_is_compared_with_its_weights(team: Registry) -> None:
    assert team.check("walk/perturb", walker()).verdict == "fits"
    assert codes(team.check("walk/perturb", walker(seed=5))) == {"C04"}
    with torch.device("meta"):
        empty = Walker()
    assert team.check("walk/perturb", empty).verdict == "fits"


def test_arguments_that_no_shape_shows_are_named(team: Registry) -> None:
    found = team.check("walk/perturb", walker(heads=4))
    assert [(one.code, one.subject, one.expected, one.found) for one in found.errors] == [("C29", "heads", "2", "4")]


def test_a_merged_model_and_what_is_no_model_are_refused(team: Registry) -> None:
    merged = adapted(walker())
    merged.merge_adapter()
    with pytest.raises(InvalidInput, match="merged"):
        team.check("walk/perturb", merged)
    with pytest.raises(InvalidInput, match="expected a reference or a torch module"):
        team.check("walk/perturb", object())  # type: ignore[arg-type]


def test_a_module_that_contains_itself_is_refused(team: Registry) -> None:
    model = walker()
    model.norm.back = model
    with pytest.raises(InvalidInput, match="contains itself"):
        team.check("walk/perturb", model)


def test_a_base_as_adapter_and_an_adapter_as_base_are_told_apart(team: Registry) -> None:
    with pytest.raises(InvalidInput, match="give an adapter, and this one as its base"):
        team.check("walk/base")
    with pytest.raises(InvalidInput, match="give the base that it is to be loaded into"):
        team.check("walk/perturb", "walk/perturb")


def test_the_probe_settles_what_form_cannot(registry: Registry) -> None:
    """No base is recorded, so form alone leaves the weights open; a model at hand runs."""
    inputs = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    registry.push(adapted(walker()), "walk/perturb", probe=(inputs,))
    registry.push(walker(), "walk/base", probe=False)
    assert registry.check("walk/perturb", "walk/base").verdict == "undecided"
    assert registry.check("walk/perturb", walker(), prove=False).verdict == "undecided"
    proven = registry.check("walk/perturb", walker())
    assert (proven.verdict, codes(proven, "info")) == ("fits", {"C32"})
    other = walker(seed=3)
    assert codes(registry.check("walk/perturb", other)) == {"C32"}
    assert not hasattr(other, "peft_config")


# ---------------------------------------------------------------- push, load, reindex


def test_a_push_refuses_what_does_not_fit_its_base_and_force_keeps_it(
    team: Registry, root: Path, tmp_path: Path
) -> None:
    adapted(walker(layers=3)).save_pretrained(tmp_path / "three")
    with pytest.raises(Incompatible, match="nothing was stored") as caught:
        team.push(tmp_path / "three", "walk/three", base="walk/base")
    assert {one.code for one in caught.value.findings} == {"C05"}
    assert team.find(pattern="walk/three") == []
    kept = team.push(tmp_path / "three", "walk/three", base="walk/base", force=True)
    stored = team.show("walk/three").findings
    assert kept.findings == stored
    assert {one.code for one in stored if one.severity == "error"} == {"C05"}
    team.close()
    Registry.reindex(root)
    with Registry.open(root) as again:
        assert again.show("walk/three").findings == stored
    assert Registry.fsck(root).problems == ()


def test_a_live_adapter_on_other_weights_than_the_named_base_is_refused(team: Registry) -> None:
    with pytest.raises(Incompatible, match="2 of 2 targeted modules have other weights"):
        team.push(adapted(walker(seed=7)), "walk/wrong", base="walk/base")


def test_an_untrained_adapter_is_told_at_push_and_listed(team: Registry) -> None:
    pushed = team.push(get_peft_model(walker(), LoraConfig(target_modules=["q"])), "walk/idle", base="walk/base")
    assert [one.code for one in pushed.findings] == ["C27"]
    assert team.get("walk/idle").findings == 1


def test_a_load_into_other_weights_is_refused_and_goes_on_where_that_is_meant(team: Registry) -> None:
    other = walker(seed=5)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(Incompatible, match="C04 error"):
        team.load("walk/perturb", other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.warns(UserWarning, match="targeted modules have other weights"):
        team.load("walk/perturb", other, strict=False)


def test_a_load_into_the_recorded_weights_says_nothing(team: Registry) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        team.load("walk/perturb", walker())
        team.load("walk/perturb", adapted(walker(), seed=4))


# ---------------------------------------------------------------- alpha


def test_an_alpha_that_was_edited_is_undecided_and_names_the_other_version(team: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    adapted(walker(), seed=2).save_pretrained(folder)
    team.push(folder, "walk/first", base="walk/base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 64}))
    team.push(folder, "walk/edited", base="walk/base")
    assert team.check("walk/first").verdict == "fits"
    found = team.check("walk/edited")
    assert (found.verdict, codes(found, "undecided")) == ("undecided", {"C10"})
    assert "walk/first@1 (lora_alpha 8" in str(found)


# ---------------------------------------------------------------- peft, purposes, needs, groups


def test_an_older_peft_is_asked_about(team: Registry, tmp_path: Path) -> None:
    team.push(adapted(walker(), use_rslora=True), "walk/rs", base="walk/base")
    assert team.check("walk/rs", peft="0.21").verdict == "fits"
    assert codes(team.check("walk/rs", peft="0.7")) == {"C02"}
    with pytest.raises(InvalidInput, match="newest"):
        team.check("walk/rs", peft="newest")
    with pytest.raises(InvalidInput, match="expected one of load, merge, hotswap"):
        team.check("walk/rs", purpose="eat")


def test_needs_and_groups_come_from_the_catalog(team: Registry) -> None:
    team.push(adapted(walker(), r=16, lora_alpha=32), "walk/large", base="walk/base")
    team.push(adapted(walker(), use_rslora=True), "walk/rs", base="walk/base")
    needed = team.needs("walk/large")
    assert (needed.max_rank, needed.target_modules) == (16, ("q",))
    groups = team.swap_groups(["walk/perturb", "walk/large", "walk/rs"])
    assert [(group.members, group.target_rank) for group in groups] == [
        (("walk/perturb@1", "walk/large@1"), 16),
        (("walk/rs@1",), 4),
    ]


# ---------------------------------------------------------------- fits


def test_fits_says_of_every_adapter_what_check_says(team: Registry, tmp_path: Path) -> None:
    bases = {
        "walk/base": walker(),
        "walk/retrained": walker(seed=3),
        "walk/wide": walker(width=32),
        "walk/deep": walker(layers=3),
    }
    for name, base in bases.items():
        team.push(base, name, probe=False)
    for number, (base, options) in enumerate(
        [
            ("walk/base", {}),
            ("walk/base", {"target_modules": ["q", "v"], "r": 2}),
            ("walk/retrained", {"use_dora": True}),
            ("walk/wide", {"target_modules": ["v"]}),
            ("walk/deep", {"target_modules": r".*\.2\.q"}),
            ("walk/deep", {"modules_to_save": ["norm"]}),
        ]
    ):
        made = adapted(team_copy(bases[base]), seed=number, **options)
        team.push(made, f"more/a{number}", base=base, probe=False)
    folder = tmp_path / "alone"
    adapted(walker(), seed=40).save_pretrained(folder)
    team.push(folder, "more/alone")
    for name in bases:
        listed = {one.version.reference: one for one in team.fits(name, everything=True)}
        fitting = {one.version.reference for one in team.fits(name)}
        for version in team.find(kind="adapter"):
            found = team.check(version.reference, name)
            assert listed[version.reference].verdict == found.verdict, (name, version.reference, str(found))
            assert (version.reference in fitting) == bool(found), (name, version.reference, str(found))
            if found:
                counts = listed[version.reference].matched, listed[version.reference].total
                assert counts == (found.matched, found.total)


def team_copy(base: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(base)


def test_fits_takes_a_model_and_conditions(team: Registry) -> None:
    with torch.device("meta"):
        empty = Walker()
    assert [one.version.reference for one in team.fits(empty)] == ["walk/perturb@1"]
    assert team.fits(empty, "r > 4") == []
    assert [one.reason for one in team.fits(Walker(width=8), everything=True)] != [""]


# ---------------------------------------------------------------- without torch


def test_a_check_of_two_references_imports_neither_torch_nor_peft_nor_numpy(team: Registry, root: Path) -> None:
    program = (
        "import sys; from registry import Registry\n"
        f"r = Registry.open({str(root)!r})\n"
        "print(r.check('walk/perturb', 'walk/base').verdict, len(r.fits('walk/base')))\n"
        "r.needs('walk/perturb'); r.swap_groups(['walk/perturb'])\n"
        "print([name for name in ('torch', 'peft', 'numpy', 'transformers', 'alembic') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:2] == ["fits 1", "[]"]


# ---------------------------------------------------------------- found by a critic


def test_an_adapter_with_an_init_that_changes_the_base_leaves_a_whole_registry(registry: Registry, root: Path) -> None:
    registry.push(walker(), "walk/base", probe=False)
    registry.push(adapted(walker(), init_lora_weights="pissa"), "walk/pissa", base="walk/base", probe=False)
    registry.close()
    assert Registry.fsck(root).problems == ()


def test_a_targeted_weight_that_has_no_counterpart_is_not_called_the_same(team: Registry) -> None:
    model = walker()
    for layer in model.layers:
        nn.utils.parametrizations.weight_norm(layer["q"])  # type: ignore[index]
    assert team.check("walk/perturb", model).verdict != "fits"
