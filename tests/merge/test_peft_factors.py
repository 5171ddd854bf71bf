"""PEFT's own add_weighted_adapter is the truth for the methods that are named after it: on the factors tensor by
tensor, on the updates by their products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from registry.merge.elementwise import random_masks
from registry.merge.group import Group, Majority, Options
from registry.merge.low_rank import LowRank
from registry.merge.methods import MAJORITIES, find_method

RANK = 4
FULL = 8
NAMES = ("one", "two", "three")
SCALINGS = (2.0, 0.5, 1.0)
WEIGHTS = (1.0, -0.7, 0.4)
LAYERS = ("up", "down", "lookup")


class Base(nn.Module):
    """Two linear layers and an embedding, whose updates have one full rank and different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.lookup = nn.Linear(FULL, 14), nn.Linear(14, FULL), nn.Embedding(12, FULL)


@pytest.fixture
def model() -> nn.Module:
    """Three adapters of one rank with random factors, none zero."""
    torch.manual_seed(0)
    base: nn.Module = Base()
    for name, scaling in zip(NAMES, SCALINGS, strict=True):
        config = LoraConfig(r=RANK, lora_alpha=int(scaling * RANK), target_modules=list(LAYERS))
        if name == "one":
            base = get_peft_model(base, config, adapter_name=name)
        else:
            base.add_adapter(name, config)
    for key, parameter in base.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    return base


def layer_of(model: nn.Module, path: str) -> LoraLayer:
    layer = model.get_submodule(f"base_model.model.{path}")
    assert isinstance(layer, LoraLayer)
    return layer


def factors(model: nn.Module, path: str, name: str) -> tuple[Tensor, Tensor]:
    """A and B of one adapter, as PEFT holds them."""
    layer = layer_of(model, path)
    if path == "lookup":
        return layer.lora_embedding_A[name].data, layer.lora_embedding_B[name].data
    return layer.lora_A[name].weight.data, layer.lora_B[name].weight.data


def group_of(model: nn.Module, path: str, names: Sequence[str] = NAMES, **options: Any) -> Group:
    updates = tuple(LowRank(a[None], b[None]) for a, b in (factors(model, path, name) for name in names))
    scalings, weights = (torch.tensor(one[: len(names)])[:, None] for one in (SCALINGS, WEIGHTS))
    made = Options(**options)
    return Group(updates, scalings, weights, (path,), tuple(range(len(names))), made)


def by_peft(model: nn.Module, kind: str, **options: Any) -> None:
    """The adapter `merged`, made by PEFT."""
    model.base_model.add_weighted_adapter(list(NAMES), list(WEIGHTS), "merged", combination_type=kind, **options)


def product(model: nn.Module, path: str, name: str) -> Tensor:
    """(out, in): the update as PEFT computes it, an embedding's turned back."""
    update = layer_of(model, path).get_delta_weight(name).detach()
    return update.T if path == "lookup" else update


def true_sum(model: nn.Module, path: str) -> Tensor:
    parts = [weight * product(model, path, name) for weight, name in zip(WEIGHTS, NAMES, strict=True)]
    return torch.stack(parts).sum(0)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What PEFT draws next; all of it has to be drawn."""
    queue: list[Tensor] = []

    def bernoulli(probabilities: Tensor) -> Tensor:
        return queue.pop(0).reshape(probabilities.shape).to(probabilities.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return queue


def masks(path: str, parts: Sequence[tuple[str, int]], density: float, seed: int) -> Iterator[Tensor]:
    for part, size in parts:
        for source in range(len(NAMES)):
            yield torch.from_numpy(next(random_masks(f"{seed} {source} {part} {path}", density, [size])))


# ---------------------------------------------------------------- on the factors


def assert_factors_are_those_of_peft(model: nn.Module, method: str, **options: Any) -> None:
    for path in LAYERS:
        ours = find_method(method).function(group_of(model, path, **options))
        assert isinstance(ours, LowRank)
        a, b = factors(model, path, "merged")
        torch.testing.assert_close(ours.a[0], a, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.b[0], b, rtol=0, atol=1e-6)


def test_linear_is_that_of_peft(model: nn.Module) -> None:
    by_peft(model, "linear")
    assert_factors_are_those_of_peft(model, "linear")


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("majority", MAJORITIES)
def test_ties_on_factors_is_that_of_peft(model: nn.Module, majority: Majority, density: float) -> None:
    by_peft(model, "ties", density=density, majority_sign_method=majority)
    assert_factors_are_those_of_peft(model, "ties_factors", density=density, majority=majority)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_magnitude_prune_on_factors_is_that_of_peft(model: nn.Module, density: float) -> None:
    by_peft(model, "magnitude_prune", density=density)
    assert_factors_are_those_of_peft(model, "magnitude_prune_factors", density=density)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "ties", "magnitude_prune"])
def test_a_density_of_one_on_factors_is_that_of_peft(model: nn.Module, kind: str) -> None:
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        by_peft(model, kind, density=1.0)
    assert_factors_are_those_of_peft(model, f"{kind}_factors", density=1.0)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("majority", MAJORITIES)
def test_dare_on_factors_is_that_of_peft_where_the_masks_are_the_same(
    model: nn.Module, kind: str, majority: Majority, same_masks: list[Tensor]
) -> None:
    for path in LAYERS:
        a, b = factors(model, path, "one")
        same_masks.extend(masks(path, [("A", a.numel()), ("B", b.numel())], 0.5, seed=3))
    by_peft(model, kind, density=0.5, majority_sign_method=majority)
    assert not same_masks
    assert_factors_are_those_of_peft(model, f"{kind}_factors", density=0.5, seed=3, majority=majority)


# ---------------------------------------------------------------- on the updates


def assert_update_is_that_of_peft(model: nn.Module, method: str, **options: Any) -> None:
    for path in LAYERS:
        ours = find_method(method).function(group_of(model, path, **options))
        assert isinstance(ours, Tensor)
        assert relative(product(model, path, "merged"), ours[0]) < 2e-6


@pytest.mark.parametrize("majority", MAJORITIES)
def test_ties_is_the_ties_svd_of_peft(model: nn.Module, majority: Majority) -> None:
    by_peft(model, "ties_svd", density=0.5, majority_sign_method=majority, svd_rank=FULL)
    assert_update_is_that_of_peft(model, "ties", density=0.5, majority=majority)


def test_magnitude_prune_is_the_magnitude_prune_svd_of_peft(model: nn.Module) -> None:
    by_peft(model, "magnitude_prune_svd", density=0.5, svd_rank=FULL)
    assert_update_is_that_of_peft(model, "magnitude_prune", density=0.5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("majority", MAJORITIES)
def test_dare_is_the_dare_svd_of_peft_where_the_masks_are_the_same(
    model: nn.Module, method: str, majority: Majority, same_masks: list[Tensor]
) -> None:
    for path in LAYERS:
        out, columns = true_sum(model, path).shape
        drawn = (one.reshape(out, columns) for one in masks(path, [("", out * columns)], 0.3, seed=5))
        # PEFT prunes the update of an embedding as the table lies: (rows of the table, out).
        same_masks.extend(one.T if path == "lookup" else one for one in drawn)
    by_peft(model, f"{method}_svd", density=0.3, majority_sign_method=majority, svd_rank=FULL)
    assert not same_masks
    assert_update_is_that_of_peft(model, method, density=0.3, seed=5, majority=majority)


def test_methods_on_factors_differ_from_those_on_updates(model: nn.Module) -> None:
    for path in LAYERS:
        on_updates = find_method("ties").function(group_of(model, path, density=0.5))
        on_factors = find_method("ties_factors").function(group_of(model, path, density=0.5))
        assert isinstance(on_updates, Tensor)
        assert isinstance(on_factors, LowRank)
        assert relative(on_factors.b @ on_factors.a, on_updates) > 0.3


# ---------------------------------------------------------------- linear and cat against the true weighted sum


def test_linear_is_not_the_weighted_sum_and_cat_is(model: nn.Module) -> None:
    by_peft(model, "linear")
    for path in LAYERS:
        assert relative(product(model, path, "merged"), true_sum(model, path)) > 0.3
        found = {}
        for name in ("linear", "cat"):
            update = find_method(name).function(group_of(model, path))
            assert isinstance(update, LowRank)
            found[name] = relative((update.b @ update.a)[0], true_sum(model, path))
        assert found["linear"] > 0.3
        assert found["cat"] < 1e-6


def test_cat_is_that_of_peft(model: nn.Module) -> None:
    by_peft(model, "cat")
    for path in LAYERS:
        ours = find_method("cat").function(group_of(model, path))
        assert isinstance(ours, LowRank)
        assert ours.a.shape[1] == factors(model, path, "merged")[0].shape[0] == RANK * len(NAMES)
        assert relative((ours.b @ ours.a)[0], product(model, path, "merged")) < 1e-6
