"""Proving that a model computes what another one did: a probe's inputs are run again, and what comes out is held
against what is recorded. Differences are relative to what an output's values typically are, so that one number allows
or refuses for any model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from registry.core.errors import ForwardFailed, Incompatible
from registry.core.findings import Finding
from registry.core.reference import shown
from registry.formats.live import find_adapted
from registry.formats.probe import Probe
from registry.formats.probe_tree import LeftOut, Sample, leaves, with_tensors
from registry.formats.quiet_run import device_of, dtypes_of, refuse_unrunnable, run

EXACT = 5e-5
"""Allowed on one class of device, at the least. float32 against float64, about as far apart as two processors come,
differs by 6e-6 for MiniLM and 3e-6 for an untrained Llama of 48 layers; a LoRA with 0.001 in B changes MiniLM by 2%."""
OTHER_DEVICE = 5e-3
"""Allowed between classes of devices, at the least: a GPU may multiply float32 with the ten bits of TF32. 17
convolutions on a CPU and an H100 differ by 4e-4."""
LIKE = 8.0
UNLIKE = 20.0
"""Allowed in units of the last place of the coarsest dtype, on one class of device in one dtype, and else. A float32
MiniLM differs as bfloat16 by 4.8 of them, as float16 by 6.3; a Llama of 24 layers by 6.1 and 5.6; 12 linear layers
with GELU and norm by up to 12.3, and by 6.4 in one dtype on a CPU and an H100."""
TINY = 1e-6
"""The least size of an output: what is zero but for rounding is compared with this."""
MASK = 1000.0
"""Values beyond this many times the lower quartile say nothing of the typical one: masks, padding."""
CODE = "C28"
_MEND = "is this the base that it was pushed with, with the same dtype, configuration and library versions?"


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How far one output is from the recorded one.

    Attributes:
        output: its path, such as `outputs.logits`.
        absolute: the largest difference of two values; infinite where one of them is NaN or infinite alone.
        relative: the largest one, divided by the recorded value's size plus the output's typical size (root mean
            square).
    """

    output: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class Proof:
    """What a model gives for a probe's inputs, against what was recorded. True where no difference is too large.

    Attributes:
        differences: of every output that was compared.
        allowed: the largest relative difference that counts as the same function. 5e-5 on one class of device, 5e-3
            between two; and not less than 8 (20, where the main dtype or the class of device is another) units in the
            last place of the coarsest floating-point dtype of the two models and their outputs.
        left_out: outputs that were not compared, with the reason.
    """

    differences: tuple[OutputDifference, ...]
    allowed: float
    left_out: tuple[str, ...] = ()

    @property
    def worst(self) -> OutputDifference:
        """The difference that decides: the largest relative one."""
        return max(self.differences, key=lambda one: one.relative)

    @property
    def difference(self) -> float:
        """The largest absolute difference."""
        return max(one.absolute for one in self.differences)

    @property
    def output(self) -> str:
        """Where the largest absolute difference is."""
        return max(self.differences, key=lambda one: one.absolute).output

    def __bool__(self) -> bool:
        return self.worst.relative <= self.allowed

    def require(self, what: str) -> None:
        """
        Raises:
            Incompatible: the outputs differ by more than is allowed.
        """
        if self:
            return
        findings = [
            Finding(
                *(CODE, "error", shown(one.output), "the model computes something else"),
                f"a relative difference of at most {self.allowed:.1g}",
                f"{one.relative:.3g} ({one.absolute:.3g} in all)",
                _MEND,
            )
            for one in self.differences
            if not one.relative <= self.allowed
        ]
        raise Incompatible(f"{what}: the function is not the one that was pushed", findings)


def prove(model: nn.Module, probe: Probe, what: str = "the probe") -> Proof:
    """Runs a probe's inputs on a model, which is left as it was.

    Inputs are moved to the model's device, and those of the recorded model's main dtype are cast to this model's.

    Args:
        what: names the version in errors.

    Raises:
        InvalidInput: the model cannot be called without harm (see `quiet_run.refuse_unrunnable`).
        Incompatible: it does not take the inputs, or returns something of another structure.
    """
    adapted = find_adapted(model) if probe.subject == "adapted" else None
    called = model if adapted is None else adapted
    refuse_unrunnable(called)
    main, coarsest = dtypes_of(called)
    recorded = _dtype(probe.dtype)

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if main is None or tensor.dtype != recorded else tensor.to(main)

    args, kwargs = with_tensors((probe.args, dict(probe.kwargs)), cast)
    try:
        found = run(called, args, kwargs)
    except ForwardFailed as error:
        finding = Finding(CODE, "error", "", "the model does not take the probe's inputs", "outputs", str(error), _MEND)
        raise Incompatible(f"{what}: the model is not the one that was pushed", [finding]) from error
    same_device, same_dtype = device_of(called).type == probe.device, recorded == main
    compared = compare(probe.outputs, found, whole_numbers=same_device and same_dtype)
    if compared.findings:
        raise Incompatible(f"{what}: the model returns something else than the one that was pushed", compared.findings)
    dtypes = {_dtype(probe.coarsest), coarsest, *_float_dtypes(probe.outputs), *_float_dtypes(found)}
    limit = allowed(dtypes, same_device=same_device, same_dtype=same_dtype)
    return Proof(tuple(compared.differences), limit, tuple(compared.left_out))


def allowed(dtypes: Iterable[torch.dtype | None], *, same_device: bool, same_dtype: bool) -> float:
    """The largest relative difference that counts as the same function; see `Proof.allowed`."""
    coarsest = max((torch.finfo(dtype).eps for dtype in dtypes if dtype is not None), default=0.0)
    return max(EXACT if same_device else OTHER_DEVICE, coarsest * (LIKE if same_device and same_dtype else UNLIKE))


def _dtype(name: str | None) -> torch.dtype | None:
    found = None if name is None else getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def _float_dtypes(tree: Any) -> Iterator[torch.dtype]:
    for _, leaf in leaves(tree, ""):
        tensor = leaf.values if isinstance(leaf, Sample) else leaf
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            yield tensor.dtype


# ---------------------------------------------------------------- outputs against outputs


@dataclass(frozen=True)
class Comparison:
    """Two trees of outputs, value by value.

    Attributes:
        findings: where their structure, a shape, or a value that is no number differs.
        left_out: what was not compared, with the reason.
    """

    differences: list[OutputDifference]
    findings: list[Finding]
    left_out: list[str]


def compare(expected: Any, found: Any, *, whole_numbers: bool = True) -> Comparison:
    """Compares two plain trees.

    Args:
        whole_numbers: whether tensors of whole numbers count. An index of the largest value may be another one as soon
            as values are rounded otherwise.
    """
    comparison = Comparison([], [], [])
    _compare(expected, found, "outputs", comparison, whole_numbers)
    return comparison


def _compare(expected: Any, found: Any, path: str, into: Comparison, whole_numbers: bool) -> None:
    if isinstance(expected, LeftOut):
        into.left_out.append(f"{path}: a {expected.kind} is not kept")
    elif _form(expected) != _form(found):
        message = "the output is of another form"
        into.findings.append(Finding(CODE, "error", shown(path), message, _form(expected), _form(found), _MEND))
    elif isinstance(expected, dict):
        for key, one in expected.items():
            if key in found:
                _compare(one, found[key], f"{path}.{key}", into, whole_numbers)
            else:
                names = shown(", ".join(found)) or "none"
                into.findings.append(
                    Finding(CODE, "error", shown(f"{path}.{key}"), "the output is missing", key, names, _MEND)
                )
        into.left_out.extend(f"{path}.{key}: was not recorded" for key in found if key not in expected)
    elif isinstance(expected, tuple | list):
        for place, (one, other) in enumerate(zip(expected, found, strict=True)):
            _compare(one, other, f"{path}.{place}", into, whole_numbers)
    elif isinstance(expected, Sample):
        _compare(expected.values, found.values, path, into, whole_numbers)
    elif isinstance(expected, torch.Tensor):
        if whole_numbers or expected.is_floating_point() or expected.is_complex():
            into.differences.append(_difference(path, expected, found))
        else:
            into.left_out.append(f"{path}: whole numbers, on another device or in another dtype")
    elif isinstance(expected, float):
        values = (torch.tensor([one], dtype=torch.float64) for one in (expected, found))
        into.differences.append(_difference(path, *values))
    elif expected != found:
        message = "the output differs"
        into.findings.append(Finding(CODE, "error", shown(path), message, _short(expected), _short(found), _MEND))


def _form(value: Any) -> str:
    """What two outputs must have in common to be compared."""
    if isinstance(value, torch.Tensor):
        kind = "complex" if value.is_complex() else "floating-point" if value.is_floating_point() else "whole"
        return f"a {kind} tensor of shape {list(value.shape)}"
    if isinstance(value, Sample):
        return f"{_form(value.values)} of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, LeftOut):
        return f"a {shown(value.kind)}"
    return f"a {type(value).__name__}"


def _difference(path: str, expected: torch.Tensor, found: torch.Tensor) -> OutputDifference:
    was, now = _flat(expected), _flat(found)
    same = (was == now) | (was.isnan() & now.isnan())
    if bool(same.all()):
        return OutputDifference(path, 0.0, 0.0)
    apart = torch.where(same, 0.0, (was - now).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    size = was.abs().nan_to_num(nan=0.0, posinf=0.0) + max(_typical(was), TINY)
    return OutputDifference(path, float(apart.max()), float((apart / size).max()))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.to(torch.float64).flatten()


def _typical(values: torch.Tensor) -> float:
    """Root mean square of what is neither zero nor far beyond the lower quartile."""
    sizes = values[values.isfinite() & (values != 0)].abs()
    if not len(sizes):
        return 0.0
    quartile = sizes.kthvalue(1 + (len(sizes) - 1) // 4).values
    return float(sizes[sizes <= MASK * quartile].square().mean().sqrt())


def _short(value: object) -> str:
    return shown(repr(value))
