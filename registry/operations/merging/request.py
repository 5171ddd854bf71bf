"""What is asked of a merge, checked before anything is read: method, parameters, weights. All of it that decides about
the result stands in the recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from typing import Any

from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.merge.methods import DENSE, INNER, MAJORITIES, METHODS, OPTIONS, unknown

DTYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
"""What an adapter can be rounded to, as users write it -> safetensors code."""
SAVED = ("drop", "mean")
MAX_SEED = 2**53 - 1


@dataclass(frozen=True)
class MergeRequest:
    """A checked request.

    Attributes:
        method: one of `METHODS`.
        rank, energy: how the result is cut; see `merge.compress.RankChoice`.
        options: parameters that the method reads, by name.
        module_weights: (glob over module paths, weight of each source in the order that they are given); the last one
            that matches counts.
        saved: what becomes of whole copies that not all sources share: None: ask; `drop`, `mean`, or the reference of
            a source.
        dtype: safetensors code of the result; None: the widest of the sources.
        precise: float64.
        attention_out: how often the update of a MultiheadAttention's out_proj counts in a base; None: ask.
        force: go on where the base contains a source already, or a source does not fit.
    """

    method: str = "cat"
    rank: int | None = None
    energy: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    module_weights: tuple[tuple[str, tuple[float, ...]], ...] = ()
    saved: str | None = None
    dtype: str | None = None
    precise: bool = False
    device: str = "cpu"
    attention_out: int | None = None
    force: bool = False

    def weights_of(self, path: str, weights: Sequence[float]) -> tuple[float, ...]:
        """Weight of each source in one module."""
        for pattern, given in reversed(self.module_weights):
            if re.fullmatch(translate(pattern), path):
                return given
        return tuple(weights)


def check_merge(
    *,
    method: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority: str | None = None,
    inner: str | None = None,
    seed: int | None = None,
    module_weights: Mapping[str, Sequence[float]] | None = None,
    saved: str | None = None,
    dtype: str | None = None,
    precise: bool = False,
    device: str = "cpu",
    attention_out: int | None = None,
    force: bool = False,
    into_base: bool = False,
) -> MergeRequest:
    """Checks all that can be checked before a version is looked at.

    Raises:
        InvalidInput: an unknown method, a parameter out of its range, or one that the method does not read.
    """
    if method not in METHODS:
        raise unknown(method)
    known = OPTIONS[method]
    inner = inner or ("ties" if "inner" in known else None)
    given = {"density": density, "majority": majority, "inner": inner, "seed": seed}
    reads = set(known)
    if inner is not None and "inner" in known:
        reads -= {"majority"} if inner not in ("ties", "dare_ties") else set()
        reads -= {"seed"} if not inner.startswith("dare") else set()
    for name, value in given.items():
        if value is not None and name not in reads:
            using = [other for other, options in OPTIONS.items() if name in options]
            raise InvalidInput(f"the method {method} takes no {name}; {', '.join(using)} do")
    options: dict[str, Any] = {}
    if "density" in reads:
        options["density"] = _density(density, method)
    if "majority" in reads:
        options["majority"] = _one_of("majority", majority or "total", MAJORITIES)
    if inner is not None:
        options["inner"] = _one_of("inner", inner, INNER)
    if "seed" in reads:
        options["seed"] = _seed(seed)
    _check_rank(method, rank, energy, into_base)
    weights = []
    for pattern, numbers in (module_weights or {}).items():
        weights.append((pattern, tuple(finite_weight(one, f"the modules {pattern}") for one in numbers)))
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput(f"dtype '{shown(dtype)}'; expected one of {', '.join(DTYPES)}")
    if dtype is not None and into_base:
        raise InvalidInput("a merge into a base has the dtypes of that base; leave dtype out")
    if attention_out not in (None, 1, 2):
        raise InvalidInput(f"attention_out is {attention_out!r}; expected 1, or 2 as PEFT up to 0.21 computes")
    check_device_name(device)
    return MergeRequest(
        method,
        rank,
        energy,
        options,
        tuple(weights),
        saved,
        None if dtype is None else DTYPES[dtype],
        precise,
        device,
        attention_out,
        force,
    )


def finite_weight(value: object, what: str) -> float:
    """
    Raises:
        InvalidInput: no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidInput(f"the weight of {shown(what, 200)} is {shown(repr(value))}; expected a finite number")
    return float(value)


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The weight of each source; 1 each where none are given.

    Raises:
        InvalidInput: another number of weights than of sources, or one that is no finite number.
    """
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise InvalidInput(f"{len(weights)} weights for {count} sources; give one for each, in their order")
    return tuple(finite_weight(one, f"source {place + 1}") for place, one in enumerate(weights))


def check_device_name(device: str) -> None:
    """
    Raises:
        InvalidInput: no device is called so.
    """
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        raise InvalidInput(f"device '{shown(str(device))}'; expected cpu, cuda or cuda:N")


def check_device(device: str) -> None:
    """
    Raises:
        InvalidInput: no device is called so, or this machine has it not.
    """
    check_device_name(device)
    if device == "cpu":
        return
    import torch

    number = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise InvalidInput(f"device {device}: torch sees {count} CUDA devices here; leave it out to compute on the CPU")


def _density(density: float | None, method: str) -> float:
    if density is None:
        raise InvalidInput(f"the method {method} needs a density: the share of elements that is kept, for instance 0.5")
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise InvalidInput(f"density is {shown(repr(density))}; expected more than 0 and at most 1")
    return float(density)


def _one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise InvalidInput(f"{name} is '{shown(str(value))}'; expected one of {', '.join(allowed)}")
    return value


def _seed(seed: int | None) -> int:
    if seed is None:
        return 0
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InvalidInput(f"seed is {shown(repr(seed))}; expected a whole number from 0 to 2**53 - 1")
    return seed


def _check_rank(method: str, rank: int | None, energy: float | None, into_base: bool) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise InvalidInput(f"rank is {shown(repr(rank))}; expected a whole number from 1 on")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1):
        raise InvalidInput(f"energy is {shown(repr(energy))}; expected more than 0 and at most 1")
    if into_base and (rank is not None or energy is not None):
        raise InvalidInput("a merge into a base is not cut to a rank; leave rank and energy out")
    if into_base or rank is not None or energy is not None:
        if method == "cat" and not into_base:
            raise InvalidInput("cat keeps every rank; give --method svd to cut the sum to a rank")
        return
    if method == "svd" or method in DENSE:
        raise InvalidInput(f"the method {method} needs a rank, or an energy: the share of the squared norm to keep")
