"""`Registry.merge` and `remerge` on real versions and real PEFT models: what a merged version computes, its recipe and
lineage, merging into a base, and every mixture that is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from registry import Incompatible, InvalidInput, NotFound, Registry, RegistryError
from registry.core.errors import ReadOnly, ShapeMismatch
from tests.operations.models import steps, walker, zoo

QV = ("q_proj", "v_proj")


def adapted(base: nn.Module, seed: int = 1, **options: Any) -> Any:
    model = get_peft_model(base, LoraConfig(**options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter)
    return model.eval()


def lora(seed: int, base: nn.Module | None = None, **options: Any) -> Any:
    return adapted(base or walker(), seed=seed, **{"target_modules": list(QV), **options})


@pytest.fixture
def team(registry: Registry) -> Registry:
    """A base, and three adapters whose scalings and ranks are all different."""
    registry.push(walker(), "walk/base", probe=False)
    for name, options in {
        "walk/a": {"r": 4, "lora_alpha": 8},
        "walk/b": {"r": 2, "lora_alpha": 3, "use_rslora": True},
        "walk/c": {"r": 6, "lora_alpha": 6, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 10}},
    }.items():
        model = lora(sum(map(ord, name)), **options)
        registry.push(model, name, base="walk/base", tags=["prod"], probe=False)
    return registry


def delta(registry: Registry, reference: str, path: str) -> Tensor:
    """What a version adds to a weight, as PEFT says."""
    model = registry.load(reference, walker(), strict=False)
    layer = model.get_submodule(f"base_model.model.{path}")
    return layer.get_delta_weight("default").double()


def weighted(registry: Registry, weights: dict[str, float], path: str) -> Tensor:
    return sum(weight * delta(registry, name, path) for name, weight in weights.items())  # type: ignore[return-value]


WEIGHTS = {"walk/a": 0.7, "walk/b": -0.4, "walk/c": 1.5}


# ---------------------------------------------------------------- what a merged version computes


def test_cat_is_the_weighted_sum_of_sources_with_other_ranks_and_scalings_each(team: Registry) -> None:
    result = team.merge(WEIGHTS, "walk/all")
    assert result.created
    assert result.relative_error == 0
    for path in QV:
        torch.testing.assert_close(delta(team, "walk/all", path), weighted(team, WEIGHTS, path), rtol=1e-5, atol=1e-6)
    assert {one.path: one.rank for one in result.modules} == {"q_proj": 9, "v_proj": 12}


def test_svd_is_the_best_approximation_in_its_rank_and_says_how_far_it_is(team: Registry) -> None:
    result = team.merge(WEIGHTS, "walk/all", method="svd", rank=3)
    squares = norms = 0.0
    for one in result.modules:
        true = weighted(team, WEIGHTS, one.path)
        values = torch.linalg.svdvals(true)
        found = delta(team, "walk/all", one.path)
        best = float(values[3:].norm())
        assert float((found - true).norm()) == pytest.approx(best, rel=1e-4)
        assert one.relative_error == pytest.approx(best / float(values.norm()), rel=1e-4)
        squares, norms = squares + best**2, norms + float(values.norm()) ** 2
    assert result.relative_error == pytest.approx((squares / norms) ** 0.5, rel=1e-4)
    assert team.get("walk/all").metrics["merge_relative_error"] == pytest.approx(result.relative_error)
    assert team.get("walk/all").metadata["merge_method"] == "svd"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("knots", {"density": 0.5, "rank": 8}),
        ("tsv", {}),
        ("ties", {"density": 0.5, "rank": 16}),
        ("dare_linear", {"density": 0.5, "rank": 16, "seed": 3}),
        ("dare_ties", {"density": 0.5, "energy": 0.9}),
        ("magnitude_prune", {"density": 0.5, "energy": 0.99, "precise": True}),
    ],
)
def test_every_method_makes_a_version_that_peft_loads_and_reports_its_error(
    team: Registry, method: str, options: dict[str, Any]
) -> None:
    result = team.merge(["walk/a", "walk/b", "walk/c"], f"walk/{method}", method=method, **options)
    for one in result.modules:
        true = weighted(team, dict.fromkeys(WEIGHTS, 1.0), one.path)
        found = delta(team, f"walk/{method}", one.path)
        error = float((found - true).norm() / true.norm())
        assert one.relative_error == pytest.approx(error, rel=1e-3)
    assert team.check(f"walk/{method}").verdict == "fits"


def test_slerp_of_two_lies_between_them(team: Registry) -> None:
    team.merge({"walk/a": 1, "walk/b": 3}, "walk/arc", method="slerp")
    for path in QV:
        x, y = delta(team, "walk/a", path), delta(team, "walk/b", path)
        angle = torch.arccos((x * y).sum() / x.norm() / y.norm())
        expected = (torch.sin(0.25 * angle) * x + torch.sin(0.75 * angle) * y) / torch.sin(angle)
        torch.testing.assert_close(delta(team, "walk/arc", path), expected, rtol=1e-4, atol=1e-5)


def test_pefts_factor_wise_forms_say_that_they_make_cross_terms(registry: Registry) -> None:
    registry.push(walker(), "walk/base", probe=False)
    for seed, name in ((1, "walk/a"), (2, "walk/b")):
        registry.push(lora(seed), name, base="walk/base", probe=False)
    result = registry.merge(["walk/a", "walk/b"], "walk/linear", method="linear")
    assert result.cross_terms
    assert (result.relative_error or 0) > 0.3
    true = weighted(registry, {"walk/a": 1, "walk/b": 1}, "q_proj")
    found = delta(registry, "walk/linear", "q_proj")
    (module,) = (one for one in result.modules if one.path == "q_proj")
    assert module.relative_error == pytest.approx(float((found - true).norm() / true.norm()), rel=1e-4)


def test_weights_by_module_count_where_their_pattern_matches(team: Registry) -> None:
    team.merge(["walk/a", "walk/b"], "walk/some", weights=[1, 1], module_weights={"v_*": [0.5, 0]})
    torch.testing.assert_close(
        delta(team, "walk/some", "v_proj"), 0.5 * delta(team, "walk/a", "v_proj"), rtol=1e-5, atol=1e-6
    )
    both = weighted(team, {"walk/a": 1, "walk/b": 1}, "q_proj")
    torch.testing.assert_close(delta(team, "walk/some", "q_proj"), both, rtol=1e-5, atol=1e-6)


def test_disjoint_targets_keep_each_its_own_update(team: Registry) -> None:
    for name, target in (("walk/q", "q_proj"), ("walk/v", "v_proj")):
        team.push(lora(7, r=4, target_modules=[target]), name, base="walk/base", probe=False)
    result = team.merge(["walk/q", "walk/v"], "walk/both", method="svd", rank=4)
    assert result.relative_error == pytest.approx(0, abs=1e-6)
    for name, path in (("walk/q", "q_proj"), ("walk/v", "v_proj")):
        torch.testing.assert_close(delta(team, "walk/both", path), delta(team, name, path), rtol=1e-4, atol=1e-5)


def test_an_identity_merge_of_an_rslora_adapter_is_the_identity_where_pefts_is_not(team: Registry) -> None:
    team.merge(["walk/b"], "walk/same")
    for path in QV:
        torch.testing.assert_close(delta(team, "walk/same", path), delta(team, "walk/b", path), rtol=1e-5, atol=1e-6)
    model = team.load("walk/b", walker())
    model.add_weighted_adapter(["default"], [1.0], "again", combination_type="cat")
    layer = model.base_model.model.q_proj
    assert not torch.allclose(layer.get_delta_weight("again"), layer.get_delta_weight("default"), rtol=0.1)


def test_a_rank_below_a_modules_dimensions_alone_is_written_into_rank_pattern(registry: Registry) -> None:
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
    registry.push(base, "n/base", probe=False)
    for seed in (1, 2):
        model = adapted(copy.deepcopy(base), seed=seed, r=2, target_modules=["0", "1"])
        registry.push(model, f"n/{'ab'[seed - 1]}", base="n/base", probe=False)
    result = registry.merge(["n/a", "n/b"], "n/m", method="svd", rank=8)
    assert {one.path: one.rank for one in result.modules} == {"0": 4, "1": 3}
    registry.load("n/m", copy.deepcopy(base))
    with pytest.raises(InvalidInput, match=r"rank 17 is above the dimensions of every module: 0, the largest"):
        registry.merge(["n/a", "n/b"], "n/m", method="svd", rank=17)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups", "ignore:fan_in_fan_out")
def test_layers_of_every_kind_are_merged(registry: Registry) -> None:
    targets = ["emb", "lin", "conv1", "conv2", "grouped", "conv3", "mha", "transposed"]
    registry.push(zoo(), "zoo/base", probe=False)
    models = {}
    for seed, name in ((1, "zoo/a"), (2, "zoo/b")):
        models[name] = adapted(zoo(), seed=seed, r=2 * seed, target_modules=targets)
        registry.push(models[name], name, base="zoo/base", probe=False)
    result = registry.merge({"zoo/a": 0.5, "zoo/b": 2}, "zoo/all")
    loaded = registry.load("zoo/all", zoo())
    ours = registry.load("zoo/all")
    assert result.relative_error == 0
    assert {one.path for one in result.modules} == {*targets, "mha.out_proj"}
    for path in ("emb", "lin", "conv1", "conv2", "conv3", "transposed"):
        layer = loaded.base_model.model.get_submodule(path)
        true = sum(
            weight * model.base_model.model.get_submodule(path).get_delta_weight("default")
            for weight, model in zip((0.5, 2), models.values(), strict=True)
        )
        torch.testing.assert_close(layer.get_delta_weight("default"), true, rtol=1e-4, atol=1e-5)
    assert ours["base_model.model.grouped.lora_A.weight"].shape == (6, 4, 3, 3)
    # PEFT's grouped layer runs, and adds what the sources add.
    image = torch.randn(2, 4, 5, 5)
    parts = [one.base_model.model.grouped(image) - one.base_model.model.grouped.base_layer(image)
             for one in models.values()]  # fmt: skip
    merged = loaded.base_model.model.grouped
    torch.testing.assert_close(
        merged(image) - merged.base_layer(image), 0.5 * parts[0] + 2 * parts[1], rtol=1e-4, atol=1e-4
    )


# ---------------------------------------------------------------- recipes and lineage


def test_the_same_merge_in_another_order_is_found_and_not_computed(
    team: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = team.merge({"walk/a": 0.7, "walk/b": 0.3}, "walk/m", method="svd", rank=2)
    monkeypatch.setattr("registry.operations.merging.merge.compute", None)
    again = team.merge({"walk/b@1": 0.3, "walk/a:prod": 0.7}, "walk/m", method="svd", rank=2, tags=["prod"])
    assert (first.created, again.created, again.found) == (True, False, "walk/m@1")
    other = team.merge({"walk/a": 0.7, "walk/b": 0.3}, "walk/copy", method="svd", rank=2)
    assert (other.created, other.found) == (True, "walk/m@1")
    assert team.get("walk/copy").digest == team.get("walk/m:prod").digest


def test_another_weight_seed_or_method_is_another_version_of_the_name(team: Registry) -> None:
    drops = {"method": "dare_linear", "density": 0.5, "rank": 4}
    made = [
        team.merge({"walk/a": 0.7, "walk/b": 0.3}, "walk/m", **options).reference
        for options in ({}, {"method": "tsv"}, drops, {**drops, "seed": 1}, {**drops, "seed": 1})
    ]
    assert made == ["walk/m@1", "walk/m@2", "walk/m@3", "walk/m@4", "walk/m@4"]


def test_lineage_has_an_edge_with_its_weight_for_each_source(team: Registry) -> None:
    team.merge(WEIGHTS, "walk/all")
    found = team.log("walk/all")
    edges = {found.names[one.parent_id]: one.weight for one in found.ancestors if one.relation == "merged_from"}
    assert edges == {"walk/a@1": 0.7, "walk/b@1": -0.4, "walk/c@1": 1.5}
    assert team.get("walk/all").base == "walk/base@1"


def test_a_query_names_the_sources(team: Registry) -> None:
    where = "base = walk/base and tag = prod and r <= 4"
    result = team.merge(name="walk/few", where=where)
    assert {one for one, _ in result.sources} == {"walk/a@1", "walk/b@1"}
    with pytest.raises(InvalidInput, match="no adapter satisfies"):
        team.merge(name="walk/few", where="tag = nobody")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "dare_ties", "density": 0.5, "rank": 4, "seed": 9},
        {"method": "ties", "density": 0.3, "energy": 0.9},
    ],
)
def test_remerge_is_bit_equal_and_stores_nothing(team: Registry, root: Path, options: dict[str, Any]) -> None:
    team.merge(WEIGHTS, "walk/all", **options)
    before = sorted(root.rglob("*"))
    again = team.remerge("walk/all")
    assert again
    assert (again.equal, again.relative_difference, again.worst) == (again.tensors, 0, None)
    assert sorted(root.rglob("*")) == before


def test_remerge_refuses_what_no_recipe_made(team: Registry) -> None:
    with pytest.raises(InvalidInput, match="not made by a recipe"):
        team.remerge("walk/a")


def test_a_bundle_carries_the_recipe(team: Registry, tmp_path: Path) -> None:
    team.merge(["walk/a", "walk/b"], "walk/m")
    digest = team.get("walk/m").digest
    team.export("walk/m", to=tmp_path / "m.bundle")
    with Registry.init(tmp_path / "other") as other:
        other.import_(tmp_path / "m.bundle")
        assert other.get("walk/m").digest == digest
        assert other.remerge("walk/m")


def test_a_catalog_made_again_still_finds_the_recipe(team: Registry, root: Path) -> None:
    team.merge(["walk/a", "walk/b"], "walk/m")
    team.close()
    Registry.reindex(root)
    with Registry.open(root) as again:
        assert again.merge(["walk/a", "walk/b"], "walk/m").found == "walk/m@1"


# ---------------------------------------------------------------- into a base


def test_a_merge_into_the_base_computes_what_the_adapters_compute_together(team: Registry) -> None:
    result = team.merge(WEIGHTS, "walk/merged", into_base=True)
    merged = team.load("walk/merged", walker(seed=5))
    base = walker()
    for path in QV:
        expected = base.get_submodule(path).weight.double() + weighted(team, WEIGHTS, path)
        torch.testing.assert_close(merged.get_submodule(path).weight.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.head.weight, base.head.weight, rtol=0, atol=0)
    assert (result.relative_error or 1) < 1e-6
    assert result.unmoved == pytest.approx(0, abs=0.01)
    assert team.get("walk/merged").kind == "base"


def test_one_adapter_in_its_base_is_pefts_merged_model(team: Registry) -> None:
    team.merge(["walk/c"], "walk/merged", into_base=True)
    theirs = team.load("walk/c", walker()).merge_and_unload()
    ours = team.load("walk/merged", walker(seed=5))
    torch.testing.assert_close(ours(steps()), theirs(steps()))


def test_untouched_tensors_of_the_base_are_not_stored_again(registry: Registry, root: Path) -> None:
    big = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 80_000))
    registry.push(big, "n/base", probe=False)
    registry.push(adapted(copy.deepcopy(big), r=2, target_modules=["0"]), "n/a", base="n/base", probe=False)
    before = sum(one.stat().st_size for one in (root / "blobs").rglob("*") if one.is_file())
    registry.merge(["n/a"], "n/m", into_base=True)
    after = sum(one.stat().st_size for one in (root / "blobs").rglob("*") if one.is_file())
    assert after - before < 100_000
    assert not Registry.fsck(root, deep=True).problems


def test_a_method_on_the_updates_goes_into_a_base_too(team: Registry) -> None:
    team.merge(["walk/a", "walk/b"], "walk/ties", method="ties", density=0.5, rank=16)
    team.merge(["walk/a", "walk/b"], "walk/merged", method="ties", density=0.5, into_base=True)
    merged = team.load("walk/merged", walker(seed=5))
    for path in QV:
        expected = walker().get_submodule(path).weight.double() + delta(team, "walk/ties", path)
        torch.testing.assert_close(merged.get_submodule(path).weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_remerge_of_a_merged_base_is_bit_equal(team: Registry) -> None:
    team.merge(WEIGHTS, "walk/merged", into_base=True)
    assert team.remerge("walk/merged")


def test_a_bf16_base_says_which_share_of_its_weights_did_not_move(registry: Registry) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    nn.init.normal_(base[0].weight, std=0.02)
    registry.push(base, "n/base", probe=False)
    model = adapted(copy.deepcopy(base), r=4, target_modules=["0"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=(1e-4 / 2 / 2) ** 0.5)
    registry.push(model, "n/a", base="n/base", probe=False)
    result = registry.merge(["n/a"], "n/m", into_base=True)
    assert 0.1 < (result.unmoved or 0) < 0.7
    assert (result.relative_error or 0) > 0.1


def test_merging_what_a_base_contains_already_is_refused_until_it_is_forced(team: Registry) -> None:
    team.merge(["walk/a"], "walk/merged", into_base=True)
    with pytest.raises(InvalidInput, match="walk/merged@1 contains walk/a@1 already"):
        team.merge(["walk/a"], "walk/twice", base="walk/merged", into_base=True)
    team.push(lora(3), "walk/d", base="walk/base", probe=False)
    team.merge(["walk/a", "walk/d"], "walk/twice", base="walk/merged", into_base=True, force=True)


def test_an_adapter_that_a_base_contains_is_named(team: Registry) -> None:
    """Trained on the merged base itself, so its weights are right, and the lineage alone tells."""
    team.merge(["walk/a"], "walk/merged", into_base=True)
    merged = team.load("walk/merged", walker())
    team.push(lora(9, merged, target_modules=["head"]), "walk/late", base="walk/merged", probe=False)
    team.merge(["walk/late"], "walk/later", into_base=True)
    with pytest.raises(InvalidInput, match=r"walk/later@1 contains walk/late@1 already"):
        team.merge(["walk/late"], "walk/again", base="walk/later", into_base=True)


def test_a_dora_adapter_goes_into_its_base_through_its_magnitude_and_into_no_adapter(team: Registry) -> None:
    model = lora(4, use_dora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.3)
    team.push(model, "walk/dora", base="walk/base", probe=False)
    with pytest.raises(InvalidInput, match=r"walk/dora@1 cannot be merged into an adapter.*--into-base"):
        team.merge(["walk/dora", "walk/a"], "walk/m")
    team.merge(["walk/dora"], "walk/merged", into_base=True)
    ours, theirs = team.load("walk/merged", walker(seed=5)), copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(ours(steps()), theirs(steps()), rtol=1e-4, atol=1e-5)


def test_an_attention_in_a_base_asks_how_often_its_out_proj_counts(registry: Registry) -> None:
    registry.push(zoo(), "zoo/base", probe=False)
    registry.push(adapted(zoo(), target_modules=["mha"]), "zoo/a", base="zoo/base", probe=False)
    with pytest.raises(InvalidInput, match="attention-out"):
        registry.merge(["zoo/a"], "zoo/m", into_base=True)
    once = registry.merge(["zoo/a"], "zoo/once", into_base=True, attention_out=1)
    registry.merge(["zoo/a"], "zoo/twice", into_base=True, attention_out=2)
    base, one, two = (
        state["mha.out_proj.weight"]
        for state in (zoo().state_dict(), registry.load("zoo/once"), registry.load("zoo/twice"))
    )
    torch.testing.assert_close(two - base, 2 * (one - base), rtol=1e-4, atol=1e-5)
    assert {one.path for one in once.modules} == {"mha", "mha.out_proj"}


def test_an_external_base_is_refused_and_says_what_needs_its_bytes(registry: Registry, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(walker().state_dict(), tmp_path / "base.safetensors")
    registry.push(tmp_path / "base.safetensors", "walk/base", external=True)
    registry.push(lora(1), "walk/a", base="walk/base", probe=False)
    with pytest.raises(NotFound, match="merging into it reads and writes them all"):
        registry.merge(["walk/a"], "walk/m", into_base=True)
    assert registry.merge(["walk/a"], "walk/m").created


# ---------------------------------------------------------------- whole copies and biases


def test_whole_copies_on_which_sources_disagree_are_asked_for(team: Registry) -> None:
    team.push(lora(1, modules_to_save=["head"]), "walk/headed", base="walk/base", probe=False)
    with pytest.raises(InvalidInput, match=r"head\.bias is a whole copy in walk/headed@1, and walk/a@1 has none"):
        team.merge(["walk/a", "walk/headed"], "walk/m")
    dropped = team.merge(["walk/a", "walk/headed"], "walk/dropped", saved="drop")
    assert any("left out" in note for note in dropped.notes)
    assert not any("head" in name for name in team.load("walk/dropped"))
    team.merge(["walk/a", "walk/headed"], "walk/kept", saved="walk/headed")
    kept, source = team.load("walk/kept"), team.load("walk/headed")
    torch.testing.assert_close(kept["base_model.model.head.weight"], source["base_model.model.head.weight"])
    team.load("walk/kept", walker())


def test_a_mean_of_whole_copies_is_weighted(team: Registry) -> None:
    for seed, name in ((1, "walk/x"), (2, "walk/y")):
        model = lora(seed, modules_to_save=["head"])
        nn.init.normal_(model.base_model.model.head.modules_to_save.default.weight)
        team.push(model, name, base="walk/base", probe=False)
    team.merge({"walk/x": 1, "walk/y": 3}, "walk/m", saved="mean")
    x, y, m = (team.load(one)["base_model.model.head.weight"] for one in ("walk/x", "walk/y", "walk/m"))
    torch.testing.assert_close(m, 0.25 * x + 0.75 * y)


def test_one_adapter_brings_its_whole_copies_into_the_base(team: Registry) -> None:
    model = lora(1, modules_to_save=["head"])
    nn.init.normal_(model.base_model.model.head.modules_to_save.default.weight)
    team.push(model, "walk/headed", base="walk/base", probe=False)
    team.merge(["walk/headed"], "walk/m", into_base=True)
    theirs = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(team.load("walk/m", walker(seed=3))(steps()), theirs(steps()), rtol=1e-4, atol=1e-5)


def test_lora_biases_are_added_with_their_weights(team: Registry) -> None:
    for seed, name in ((1, "walk/x"), (2, "walk/y")):
        model = lora(seed, lora_bias=True)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("lora_B.default.bias"):
                    parameter.normal_()
        team.push(model, name, base="walk/base", probe=False)
    team.merge({"walk/x": 2, "walk/y": -1}, "walk/m")
    team.merge({"walk/x": 2, "walk/y": -1}, "walk/full", into_base=True)
    adapter = team.load("walk/m", walker())
    torch.testing.assert_close(team.load("walk/full", walker(seed=3))(steps()), adapter(steps()), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what is refused


def test_bad_input_is_refused_with_its_reason_and_nothing_is_stored(team: Registry, root: Path) -> None:
    before = sorted(root.rglob("*"))
    for options, reason in (
        ({"sources": []}, "no source: give references"),
        ({"sources": ["walk/a", "walk/a@1"]}, "are one version"),
        ({"sources": ["walk/a", "walk/b"], "weights": [1]}, "1 weights for 2 sources"),
        ({"sources": {"walk/a": float("nan")}}, "expected a finite number"),
        ({"sources": ["walk/a"], "method": "tise"}, "did you mean ties"),
        ({"sources": ["walk/a"], "method": "ties", "rank": 2}, "needs a density"),
        ({"sources": ["walk/a"], "method": "ties", "rank": 2, "density": 1.5}, "density is 1.5"),
        ({"sources": ["walk/a"], "method": "ties", "rank": 2, "density": 0}, "density is 0"),
        ({"sources": ["walk/a"], "method": "svd"}, "needs a rank"),
        ({"sources": ["walk/a"], "method": "svd", "rank": 0}, "rank is 0"),
        ({"sources": ["walk/a"], "method": "svd", "energy": 0}, "energy is 0"),
        ({"sources": ["walk/a"], "rank": 2}, "cat keeps every rank"),
        ({"sources": ["walk/a"], "density": 0.5}, "takes no density"),
        ({"sources": ["walk/a", "walk/b", "walk/c"], "method": "slerp"}, "exactly two sources"),
        ({"sources": ["walk/a"], "device": "tpu"}, "device 'tpu'"),
        ({"sources": ["walk/base"]}, "walk/base@1 is a base"),
        ({"sources": ["walk/a"], "name": ""}, "needs the name"),
        ({"sources": ["walk/a"], "dtype": "int8"}, "dtype 'int8'"),
        ({"sources": ["walk/a", "walk/b"], "method": "linear"}, "rank"),
        ({"sources": ["walk/a"], "module_weights": {"*": [1, 2]}}, "2 weights for the modules"),
        ({"sources": ["walk/a"], "saved": "walk/b"}, "none of the sources"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            team.merge(**{"name": "walk/m", **options})
    assert sorted(root.rglob("*")) == before


def test_nan_in_a_source_is_refused_and_names_the_tensor(team: Registry) -> None:
    model = lora(1)
    with torch.no_grad():
        model.base_model.model.q_proj.lora_B.default.weight[0, 0] = float("nan")
    team.push(model, "walk/nan", base="walk/base", probe=False, force=True)
    with pytest.raises(Incompatible, match="C17"):
        team.merge(["walk/a", "walk/nan"], "walk/m")


def test_sources_of_other_bases_are_refused_unless_these_are_the_same_at_the_targets(team: Registry) -> None:
    team.push(walker(seed=4), "other/base", probe=False)
    team.push(lora(1, walker(seed=4)), "other/a", base="other/base", probe=False)
    with pytest.raises(Incompatible, match="C04"):
        team.merge(["walk/a", "other/a"], "walk/m", base="walk/base")
    near = walker()
    nn.init.normal_(near.head.weight)
    team.push(near, "near/base", probe=False)
    team.push(lora(2, near), "near/a", base="near/base", probe=False)
    assert team.merge(["walk/a", "near/a"], "walk/m", base="walk/base").created


def test_sources_that_disagree_about_a_modules_size_are_refused(registry: Registry) -> None:
    for width, name in ((8, "n/a"), (12, "n/b")):
        model = get_peft_model(
            nn.Sequential(nn.Linear(width, 8)), LoraConfig(target_modules=["0"], init_lora_weights=False)
        )
        registry.push(model, name, probe=False)
    with pytest.raises(ShapeMismatch, match=r"the module 0 is of several \(in, out\)"):
        registry.merge(["n/a", "n/b"], "n/m")


def test_a_pissa_adapter_is_refused(team: Registry) -> None:
    model = get_peft_model(walker(), LoraConfig(r=4, target_modules=list(QV), init_lora_weights="pissa"))
    team.push(model, "walk/pissa", base="walk/base", probe=False, force=True)
    with pytest.raises(Incompatible, match="C22"):
        team.merge(["walk/pissa", "walk/a"], "walk/m")


def test_a_read_only_registry_refuses_before_anything_is_read(team: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(team._context), "writable", property(lambda self: False))
    with pytest.raises(ReadOnly):
        team.merge(["walk/a"], "walk/m")


# ---------------------------------------------------------------- what a critic found


def test_rounded_digests_of_a_merged_base_are_those_of_its_bytes(registry: Registry, tmp_path: Path) -> None:
    """They are worked out by two threads, from tensors of which some are made and some lie in the base's blob."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(24, 24) for _ in range(20)))
    registry.push(base, "n/base", probe=False)
    registry.push(adapted(copy.deepcopy(base), r=2, target_modules=["0"]), "n/a", base="n/base", probe=False)
    for number in range(6):
        merged = registry.merge({"n/a": 1.0 + number}, "n/m", into_base=True).reference
        registry.merge({"n/a": 1.0 + number}, "n/again", into_base=True)
        registry.pull(merged, tmp_path / f"{number}.safetensors")
        pushed = registry.push(tmp_path / f"{number}.safetensors", "n/plain", kind="base").reference
        truth, made, found = (_beside(registry, one) for one in (pushed, merged, "n/again"))
        assert made == truth
        assert found == truth


def _beside(registry: Registry, reference: str) -> Any:
    events = registry.show(reference).events
    return next(
        one.payload["blobs"]["rounded_digests"]
        for one in events
        if one.kind == "described" and "rounded_digests" in one.payload["blobs"]
    )


def test_dora_goes_into_a_base_by_the_sum_alone(team: Registry) -> None:
    team.push(lora(4, r=4, use_dora=True), "walk/dora", base="walk/base", probe=False)
    with pytest.raises(InvalidInput, match=r"cannot be merged into a base by ties.*the methods cat and svd can"):
        team.merge(["walk/dora"], "walk/m", method="ties", density=1.0, into_base=True)


def test_a_base_that_holds_an_adapter_is_refused(team: Registry, tmp_path: Path) -> None:
    torch.save(team.load("walk/a", walker()).state_dict(), tmp_path / "whole.pth")
    team.push(tmp_path / "whole.pth", "walk/whole", kind="base")
    with pytest.raises(InvalidInput, match="holds an adapter beside its weights"):
        team.merge(["walk/b"], "walk/m", base="walk/whole", into_base=True, force=True)


def test_one_tensor_under_two_names_of_a_file_is_taken_for_tied(registry: Registry, tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    torch.save({"emb.weight": weight, "out.weight": weight}, tmp_path / "tied.pth")
    registry.push(tmp_path / "tied.pth", "n/base")
    model = adapted(nn.ModuleDict({"out": nn.Linear(8, 8, bias=False)}), r=2, target_modules=["out"])
    registry.push(model, "n/a", base="n/base", probe=False, force=True)
    with pytest.raises((InvalidInput, Incompatible), match="out"):
        registry.merge(["n/a"], "n/m", into_base=True)


def test_one_adapter_under_two_names_is_refused(team: Registry) -> None:
    team.push(lora(sum(map(ord, "walk/a")), r=4, lora_alpha=8), "other/a", base="walk/base", probe=False)
    with pytest.raises(InvalidInput, match="are the same adapter"):
        team.merge(["walk/a", "other/a"], "walk/m")


def test_a_pattern_of_weights_that_matches_no_module_is_refused(team: Registry) -> None:
    with pytest.raises(InvalidInput, match=r"q_prj match no module of the sources; q_proj is one"):
        team.merge(["walk/a", "walk/b"], "walk/m", module_weights={"q_prj": [0, 0]})


def test_an_option_that_decides_nothing_makes_no_other_recipe(team: Registry) -> None:
    first = team.merge(["walk/a", "walk/b"], "walk/m")
    again = team.merge(["walk/a", "walk/b"], "walk/m", saved="drop", attention_out=2)
    assert again.found == first.reference


def test_a_weight_of_a_whole_copy_that_is_not_1_is_asked_for_in_a_base(team: Registry) -> None:
    team.push(lora(1, r=4, modules_to_save=["head"]), "walk/headed", base="walk/base", probe=False)
    with pytest.raises(InvalidInput, match="say with --saved"):
        team.merge(["walk/headed"], "walk/m", into_base=True, module_weights={"*": [0.5]})


def test_trained_tokens_keep_their_places_whichever_source_brings_them(registry: Registry) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    settings = LlamaConfig(vocab_size=32, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    base = LlamaForCausalLM(settings)
    registry.push(base, "u/base", probe=False)
    for seed in (1, 2, 3, 4):  # digests, and so the order of the sources, are anyone's guess
        for name, more in (
            ("headed", {"modules_to_save": ["lm_head"]}),
            ("tokens", {"trainable_token_indices": {"embed_tokens": [1, 5]}}),
        ):
            model = adapted(copy.deepcopy(base), seed=seed, r=2, target_modules=["q_proj"], **more)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "trainable_tokens_delta" in key:
                        parameter.normal_()
            registry.push(model, f"u/{name}{seed}", base="u/base", probe=False)
        registry.merge([f"u/headed{seed}", f"u/tokens{seed}"], f"u/m{seed}", saved="mean")
        loaded = registry.load(f"u/m{seed}", copy.deepcopy(base))
        ids = torch.tensor([[1, 5]])
        source = registry.load(f"u/tokens{seed}", copy.deepcopy(base))
        embedded = [one.base_model.model.model.embed_tokens(ids) for one in (loaded, source)]
        torch.testing.assert_close(*embedded)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_lora_on_the_head_that_peft_saves_with_the_heads_own_weight_goes_into_its_base(
    registry: Registry, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=False, **sizes)).eval()
    registry.push(base, "h/base", probe=False)
    model = adapted(copy.deepcopy(base), r=2, target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "out")
    registry.push(tmp_path / "out", "h/a", base="h/base")
    registry.merge(["h/a"], "h/m", into_base=True)
    ours = registry.load("h/m", copy.deepcopy(base))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_query_does_not_feed_on_its_own_result(team: Registry) -> None:
    where = "base = walk/base and tag = prod"
    first = team.merge(name="walk/all", where=where, tags=["prod"])
    again = team.merge(name="walk/all", where=where, tags=["prod"])
    assert (again.found, len(again.sources)) == (first.reference, 3)
    assert any("left out of the query" in note for note in again.notes)
    other = team.merge(name="walk/others", where=where, method="svd", rank=4)
    assert len(other.sources) == 3


def test_an_imported_version_is_not_taken_for_what_its_recipe_says(team: Registry, tmp_path: Path) -> None:
    made = team.merge(["walk/a", "walk/b"], "walk/m")
    team.export(made.reference, to=tmp_path / "m.bundle")
    with Registry.init(tmp_path / "other") as other:
        other.import_(tmp_path / "m.bundle", name="stranger/m")
        again = other.merge(["walk/a", "walk/b"], "walk/mine")
        assert again.found is None
        assert other.get("walk/mine").digest == team.get("walk/m").digest


def test_a_damaged_result_is_computed_again(team: Registry, root: Path) -> None:
    made = team.merge(["walk/a", "walk/b"], "walk/m")
    (file,) = (one for one in team.show(made.reference).contents.files if one.path.endswith(".safetensors"))
    (blob,) = root.rglob(f"*{file.sha256[4:]}*")
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    again = team.merge(["walk/a", "walk/b"], "walk/n")
    assert again.found is None
    assert any("damaged" in note for note in again.notes)


RECIPES: dict[str, Any] = {
    "dtype": "X",
    "rank": 2,
    "saved": [],
    "into_base": [],
    "base": "../x",
    "sources": [{"digest": 1, "weight": 1}],
    "method": "../x",
    "options": {"density": "x"},
    "arithmetic": "F16",
    "module_weights": [[1]],
    "format": 2,
    "operation": "x" * 5000,
}


@pytest.mark.parametrize("member", RECIPES)
def test_a_hostile_recipe_is_refused_with_a_typed_error(team: Registry, member: str) -> None:
    from registry.operations.merging.adapters import adapter_source
    from registry.operations.merging.recipe import read_recipe
    from registry.operations.push import push
    from registry.operations.push_request import check_request

    made = team.merge(["walk/a", "walk/b"], "walk/m", method="tsv")
    recipe = dict(read_recipe(team._context.store.blobs, team.get(made.reference).digest) or {})
    config = lora(1).peft_config["default"]
    from registry.core.adapter_config import adapter_config

    source = adapter_source(
        adapter_config({**config.to_dict(), "peft_version": None}),
        team.load("walk/m"),
        {**recipe, member: RECIPES[member]},
        None,
    )
    push(team._context, source, check_request("walk/evil", force=True))
    with pytest.raises(RegistryError) as caught:
        team.remerge("walk/evil")
    assert len(str(caught.value)) < 1000
