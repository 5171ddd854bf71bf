"""`Registry.similarity` on real adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from registry import InvalidInput, NotFound, Registry
from tests.operations.models import lora, walker

QV = ["q_proj", "v_proj"]


@pytest.fixture
def team(registry: Registry) -> Registry:
    registry.push(walker(), "walk/base", probe=False)
    registry.push(lora(seed=1, target_modules=QV), "walk/a", base="walk/base", probe=False)
    registry.push(lora(seed=2, r=2, use_rslora=True, target_modules=QV), "walk/b", base="walk/base", probe=False)
    registry.push(lora(seed=3, target_modules=["head"]), "walk/c", base="walk/base", probe=False)
    return registry


def test_each_pair_is_compared_as_peft_computes_the_updates(team: Registry) -> None:
    found = team.similarity(["walk/a", "walk/b", "walk/c"])
    assert [(one.a, one.b) for one in found.pairs] == [
        ("walk/a@1", "walk/b@1"),
        ("walk/a@1", "walk/c@1"),
        ("walk/b@1", "walk/c@1"),
    ]
    pair = found.pairs[0]
    models = [team.load(one, walker()) for one in ("walk/a", "walk/b")]
    deltas = [
        torch.cat([model.base_model.model.get_submodule(path).get_delta_weight("default").flatten() for path in QV])
        for model in models
    ]
    assert pair.overall.cosine == pytest.approx(float(torch.cosine_similarity(*deltas, dim=0)), abs=1e-5)
    assert [one.path for one in pair.modules] == QV
    apart = found.pairs[1]
    assert (apart.modules, apart.alone, apart.overall.cosine) == ((), (2, 1), 0)


def test_what_is_no_product_is_left_out_with_the_reason(team: Registry) -> None:
    team.push(lora(seed=4, use_dora=True, target_modules=QV), "walk/dora", base="walk/base", probe=False)
    (pair,) = team.similarity(["walk/a", "walk/dora"]).pairs
    assert set(pair.left_out) == set(QV)
    assert "DoRA" in pair.left_out["q_proj"]


def test_bad_input_is_refused(team: Registry) -> None:
    model = lora(seed=5, target_modules=QV)
    with torch.no_grad():
        nn.init.constant_(model.base_model.model.q_proj.lora_A.default.weight, float("nan"))
    team.push(model, "walk/nan", base="walk/base", probe=False, force=True)
    for references, reason in (
        (["walk/a"], "give two or more"),
        ([], "no source"),
        (["walk/a", "walk/a@1"], "are one version"),
        (["walk/a", "walk/base"], "is a base"),
        (["walk/a", "walk/nan"], "NaN"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            team.similarity(references)
    with pytest.raises(NotFound):
        team.similarity(["walk/a", "walk/nobody"])
