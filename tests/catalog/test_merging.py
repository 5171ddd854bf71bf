"""Merging on both databases: the join of targets, sources by query, recipes found through lineage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from registry import Incompatible, Registry
from registry.catalog.merging import joined_targets, made_of
from registry.catalog.versions import records, resolve
from registry.core.errors import ShapeMismatch
from registry.core.reference import parse_reference


def network(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"q": nn.Linear(width, 6), "v": nn.Linear(width, 4)})


def adapter(seed: int, width: int = 8, **options: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(network(width), LoraConfig(init_lora_weights=False, **options))


@pytest.fixture
def team(registry: Registry) -> Registry:
    registry.push(network(), "n/base", probe=False)
    for seed, (name, targets) in enumerate({"n/a": ["q", "v"], "n/b": ["q"], "n/c": ["v"]}.items(), 1):
        registry.push(adapter(seed, r=seed, target_modules=targets), name, base="n/base", tags=["prod"], probe=False)
    return registry


def test_targets_are_joined_by_their_module(team: Registry) -> None:
    with team._context.reading() as connection:
        ids = [resolve(connection, parse_reference(one)).id for one in ("n/a", "n/b", "n/c")]
        layouts = [one.layout_id for one in records(connection, ids) if one.layout_id is not None]
        found = joined_targets(connection, layouts)
    assert [(one.module, one.sources, one.in_features, one.out_features, one.kinds) for one in found] == [
        ("q", 2, (8, 8), (6, 6), 1),
        ("v", 2, (8, 8), (4, 4), 1),
    ]


def test_what_was_made_of_all_of_some_versions_is_found_by_its_edges(team: Registry) -> None:
    both = team.merge(["n/a", "n/b"], "n/ab")
    team.merge(["n/a"], "n/alone")
    with team._context.reading() as connection:
        ids = [resolve(connection, parse_reference(one)).id for one in ("n/a", "n/b")]
        found = made_of(connection, ids, "merged_from")
    assert [digest for _, digest in found] == [team.get(both.reference).digest]
    assert team.merge(["n/b", "n/a"], "n/ab").found == both.reference


def test_a_query_is_merged_into_its_base_and_computed_again(team: Registry) -> None:
    made = team.merge(name="n/all", where="base = n/base and tag = prod and r <= 3", into_base=True)
    assert len(made.sources) == 3
    assert team.remerge("n/all")
    assert len(team.similarity(["n/a", "n/b", "n/c"]).pairs) == 3


def test_two_sizes_of_one_module_are_told_before_a_weight_is_read(team: Registry) -> None:
    team.push(adapter(5, width=10, target_modules=["q"]), "m/a", probe=False)
    with pytest.raises((ShapeMismatch, Incompatible), match="q"):
        team.merge(["n/b", "m/a"], "n/m", force=True)
