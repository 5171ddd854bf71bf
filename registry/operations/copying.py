"""Copying tensors into a live module's own memory, all or nothing: every difference is found before the first byte is
copied, and afterwards every tensor is compared with what was copied."""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from registry.core.errors import Incompatible
from registry.core.findings import Finding
from registry.formats.live import flat_bytes, not_plain

if TYPE_CHECKING:
    import torch
    from torch import nn

LENIENT = frozenset(("C04", "C05", "C06", "C08", "C13", "C14", "C26", "C29"))
"""What `strict=False` lets pass: unexpected, missing and misshapen tensors, another base or other arguments of it."""


def copy_into(
    module: nn.Module,
    targets: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    strict: bool,
    what: str,
    findings: Iterable[Finding] = (),
) -> None:
    """Copies tensors into a module's own, all or nothing, and proves that each took effect.

    Args:
        targets: aliases of the module's parameters and buffers, under the names of `tensors`.
        strict: refuse every difference; otherwise warn, and copy what fits.
        findings: what the caller found already.

    Raises:
        Incompatible: with all differences; the module is unchanged.
    """
    import torch

    found = [*findings, *differences(targets, tensors), *_unwritable(module, targets, tensors)]
    skipped = settle(found, strict=strict, what=f"{what} does not fit this {type(module).__name__}")
    wanted = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    with torch.no_grad():
        for name, tensor in wanted.items():
            # Cast here and not by the device, which may round a NaN to other bits than the CPU that compares them.
            targets[name].copy_(tensor.to(targets[name].dtype))
    wrong = [name for name, tensor in wanted.items() if not same_values(targets[name], tensor)]
    if wrong:
        raise Incompatible(
            f"{what} was copied, but {len(wrong)} tensors of the model do not hold its values, {wrong[0]} first; "
            "the model is in no defined state: build it again"
        )


def settle(findings: Iterable[Finding], *, strict: bool, what: str, lenient: frozenset[str] = LENIENT) -> set[str]:
    """Refuses or warns.

    Args:
        lenient: codes of errors that `strict=False` lets pass.

    Returns:
        Subjects of the errors that were let pass.

    Raises:
        Incompatible: with all errors.
    """
    noticed = [finding for finding in findings if finding.severity != "info"]
    errors = [finding for finding in noticed if finding.severity == "error"]
    if any(strict or finding.code not in LENIENT for finding in errors):
        raise Incompatible(f"{what}; nothing was changed", errors)
    for finding in noticed:
        warnings.warn(str(finding), stacklevel=_callers_level())
    return {finding.subject for finding in errors}


def _callers_level() -> int:
    """`stacklevel` of whoever called this package, for a warning of the function that asks."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("registry."):
        level, frame = level + 1, frame.f_back
    return level


def differences(targets: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[Finding]:
    """Every name, shape and kind of number in which a version and a model differ."""
    import torch

    found = []
    for name, tensor in tensors.items():
        if name not in targets:
            shape = str(tuple(tensor.shape))
            found.append(Finding("C05", "error", name, "the model has no place for this tensor", "none", shape))
    held = {_view(targets[name]) for name in tensors if isinstance(targets.get(name), torch.Tensor)}
    for name, target in targets.items():
        tensor_there = tensors.get(name)
        if not isinstance(target, torch.Tensor):
            kind = f"a {type(target).__name__}"
            found.append(Finding("C06", "error", name, "the model keeps what is no tensor, and no version holds", kind))
        elif tensor_there is None:
            # Of tied tensors one is enough: transformers saves no more.
            if _view(target) not in held:
                found.append(Finding("C06", "error", name, "the version lacks this tensor", str(tuple(target.shape))))
        elif tensor_there.shape != target.shape:
            expected, actual = str(tuple(target.shape)), str(tuple(tensor_there.shape))
            found.append(Finding("C08", "error", name, "the shapes differ", expected, actual))
        elif loss := _loss(tensor_there, target.dtype):
            found.append(Finding("C21", "error", name, loss, str(target.dtype), str(tensor_there.dtype)))
    return found


def _loss(tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
    """What a cast would take from a tensor beside precision."""
    import torch

    if tensor.dtype == dtype:
        return None
    packed = torch.float4_e2m1fn_x2 if hasattr(torch, "float4_e2m1fn_x2") else None
    if packed in (tensor.dtype, dtype):
        return "there is no conversion to or from packed 4-bit floats"
    if tensor.is_complex() and not dtype.is_complex:
        return "the imaginary part would be cut"
    if tensor.is_floating_point() or tensor.is_complex():
        if not (dtype.is_floating_point or dtype.is_complex):
            return "floating point would be cut"
        largest = torch.finfo(dtype).max
        if largest < torch.finfo(tensor.dtype).max:
            size = (tensor if tensor.itemsize > 2 else tensor.float()).abs()
            if bool(((size > largest) & ~size.isinf()).any()):
                return f"values over {largest:g}, the largest that fits, would be cut"
        return None
    back = tensor.to(dtype).to(tensor.dtype)
    return None if same_values(back, tensor) else "whole numbers would change"


def _unwritable(module: nn.Module, targets: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[Finding]:
    """Tensors that a copy would not reach, and tied ones that cannot hold two values."""
    import torch

    own = memory_of(module)
    found: list[Finding] = []
    sharing: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        target = targets.get(name)
        if not isinstance(target, torch.Tensor) or target.shape != tensor.shape or not target.numel():
            continue
        if odd := not_plain(target):
            found.append(Finding("C21", "error", name, "the model has no memory of its own for it", "a tensor", odd[0]))
        elif memory(target) not in own:
            found.append(Finding("C21", "error", name, "the model computes it, so it cannot be set"))
        elif target.is_inference() and not torch.is_inference_mode_enabled():
            message = "the model was made in inference mode, where tensors cannot be changed afterwards"
            found.append(Finding("C21", "error", name, message, mend="build it under torch.no_grad() instead"))
        elif any(stride == 0 and size > 1 for stride, size in zip(target.stride(), target.shape, strict=True)):
            found.append(Finding("C21", "error", name, "its elements share memory", mend="clone() it first"))
        else:
            sharing[memory(target)].append(name)
    for names in sharing.values():
        found += _ties(names, targets, tensors)
    return found


def memory_of(module: nn.Module) -> set[Any]:
    """The memory of a module's parameters and buffers."""
    return {memory(tensor) for tensor in (*module.parameters(), *module.buffers()) if not_plain(tensor) is None}


def memory(tensor: torch.Tensor) -> Any:
    """Equal for tensors that share their storage."""
    return (tensor.device, tensor.untyped_storage().data_ptr())


def _view(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the very same elements."""
    if not_plain(tensor) or not tensor.numel():
        return id(tensor)
    return (memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def _ties(names: Sequence[str], targets: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[Finding]:
    """C16: of names that share memory, those that would overwrite another with other values."""
    import torch

    first: dict[Any, str] = {}
    found = []
    for name in names:
        target = targets[name]
        other = first.setdefault(_view(target), name)
        if other != name and not same_values(tensors[name].to(target.dtype), tensors[other]):
            found.append(_tied(name, other))
    views = list(first.values())
    if _overlap([targets[name] for name in views]):
        # Transposed or shifted views of one another: tried on a copy of their memory.
        storage = targets[views[0]].untyped_storage().clone()
        copies = {name: _view_of(storage, targets[name]) for name in views}
        with torch.no_grad():
            for name, one in copies.items():
                one.copy_(tensors[name].to(one.dtype))
        found += [
            _tied(name, views[-1] if name != views[-1] else views[0])
            for name, one in copies.items()
            if not same_values(one, tensors[name])
        ]
    return found


def _tied(name: str, other: str) -> Finding:
    message = "the model ties it to another tensor, and the version holds other values there"
    return Finding("C16", "error", name, message, f"the values of {other}", "others", "untie them in the model")


def _overlap(views: Sequence[torch.Tensor]) -> bool:
    """Whether the stretches of memory from the first to the last element of each meet."""
    stretches = []
    for view in views:
        last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
        begin = view.storage_offset() * view.itemsize
        stretches.append((begin, begin + (last + 1) * view.itemsize))
    stretches.sort()
    return any(after[0] < before[1] for before, after in pairwise(stretches))


def _view_of(storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    import torch

    empty = torch.empty(0, dtype=like.dtype, device=like.device)
    return empty.set_(storage, like.storage_offset(), like.shape, like.stride())


def same_values(here: torch.Tensor, there: torch.Tensor) -> bool:
    """Whether `here` holds `there`, cast to its dtype, bit for bit."""
    import torch

    return torch.equal(flat_bytes(here), flat_bytes(there.to(here.dtype)))
