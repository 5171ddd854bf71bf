"""The moving average, beyond `test_parts`: the decay's limits, counters that come back, and models of another form than
the average."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from pdp.ema import EMAModel
from registry.core.errors import InvalidInput


def train(model: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(torch.randn(one.shape, generator=draw, dtype=one.dtype))


@pytest.mark.parametrize(
    ("step", "decay"),
    [(0, 0.0), (3, 0.0), (4, 0.4), (5, 1 - 3**-0.5), (103, 1 - 101**-0.5), (10**9, 0.95)],
)
def test_the_decay_of_a_step_is_that_of_the_formula_within_its_limits(step: int, decay: float) -> None:
    ema = EMAModel(nn.Linear(1, 1), update_after_step=2, power=0.5, min_value=0.4, max_value=0.95)
    assert ema.get_decay(step) == pytest.approx(decay)


def test_no_decay_is_below_the_least_or_above_the_most() -> None:
    ema = EMAModel(nn.Linear(1, 1), min_value=0.9, max_value=0.95)
    assert [ema.get_decay(step) for step in (0, 1)] == [0.0, 0.0]
    assert ema.get_decay(2) == 0.9
    assert ema.get_decay(10**6) == 0.95


def test_a_run_that_goes_on_has_the_average_of_the_whole_run() -> None:
    model = nn.Linear(3, 2)
    ema = EMAModel(model)
    other_model, other = None, None
    weight = model.weight.detach().numpy().astype(numpy.float64)
    for step in range(10):
        if step == 5:
            other_model = copy.deepcopy(model)
            other = EMAModel(other_model)
            other.averaged_model.load_state_dict(ema.averaged_model.state_dict())
            other.load_state_dict(ema.state_dict())
        train(model, step)
        ema.step(model)
        decay = 0.0 if step < 2 else 1 - step ** (-2 / 3)
        weight = decay * weight + (1 - decay) * model.weight.detach().numpy()
        if other is not None and other_model is not None:
            train(other_model, step)
            other.step(other_model)
    assert other is not None
    averaged: Any = ema.averaged_model
    assert numpy.allclose(averaged.weight.numpy(), weight, atol=1e-6)
    assert torch.equal(other.averaged_model.state_dict()["weight"], averaged.weight)
    assert other.state_dict() == ema.state_dict() == {"decay": ema.decay, "optimization_step": 10}


def test_the_average_is_in_eval_mode_does_not_train_and_is_no_part_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    averaged = EMAModel(model).averaged_model
    assert model.training
    assert not any(module.training for module in averaged.modules())
    assert not any(one.requires_grad for one in averaged.parameters())
    assert all(one.requires_grad for one in model.parameters())
    assert not {one.data_ptr() for one in model.parameters()} & {one.data_ptr() for one in averaged.parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_averaging_is_in_place_and_in_the_type_of_the_parameter(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2).to(dtype)
    ema = EMAModel(model, min_value=0.5)
    places = [one.data_ptr() for one in ema.averaged_model.parameters()]
    for step in range(4):
        train(model, step)
        ema.step(model)
    assert [one.data_ptr() for one in ema.averaged_model.parameters()] == places
    assert {one.dtype for one in ema.averaged_model.parameters()} == {dtype}


class Counting(nn.Module):
    """A weight, and a buffer of another size where one is given."""

    def __init__(self, size: int = 2, buffer: str = "seen", buffer_size: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.register_buffer(buffer, torch.zeros(buffer_size))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        # (1,) would be spread over (2,) without a word.
        (Counting(size=1), r"weight: the average has the form \(2,\), the model \(1,\)"),
        (Counting(buffer_size=3), r"seen: the average has the form \(1,\), the model \(3,\)"),
        (Counting(buffer="heard"), "other buffers than the average, heard first"),
    ],
)
def test_a_model_of_another_form_is_named_and_changes_nothing(other: nn.Module, named: str) -> None:
    ema = EMAModel(Counting())
    before, counters = copy.deepcopy(ema.averaged_model.state_dict()), ema.state_dict()
    with pytest.raises(InvalidInput, match=named):
        ema.step(other)
    assert ema.state_dict() == counters
    assert all(torch.equal(ema.averaged_model.state_dict()[name], one) for name, one in before.items())


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({}, "expected numbers decay and optimization_step"),
        ([], "expected numbers decay and optimization_step"),
        ({"decay": 0.5}, "expected numbers decay and optimization_step"),
        *(
            (
                {"decay": value, "optimization_step": 1},
                "decay of the moving average is .*; expected a number from 0 to 1",
            )
            for value in ("much", 2.0, -0.1, math.nan, math.inf, 10**400, None, True, torch.zeros(2))
        ),
        *(
            ({"decay": 0.5, "optimization_step": value}, "optimization_step is .*; expected a whole number from 0")
            for value in (math.inf, math.nan, -1, 1.5, 2**53 + 1, 10**5000, "many", True, [1])
        ),
    ],
)
def test_counters_that_are_none_are_refused_and_change_nothing(state: Any, named: str) -> None:
    ema = EMAModel(nn.Linear(1, 1))
    with pytest.raises(InvalidInput, match=named):
        ema.load_state_dict(state)
    with pytest.raises(InvalidInput, match=f"run.ckpt: .*{named}"):
        ema.fit_state(state, "run.ckpt")
    assert ema.state_dict() == {"decay": 0.0, "optimization_step": 0}


def test_counters_are_taken_over_when_they_are_told_to() -> None:
    ema = EMAModel(nn.Linear(1, 1))
    take = ema.fit_state({"decay": torch.tensor(0.5), "optimization_step": torch.tensor(7)}, "run.ckpt")
    assert ema.state_dict() == {"decay": 0.0, "optimization_step": 0}
    take()
    assert ema.state_dict() == {"decay": 0.5, "optimization_step": 7}
