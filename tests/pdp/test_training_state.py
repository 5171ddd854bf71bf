"""State of optimizer and schedule, and counters: what is taken over, and that anything else is refused in words and
changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from pdp.checkpoints import read_checkpoint
from pdp.training_state import check_count, fit_optimizer, fit_scheduler
from registry.core.errors import Incompatible, InvalidInput
from tests.pdp.models import LEGACY, lora, network

WHAT = "run.ckpt"
NESTED: list[Any] = []
NESTED.append(NESTED)


def parameters() -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(2, 3, generator=draw)), nn.Parameter(torch.randn(3, generator=draw))]


def made(kind: Any = AdamW, steps: int = 2, **options: Any) -> Any:
    found = parameters()
    groups = [{"params": found, "weight_decay": 0.5}, {"params": []}]
    optimizer = kind(groups, **{"lr": 0.1, **options})
    for _ in range(steps):
        for one in found:
            one.grad = one.detach().clone()
        optimizer.step()
    return optimizer


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and type(one) is type(other)


def refused(optimizer: Any, state: Any, named: str, error: type[Exception] = InvalidInput) -> None:
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=named) as caught:
        fit_optimizer(optimizer, state, WHAT)
    assert WHAT in str(caught.value)
    assert "leave it out (load_optimizer=False)" in str(caught.value)
    assert same(before, optimizer.state_dict())


# ---------------------------------------------------------------- optimizer

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (AdamW, {}),
    (AdamW, {"amsgrad": True}),
    (AdamW, {"lr": torch.tensor(0.1), "capturable": False, "foreach": False}),
    (Adam, {"maximize": True}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Adafactor, {}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda one: getattr(one, "__name__", None))
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_is_taken_over_when_it_is_told_to(kind: Any, options: dict[str, Any], steps: int) -> None:
    if kind is torch.optim.Rprop:  # it has no weight decay, and ignores the one of the group
        options = {"etas": (0.5, 1.2)}
    state = made(kind, steps, **options).state_dict()
    saved = copy.deepcopy(state)
    optimizer = made(kind, 0, **{**options, "lr": options.get("lr", 0.2)})
    before = copy.deepcopy(optimizer.state_dict())
    take = fit_optimizer(optimizer, state, WHAT)
    assert same(before, optimizer.state_dict())
    take()
    assert same(optimizer.state_dict(), saved)
    for group in optimizer.param_groups:
        for one in group["params"]:
            one.grad = torch.ones_like(one)
    optimizer.step()
    assert same(state, saved)  # training on does not write to the checkpoint


def test_the_legacy_files_are_taken_over() -> None:
    for name in ("lora_checkpoint.pth", "lora_checkpoint_later.pth"):
        checkpoint = read_checkpoint(LEGACY / name)
        optimizer = AdamW(lora(network(seed=7), seed=8).get_optim_groups(1e-3), lr=0.5)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 100)
        fit_optimizer(optimizer, checkpoint.state("optimizer"), WHAT)()
        fit_scheduler(scheduler, checkpoint.state("scheduler"), WHAT)()
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == 0.00993844170297569
        assert same(optimizer.state_dict()["state"], checkpoint.state("optimizer")["state"])


def test_the_state_of_an_older_torch_keeps_the_options_that_it_lacks() -> None:
    state = made().state_dict()
    for group in state["param_groups"]:
        for name in ("decoupled_weight_decay", "fused", "foreach", "differentiable", "capturable", "maximize"):
            del group[name]
        group["betas"] = list(group["betas"])
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    optimizer = made(steps=0, foreach=False)
    fit_optimizer(optimizer, state, WHAT)()
    group = optimizer.state_dict()["param_groups"][0]
    assert (group["decoupled_weight_decay"], group["foreach"], group["betas"]) == (True, False, (0.9, 0.999))
    assert torch.is_tensor(optimizer.state_dict()["state"][0]["step"])
    optimizer.step()


def test_what_a_schedule_put_into_a_group_stays_where_the_state_has_none() -> None:
    optimizer = made(steps=0)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    fit_optimizer(optimizer, made().state_dict(), WHAT)()
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.004)
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: None, "expected state and param_groups, found None"),
        (lambda state: [state], "expected state and param_groups"),
        (lambda state: {}, "expected state and param_groups"),
        (lambda state: {**state, "state": [1]}, r"expected a mapping as state, found \[1\]"),
        (lambda state: {**state, "param_groups": {}}, r"expected a list as param_groups, found \{\}"),
        (lambda state: {**state, "param_groups": NESTED}, "with a list params as group 0"),
        (lambda state: {**state, "param_groups": [5]}, "with a list params as group 0, found 5"),
        (lambda state: {**state, "param_groups": [{"lr": 1}]}, "with a list params as group 0"),
        (lambda state: {**state, "param_groups": [{"params": 2}]}, "with a list params as group 0"),
        (
            lambda state: {**state, "param_groups": [{"params": [[0], {}]}]},
            r"numbers as params of group 0, found \[0\]",
        ),
        (lambda state: {**state, "param_groups": [{"params": [0, True]}]}, "numbers as params of group 0, found True"),
        (lambda state: {**state, "param_groups": [{"params": [0, 0]}]}, "parameter 0 is in its params twice"),
        (
            lambda state: {**state, "param_groups": [{"params": [0]}, {"params": [0]}]},
            "parameter 0 is in its params tw",
        ),
        (lambda state: {**state, "state": {0: None}}, "expected a mapping as state of parameter 0, found None"),
        (lambda state: {**state, "state": {1: [3]}}, r"expected a mapping as state of parameter 1, found \[3\]"),
        (lambda state: {**state, "state": {7: {}}}, "state of parameter 7, which is in none of its groups"),
        (lambda state: {**state, "state": {"0": {}}}, "state of parameter '0', which is in none of its groups"),
        (lambda state: {**state, "state": {10**5000: {}}}, "state of parameter a int, which is in none"),
    ],
)
def test_what_is_no_state_of_an_optimizer_is_refused(change: Callable[[Any], Any], named: str) -> None:
    refused(made(), change(made().state_dict()), f"holds no state of an optimizer: .*{named}")


def test_other_groups_and_shapes_are_refused() -> None:
    optimizer, state = made(), made().state_dict()
    one_group = AdamW(parameters())
    refused(one_group, state, r"is of other parameters; .*\n.*differ \(expected \[2\], found \[2, 0\]\)", Incompatible)
    turned = AdamW([{"params": parameters()[::-1]}, {"params": []}])
    refused(turned, state, r"other parameters(.|\n)*exp_avg of parameter 0: the shapes differ", Incompatible)
    state["state"][1]["exp_avg_sq"] = torch.tensor(1.0)
    refused(optimizer, state, r"parameter 1: the shapes differ \(expected \(3,\), found \(\)\)", Incompatible)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("lr", value, "finite numbers from 0") for value in (None, "0.1", True, -1.0, math.nan, math.inf, 10**400)),
        ("lr", torch.tensor(0.1), "finite numbers from 0"),
        ("eps", -1e-8, "finite numbers from 0"),
        ("weight_decay", [0.1], "finite numbers from 0"),
        ("initial_lr", "high", "finite numbers from 0"),
        *(
            ("betas", value, "2 numbers from 0 to below 1")
            for value in (0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), ("0.9", 0.9), None, (0.9, True))
        ),
        ("amsgrad", True, "False"),
        ("amsgrad", 0, "False"),
        ("capturable", True, "False"),
        ("maximize", "no", "False"),
        ("fused", True, "None"),
        ("foreach", 1, "None"),
        ("differentiable", [], "False"),
        ("decoupled_weight_decay", False, "True"),
    ],
)
def test_options_of_another_kind_are_named(name: str, value: Any, expected: str) -> None:
    state = made().state_dict()
    state["param_groups"][1][name] = value
    named = rf"is not of the kind of this AdamW(.|\n)*{name} of group 1: the options differ \(expected .*{expected}"
    refused(made(), state, named, Incompatible)


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay"])
def test_options_that_are_missing_are_named(name: str) -> None:
    state = made().state_dict()
    del state["param_groups"][0][name]
    refused(made(), state, rf"{name} of group 0: the options differ \(expected .*, found nothing\)", Incompatible)


def test_a_rate_that_is_a_tensor_is_one_in_the_state() -> None:
    optimizer = made(lr=torch.tensor(0.1), foreach=False)
    for value in (0.1, torch.tensor(math.nan), torch.tensor(-1.0), torch.ones(1), torch.tensor(1), None):
        state = made(lr=torch.tensor(0.1), foreach=False).state_dict()
        state["param_groups"][0]["lr"] = value
        refused(optimizer, state, r"lr of group 0: .*expected a torch.float32 tensor of shape \(\)", Incompatible)


@pytest.mark.parametrize(
    ("mine", "its", "named"),
    [
        (made(AdamW), made(SGD, momentum=0.9), "betas of group 0"),
        (made(SGD, momentum=0.9), made(AdamW), "momentum of group 0"),
        (made(AdamW), made(Adam), "decoupled_weight_decay of group 0"),
        (made(AdamW, amsgrad=True), made(AdamW), r"amsgrad of group 0: .* \(expected True, found False"),
        (made(torch.optim.RMSprop), made(AdamW), "alpha of group 0"),
    ],
)
def test_another_class_is_refused(mine: Optimizer, its: Optimizer, named: str) -> None:
    refused(mine, its.state_dict(), named, Incompatible)


def test_the_entries_of_another_class_are_refused_whatever_its_options() -> None:
    adam, sgd = made(AdamW).state_dict(), made(SGD, momentum=0.9).state_dict()
    for mine, its, expected in ((adam, sgd, "step, exp_avg, exp_avg_sq"), (sgd, adam, "momentum_buffer")):
        optimizer = made(AdamW) if mine is adam else made(SGD, momentum=0.9)
        state = {"state": its["state"], "param_groups": mine["param_groups"]}
        refused(optimizer, state, rf"parameter 0: its state differs \(expected {expected}, found", Incompatible)
    state = made(AdamW).state_dict()
    for group in state["param_groups"]:
        del group["amsgrad"]
    refused(made(AdamW, amsgrad=True), state, "expected step, exp_avg, exp_avg_sq, max_exp_avg_sq", Incompatible)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        *(
            ("step", value, "step of parameter 0: it is no count of steps")
            for value in (None, "3", True, -1, math.nan, torch.tensor(math.inf), torch.ones(1), torch.tensor(3), [3])
        ),
        *(
            ("exp_avg", value, "exp_avg of parameter 0: it is no tensor of floats")
            for value in (
                None,
                0.0,
                [[0.0] * 3] * 2,
                torch.zeros(2, 3, dtype=torch.int64),
                torch.zeros(2, 3, dtype=torch.complex64),
                torch.zeros(2, 3, device="meta"),
                torch.zeros(2, 3).to_sparse(),
            )
        ),
        ("max_exp_avg_sq", "high", "max_exp_avg_sq of parameter 0: it is no tensor of floats"),
    ],
)
def test_parts_of_another_kind_are_named(name: str, value: Any, named: str) -> None:
    state = made().state_dict()
    state["state"][0][name] = value
    refused(made(), state, named, Incompatible)


@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq"])
def test_parts_that_are_missing_are_named(name: str) -> None:
    state = made().state_dict()
    del state["state"][1][name]
    refused(made(), state, r"parameter 1: its state differs \(expected step, exp_avg, exp_avg_sq, found", Incompatible)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "holds a object"),
        (torch.zeros(2).to_sparse(), "holds a tensor that is sparse"),
        (NESTED, "nested too deep"),
    ],
)
def test_what_is_no_plain_data_is_refused(value: Any, named: str) -> None:
    optimizer = made()
    for path in ("group", "entry", "top"):
        state = made().state_dict()
        {"group": state["param_groups"][0], "entry": state["state"][0], "top": state}[path]["more"] = value
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(InvalidInput, match=f"{WHAT}: .*{named}"):
            fit_optimizer(optimizer, state, WHAT)
        assert same(before, optimizer.state_dict())


# ---------------------------------------------------------------- schedule


class Warmup:
    """A function with a state, as LambdaLR saves it."""

    def __init__(self, steps: int = 3) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda one: lr_scheduler.CosineAnnealingLR(one, 10),
    "lambda": lambda one: lr_scheduler.LambdaLR(one, lambda step: 0.9**step),
    "callable": lambda one: lr_scheduler.LambdaLR(one, [Warmup(), Warmup()]),
    "milestones": lambda one: lr_scheduler.MultiStepLR(one, [3, 4]),
    "step": lambda one: lr_scheduler.StepLR(one, 3),
    "one_cycle": lambda one: lr_scheduler.OneCycleLR(one, 0.1, 20),
    "plateau": lr_scheduler.ReduceLROnPlateau,
    "restarts": lambda one: lr_scheduler.CosineAnnealingWarmRestarts(one, 4),
    "cyclic": lambda one: lr_scheduler.CyclicLR(one, 0.1, 0.2, cycle_momentum=False),
    "sequential": lambda one: lr_scheduler.SequentialLR(
        one, [lr_scheduler.ConstantLR(one), lr_scheduler.StepLR(one, 3)], [4]
    ),
    "chained": lambda one: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(one), lr_scheduler.StepLR(one, 3)]),
    "exponential": lambda one: lr_scheduler.ExponentialLR(one, 0.9),
}


def run(scheduler: Any, steps: int) -> list[list[float]]:
    rates = []
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        rates.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
    return rates


def scheduler_refused(scheduler: Any, state: Any, named: str, error: type[Exception] = Incompatible) -> None:
    before = copy.deepcopy(scheduler.state_dict())
    with pytest.raises(error, match=named) as caught:
        fit_scheduler(scheduler, state, WHAT)
    assert WHAT in str(caught.value)
    assert "or leave it out (load_optimizer=False" in str(caught.value)
    assert same(before, scheduler.state_dict())


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [0, 3, 6])
def test_a_schedule_goes_on_where_it_was(name: str, steps: int) -> None:
    whole = SCHEDULERS[name](made(SGD, momentum=0.9))
    run(whole, steps)
    state = copy.deepcopy(whole.state_dict())
    saved = copy.deepcopy(state)
    optimizer_state = copy.deepcopy(whole.optimizer.state_dict())
    expected = run(whole, 5)
    again = SCHEDULERS[name](made(SGD, momentum=0.9))
    fresh = copy.deepcopy(again.state_dict())
    take = fit_scheduler(again, state, WHAT)
    assert same(again.state_dict(), fresh)
    take()
    assert same(again.state_dict(), saved)
    fit_optimizer(again.optimizer, optimizer_state, WHAT)()
    assert run(again, 5) == expected
    assert same(state, saved)


@pytest.mark.parametrize("mine", SCHEDULERS)
@pytest.mark.parametrize("its", SCHEDULERS)
def test_the_state_of_another_class_is_refused_with_the_keys_that_are_missing(mine: str, its: str) -> None:
    scheduler, state = SCHEDULERS[mine](made(SGD)), SCHEDULERS[its](made(SGD)).state_dict()
    flags = {"_is_initial", "_get_lr_called_within_step"}
    missing = [key for key in scheduler.state_dict() if key not in state and key not in flags]
    if missing:
        named = f"does not fit this {type(scheduler).__name__}(.|\n)*keys are missing .expected {', '.join(missing)}"
        scheduler_refused(scheduler, state, named)
    elif (mine, its) != ("lambda", "callable") and mine != its:
        # Each key is there: the schedule is the same, or a simpler one whose state is part of the other.
        assert (mine, its) in {
            ("callable", "lambda"),
            ("exponential", "step"),
            ("exponential", "milestones"),
            ("exponential", "cyclic"),
            ("chained", "sequential"),
        }


def test_flags_of_another_torch_may_be_missing_and_unknown_keys_are_kept() -> None:
    scheduler = SCHEDULERS["cosine"](made())
    state = {**scheduler.state_dict(), "verbose": False, "more": [1]}
    del state["_is_initial"], state["_get_lr_called_within_step"]
    fit_scheduler(scheduler, state, WHAT)()
    assert scheduler.state_dict()["more"] == [1]
    assert scheduler.state_dict()["more"] is not state["more"]
    run(scheduler, 2)


@pytest.mark.parametrize("key", ["optimizer", "step", "get_lr", "load_state_dict", "state_dict"])
def test_no_state_is_set_over_a_part_of_the_scheduler(key: str) -> None:
    scheduler = SCHEDULERS["cosine"](made())
    scheduler_refused(scheduler, {**scheduler.state_dict(), key: 5}, f"{key}: a part of the scheduler that is no state")


@pytest.mark.parametrize("state", [None, 3, [], "state", {1: 2}])
def test_what_is_no_state_of_a_scheduler_is_refused(state: Any) -> None:
    named = "holds no state of a scheduler: expected a mapping of names, found"
    scheduler_refused(SCHEDULERS["cosine"](made()), state, named, InvalidInput)


@pytest.mark.parametrize(
    ("name", "key", "values", "expected"),
    [
        ("cosine", "last_epoch", [-1, 1.5, math.nan, True, "3", None, 2**53 + 1, [1]], "a whole number from 0 to 2"),
        ("cosine", "base_lrs", [None, 0.1, "ab"], "a list of 2"),
        ("cosine", "base_lrs", [[0.1], [0.1] * 3, []], "expected 2"),
        (
            "cosine",
            "_last_lr",
            [[0.1, math.nan], [0.1, "b"], [None, 0.1], [True, 0.1], [0.1, 10**400]],
            "a finite number",
        ),
        ("cosine", "eta_min", [math.inf, "low", None, [], {}], "a finite number"),
        ("cosine", "T_max", [0, -1, math.nan, "long"], "a number above 0"),
        ("cosine", "_is_initial", [1, None, "no"], "True or False"),
        ("cosine", "_step_count", [math.nan, None], "a finite number"),
        ("lambda", "lr_lambdas", [[None], [None] * 3], "expected 2"),
        ("lambda", "lr_lambdas", [[5, None], [None, {"steps": 3}]], "expected None"),
        ("lambda", "lr_lambdas", [5, None, {}], "a list of 2"),
        ("callable", "lr_lambdas", [[5, None]], "a mapping"),
        ("callable", "lr_lambdas", [[{"rate": 5}, None]], "expected steps"),
        ("callable", "lr_lambdas", [[{"steps": "many"}, None]], "a finite number"),
        ("milestones", "milestones", [[3, 4], None, {"3": 1}, {3: -1}, {3.5: 1}], "a count for each milestone"),
        ("plateau", "mode", ["most", "max", None], "expected 'min'"),
        ("plateau", "best", [math.nan, "good"], "a finite number"),
        ("plateau", "min_lrs", [[0]], "expected 2"),
        ("plateau", "patience", [math.inf], "a finite number"),
        ("cyclic", "_scale_fn_custom", [{}, 5], "expected None"),
        ("sequential", "_schedulers", [[], None, [{}]], "expected"),
        ("sequential", "_schedulers", [[{}, {}], [None, 3]], "expected"),
        ("one_cycle", "_schedule_phases", [[{}, {}], None], "expected"),
    ],
)
def test_values_of_another_kind_are_named(name: str, key: str, values: list[Any], expected: str) -> None:
    scheduler = SCHEDULERS[name](made(SGD))
    for value in values:
        named = rf"scheduler\.{key}.*{expected}"
        scheduler_refused(scheduler, {**scheduler.state_dict(), key: value}, named)


def test_milestones_are_those_of_the_state() -> None:
    scheduler = SCHEDULERS["milestones"](made(SGD))
    fit_scheduler(scheduler, {**scheduler.state_dict(), "milestones": {1: 2}}, WHAT)()
    run(scheduler, 1)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.001)
    assert list(scheduler.milestones.elements()) == [1, 1]


def test_a_best_value_before_the_first_is_infinite() -> None:
    scheduler = SCHEDULERS["plateau"](made(SGD))
    state = scheduler.state_dict()
    assert state["best"] == math.inf
    run(scheduler, 2)
    fit_scheduler(scheduler, state, WHAT)()
    assert scheduler.best == math.inf


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(
    "value", [0, 7, 7.0, 2**53, torch.tensor(7), torch.tensor(7.0), torch.tensor(7, dtype=torch.uint8)]
)
def test_counts_are_whole_numbers(value: Any) -> None:
    found = check_count(value, "epoch", WHAT)
    assert type(found) is int
    assert found == value


@pytest.mark.parametrize(
    "value",
    [
        *(True, None, "7", [7], {}, -1, 7.5, math.nan, math.inf, -math.inf, 2**53 + 1, 1j, Fraction(7)),
        *(torch.tensor(True), torch.tensor([7]), torch.tensor(math.nan), torch.tensor(7 + 0j)),
        *(torch.tensor(7, device="meta"), NESTED, pytest.param(10**5000, id="5001 digits")),
    ],
)
def test_what_is_no_count_is_named(value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"run\.ckpt: global_step is .*; expected a whole number from 0 to 2\*\*53"):
        check_count(value, "global_step", WHAT)
