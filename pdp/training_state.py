"""Whether what a checkpoint holds of a run fits what is live: optimizer, schedule of the learning rate, counters. All
of it is looked at first; what takes it over comes back as a function that has nothing left to refuse."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from registry.core.errors import Incompatible, InvalidInput
from registry.core.findings import Finding
from registry.core.reference import shown

MOST = 2**53
"""The largest count: up to it, a float is exact."""

RATES = ("lr", "eps", "weight_decay", "initial_lr")
FLAGS = ("amsgrad", "capturable", "fused", "foreach", "differentiable", "maximize", "decoupled_weight_decay")
"""Options that say which state there is, or how a step is computed; torch knows None beside True and False."""

SHAPED = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "grad_avg"),
        *("exp_inf", "sum", "prev", "step_size", "ax", "variance"),
    }
)
"""What torch's optimizers hold in the shape of the parameter."""

PRIVATE_FLAGS = ("_is_initial", "_get_lr_called_within_step", "verbose")
"""Keys of a schedule that some versions of torch have, and others do not."""

FUNCTIONS = ("lr_lambdas", "_scale_fn_custom")
PERIODS = ("T_max", "T_0", "T_i", "T_mult", "step_size", "total_steps", "total_size")
UNBOUNDED = ("best", "mode_worse")

_OPTIMIZER_MEND = "make the optimizer with get_optim_groups of the same model, or leave it out (load_optimizer=False)"
_SCHEDULER_MEND = (
    "make the scheduler as the one that was saved, or leave it out (load_optimizer=False, or "
    "exclude_keys=['scheduler'] of a workspace)"
)


def told(value: object) -> str:
    """A value from outside, for a message."""
    try:
        return shown(repr(value))
    except (ValueError, TypeError, AttributeError, RuntimeError):
        return f"a {type(value).__name__}"  # a number of a million digits, or lists within themselves


def is_number(value: object) -> bool:
    """Whether it is a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_count(value: object, name: str, what: str) -> int:
    """A count of steps or epochs: an int, or a float or 0-d tensor that is whole.

    Args:
        name: of the count, for the message.
        what: names the checkpoint.

    Raises:
        InvalidInput: it is none, or not within 0 to 2**53.
    """
    number: Any = value
    if isinstance(value, Tensor) and value.dim() == 0 and _is_dense(value) and value.dtype != torch.bool:
        number = value.item()
    if is_number(number) and 0 <= number <= MOST and number == int(number):
        return int(number)
    raise InvalidInput(
        f"{what}: {name} is {told(value)}; expected a whole number from 0 to 2**53. Save the checkpoint again with one"
    )


# ---------------------------------------------------------------- optimizer


def fit_optimizer(optimizer: Any, state: Any, what: str) -> Callable[[], None]:
    """Looks whether an optimizer's state is of its kind and of its parameters, which torch does not.

    Args:
        what: names the checkpoint.

    Returns:
        A function that loads a copy of it; until it is called, the optimizer is unchanged. Options that the state
        lacks, as one of an older torch does, stay as they are.

    Raises:
        Incompatible: groups, options or shapes differ.
        InvalidInput: no state of an optimizer.
    """
    groups = _saved_groups(state, what)
    live = [dict(group) for group in optimizer.param_groups]
    sizes = [[len(group["params"]) for group in one] for one in (live, groups)]
    if sizes[0] != sizes[1]:
        message = "parameters a group differ"
        finding = Finding("C08", "error", "optimizer", message, str(sizes[0]), str(sizes[1]), _OPTIMIZER_MEND)
        raise Incompatible(f"the optimizer of {what} is of other parameters; nothing was changed", [finding])
    pairs = list(zip(live, groups, strict=True))
    kind = type(optimizer).__name__
    odd = [one for index, (mine, its) in enumerate(pairs) for one in _wrong_options(optimizer, index, mine, its)]
    if odd:
        raise Incompatible(f"the optimizer of {what} is not of the kind of this {kind}; nothing was changed", odd)
    parameters = {
        key: (parameter, mine)
        for mine, its in pairs
        for key, parameter in zip(its["params"], mine["params"], strict=True)
    }
    entries = _entries(state["state"], parameters, what)
    for key, entry in entries.items():
        odd += _missing_parts(optimizer, key, entry, parameters[key][1])
    if odd:
        raise Incompatible(f"the optimizer of {what} is not of the kind of this {kind}; nothing was changed", odd)
    for key, entry in entries.items():
        odd += _wrong_parts(key, entry, parameters[key][0])
    if odd:
        raise Incompatible(f"the optimizer of {what} is of other parameters; nothing was changed", odd)
    # torch keeps the very tensors of the state where the device agrees, and training then writes to them.
    prepared = {key: _copied(value, what) for key, value in state.items() if key not in ("state", "param_groups")}
    prepared["param_groups"] = [_merged_group(mine, its, what) for mine, its in pairs]
    prepared["state"] = {
        key: _on_device(entries[key], parameters[key][0], what) if key in entries else _copied(value, what)
        for key, value in state["state"].items()
    }
    return lambda: optimizer.load_state_dict(prepared)


def _no_optimizer(what: str, why: str) -> InvalidInput:
    return InvalidInput(f"{what} holds no state of an optimizer: {why}; {_OPTIMIZER_MEND}")


def _saved_groups(state: Any, what: str) -> list[Mapping[str, Any]]:
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise _no_optimizer(what, f"expected state and param_groups, found {told(state)}")
    if not isinstance(state["state"], Mapping):
        raise _no_optimizer(what, f"expected a mapping as state, found {told(state['state'])}")
    groups = state["param_groups"]
    if not isinstance(groups, list | tuple):
        raise _no_optimizer(what, f"expected a list as param_groups, found {told(groups)}")
    seen: set[int | str] = set()
    for index, group in enumerate(groups):
        keys = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(keys, list | tuple):
            raise _no_optimizer(what, f"expected a mapping with a list params as group {index}, found {told(group)}")
        for key in keys:
            if isinstance(key, bool) or not isinstance(key, int | str):
                raise _no_optimizer(what, f"expected numbers as params of group {index}, found {told(key)}")
            if key in seen:
                raise _no_optimizer(what, f"parameter {told(key)} is in its params twice")
            seen.add(key)
    return list(groups)


def _wrong_options(optimizer: Any, index: int, live: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Finding]:
    needed = {*getattr(optimizer, "defaults", ()), *RATES, "betas"} - {"initial_lr"}
    for name, mine in live.items():
        if name == "params":
            continue
        expected, found = "", told(given.get(name))
        if name in given:
            expected = _expected_option(name, mine, given[name])
        elif name in needed and isinstance(mine, int | float | tuple | Tensor) and not isinstance(mine, bool):
            expected, found = _wanted(name, mine), "nothing"
        if expected:
            yield _option_finding(name, index, expected, found)
    if "initial_lr" in given and "initial_lr" not in live and not _in_range("initial_lr", given["initial_lr"]):
        yield _option_finding("initial_lr", index, _wanted("initial_lr", 0.0), told(given["initial_lr"]))


def _option_finding(name: str, index: int, expected: str, found: str) -> Finding:
    return Finding("C08", "error", f"{name} of group {index}", "the options differ", expected, found, _OPTIMIZER_MEND)


def _expected_option(name: str, live: Any, given: Any) -> str:
    """What it had to be; empty where it will do."""
    if name in FLAGS and (live is None or isinstance(live, bool)):
        same = (given is None or isinstance(given, bool)) and bool(given) == bool(live)
        return "" if same else str(live)
    return "" if _is_like(name, live, given) else _wanted(name, live)


def _is_like(name: str, live: Any, given: Any) -> bool:
    if isinstance(live, bool | str):
        return isinstance(given, type(live))
    if isinstance(live, Tensor):
        return (
            isinstance(given, Tensor)
            and given.shape == live.shape
            and given.dtype == live.dtype
            and _is_dense(given)
            and all(_in_range(name, one) for one in given.flatten().tolist())
        )
    if isinstance(live, int | float):
        return _in_range(name, given)
    if isinstance(live, tuple):
        same_size = isinstance(given, list | tuple) and len(given) == len(live)
        return same_size and all(_is_like(name, *pair) for pair in zip(live, given, strict=True))
    return True  # None, and what else an optimizer of someone else may hold


def _in_range(name: str, value: Any) -> bool:
    if not is_number(value):
        return False
    return bool(0 <= value < 1) if name == "betas" else name not in RATES or bool(value >= 0)


def _wanted(name: str, live: Any) -> str:
    if isinstance(live, bool):
        return "True or False"
    if isinstance(live, str):
        return "text"
    number = "numbers from 0 to below 1" if name == "betas" else "finite numbers" + " from 0" * (name in RATES)
    if isinstance(live, Tensor):
        return f"a {live.dtype} tensor of shape {tuple(live.shape)} with {number}"
    return f"{len(live)} {number}" if isinstance(live, tuple) else f"one of the {number}"


def _entries(state: Mapping[Any, Any], parameters: Mapping[Any, Any], what: str) -> dict[int | str, Mapping[Any, Any]]:
    found: dict[int | str, Mapping[Any, Any]] = {}
    for key, entry in state.items():
        if key in parameters:
            if not isinstance(entry, Mapping):
                raise _no_optimizer(what, f"expected a mapping as state of parameter {told(key)}, found {told(entry)}")
            found[key] = entry
        elif isinstance(key, int) or (isinstance(key, str) and key.isdecimal()):
            raise _no_optimizer(what, f"it has state of parameter {told(key)}, which is in none of its groups")
    return found


def _missing_parts(optimizer: Any, key: object, entry: Mapping[Any, Any], group: Mapping[str, Any]) -> list[Finding]:
    needed: tuple[str, ...] = ()
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        needed = ("step", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group.get("amsgrad") else ()))
    elif isinstance(optimizer, torch.optim.SGD):
        needed = ("momentum_buffer",)
    if not entry or set(needed) <= set(entry):
        return []
    found = ", ".join(shown(str(name)) for name in entry)
    subject = f"parameter {told(key)}"
    return [Finding("C08", "error", subject, "its state differs", ", ".join(needed), found, _OPTIMIZER_MEND)]


def _wrong_parts(key: object, entry: Mapping[Any, Any], parameter: Tensor) -> Iterator[Finding]:
    for name, value in entry.items():
        subject = f"{shown(str(name))} of parameter {told(key)}"
        if name == "step" and not _is_step(value):
            message, expected = "it is no count of steps", "a number or 0-d float tensor, finite, from 0"
            yield Finding("C08", "error", subject, message, expected, told(value), _OPTIMIZER_MEND)
        elif name in SHAPED and not (name == "momentum_buffer" and value is None):
            if not isinstance(value, Tensor) or not _is_float_like(value, parameter):
                message, expected = "it is no tensor of floats", f"a float tensor of shape {tuple(parameter.shape)}"
                found = f"a {value.dtype} tensor" if isinstance(value, Tensor) else told(value)
                yield Finding("C08", "error", subject, message, expected, found, _OPTIMIZER_MEND)
            elif value.shape != parameter.shape:
                shapes = str(tuple(parameter.shape)), str(tuple(value.shape))
                yield Finding("C08", "error", subject, "the shapes differ", *shapes, _OPTIMIZER_MEND)


def _is_step(value: Any) -> bool:
    if isinstance(value, Tensor):
        if value.dim() or not value.is_floating_point() or not _is_dense(value):
            return False
        value = value.item()
    return is_number(value) and bool(value >= 0)


def _is_float_like(value: Tensor, parameter: Tensor) -> bool:
    return _is_dense(value) and (value.is_complex() if parameter.is_complex() else value.is_floating_point())


def _merged_group(live: Mapping[str, Any], given: Mapping[str, Any], what: str) -> dict[str, Any]:
    plain = {
        name: _copied(value, what)
        for name, value in live.items()
        if value is None or isinstance(value, bool | int | float | str | Tensor)
    }
    merged = {**plain, **{name: _copied(value, what) for name, value in given.items()}}
    merged |= {name: plain[name] for name in FLAGS if name in plain}
    tuples = [name for name, value in live.items() if isinstance(value, tuple) and name in given]
    return merged | {name: tuple(merged[name]) for name in tuples} | {"params": list(given["params"])}


def _on_device(entry: Mapping[Any, Any], parameter: Tensor, what: str) -> dict[Any, Any]:
    """A copy where torch wants it, so that memory runs out here or not at all."""
    return {name: _copied(value, what, None if name == "step" else parameter.device) for name, value in entry.items()}


# ---------------------------------------------------------------- schedule of the learning rate


def fit_scheduler(scheduler: Any, state: Any, what: str) -> Callable[[], None]:
    """Looks whether a schedule's state is of its class and of as many groups, which torch does not.

    Args:
        scheduler: any of torch's; diffusers' are such.
        what: names the checkpoint.

    Returns:
        A function that loads a copy of it; until it is called, the scheduler is unchanged. Keys that the scheduler does
        not know are kept, as torch does.

    Raises:
        Incompatible: it is of another class (the message has the missing keys), or its values are of another kind.
        InvalidInput: no state of a schedule.
    """
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise InvalidInput(
            f"{what} holds no state of a scheduler: expected a mapping of names, found {told(state)}; {_SCHEDULER_MEND}"
        )
    live = scheduler.state_dict()
    odd = [*_misfits("scheduler", "", live, state), *_hidden(scheduler, live, state)]
    if odd:
        kind = type(scheduler).__name__
        raise Incompatible(f"the scheduler of {what} does not fit this {kind}; nothing was changed", odd)
    prepared = _copied(state, what)
    for key, mine in live.items():
        if isinstance(mine, Counter):  # of milestones; a copy is a plain mapping
            prepared[key] = Counter(prepared[key])
    return lambda: scheduler.load_state_dict(prepared)


def _hidden(scheduler: Any, live: Mapping[str, Any], state: Mapping[str, Any]) -> list[Finding]:
    """Keys that would be set over the scheduler's optimizer or a method of it."""
    return [
        _scheduler_finding(shown(key), "a part of the scheduler that is no state", "", told(state[key]))
        for key in state
        if key not in live and key not in PRIVATE_FLAGS and hasattr(scheduler, key)
    ]


def _misfits(path: str, key: str, live: Any, given: Any) -> Iterator[Finding]:
    """
    Args:
        path: to the value, for messages.
        key: the nearest key above it.
    """
    if key in FUNCTIONS and given is None and not isinstance(live, list):
        return  # a function has no state, and torch passes over it
    if isinstance(live, Counter):
        if not isinstance(given, Mapping) or not all(map(_is_count, (*given.keys(), *given.values()))):
            yield _scheduler_finding(path, "it is of another kind", "a count for each milestone", told(given))
    elif isinstance(live, Mapping):
        if not isinstance(given, Mapping):
            yield _scheduler_finding(path, "it is of another kind", "a mapping", told(given))
            return
        missing = [name for name in live if name not in given and name not in PRIVATE_FLAGS]
        if missing:
            there = ", ".join(shown(str(name)) for name in given)
            yield _scheduler_finding(path, "keys are missing", ", ".join(map(str, missing)), there)
        for name in live:
            if name in given:
                yield from _misfits(f"{path}.{name}", str(name), live[name], given[name])
    elif isinstance(live, list | tuple):
        if not isinstance(given, list | tuple):
            yield _scheduler_finding(path, "it is of another kind", f"a list of {len(live)}", told(given))
        elif live and len(live) != len(given):
            yield _scheduler_finding(path, "the lengths differ", str(len(live)), str(len(given)))
        else:
            for index, (mine, its) in enumerate(zip(live, given, strict=False)):
                yield from _misfits(f"{path}[{index}]", key, mine, its)
    else:
        expected = _expected_value(path, key, live, given)
        if expected:
            yield _scheduler_finding(path, "it is of another kind", expected, told(given))


def _expected_value(path: str, key: str, live: Any, given: Any) -> str:
    """What it had to be; empty where it will do."""
    if live is None and key in FUNCTIONS:
        return "None"  # given is something else
    if isinstance(live, str):
        return "" if isinstance(given, str) and given == live else told(live)
    if key == "verbose" or not isinstance(live, int | float | Tensor):
        return ""
    if key == "last_epoch":
        # A schedule within another one that has not begun is at -1.
        low = 0 if path == "scheduler.last_epoch" else -1
        return "" if _is_count(given, low) else f"a whole number from {low} to 2**53"
    if isinstance(live, bool | Tensor):
        return "" if _is_like(key, live, given) else _wanted(key, live)
    if key in UNBOUNDED and isinstance(given, float) and abs(given) == float("inf"):
        return ""
    if key in PERIODS:
        return "" if is_number(given) and given > 0 else "a number above 0"
    return "" if is_number(given) else "a finite number"


def _is_count(value: object, low: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= MOST


def _scheduler_finding(subject: str, message: str, expected: str, found: str) -> Finding:
    return Finding("C08", "error", subject, message, expected, found, _SCHEDULER_MEND)


# ---------------------------------------------------------------- copies


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _copied(tree: Any, what: str, device: torch.device | None = None) -> Any:
    """A copy with tensors of its own.

    Args:
        device: for the tensors; None leaves each where it is.

    Raises:
        InvalidInput: something in it is neither a tensor nor plain data.
    """
    try:
        return _copy(tree, what, device)
    except RecursionError as error:
        raise InvalidInput(f"{what}: a state of optimizer or scheduler is nested too deep; save it again") from error


def _copy(tree: Any, what: str, device: torch.device | None) -> Any:
    if isinstance(tree, Tensor):
        if not _is_dense(tree):
            raise InvalidInput(
                f"{what}: a state of optimizer or scheduler holds a tensor that is sparse, quantised or on the meta "
                "device; expected a dense one. Save it again with one"
            )
        return tree.detach().to(tree.device if device is None else device, copy=True)
    if isinstance(tree, Mapping):
        return {key: _copy(value, what, device) for key, value in tree.items()}
    if isinstance(tree, list):
        return _each(tree, what, device)
    if isinstance(tree, tuple):
        return tuple(_each(tree, what, device))
    if tree is None or isinstance(
        tree,
        bool | int | float | complex | str | bytes | set | frozenset | torch.dtype | torch.device | numpy.generic,
    ):
        return tree
    raise InvalidInput(
        f"{what}: a state of optimizer or scheduler holds a {type(tree).__name__}; expected tensors and plain data. "
        "Save it again without"
    )


def _each(values: Iterable[Any], what: str, device: torch.device | None) -> list[Any]:
    return [_copy(value, what, device) for value in values]
