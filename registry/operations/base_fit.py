"""Whether an adapter's targets are all in a base, by names and shapes alone: what a scan of a thousand folders can ask.
It says which bases are possible; that the adapter computes the same is not its business."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from registry.core.adapter_names import Target
from registry.core.layout import Layout, TensorSpec
from registry.core.reference import shown
from registry.core.tensor_names import base_name, is_adapter_tensor

ASKED = frozenset({"linear", "conv1d", "conv2d", "conv3d", "embedding", "attention", "attention_out", "parameter"})
"""Kinds of targets that a base must have a module for. Whole copies may be of a head that the base has not."""
MOST_SHIFT = 2
"""Parts that may stand before the names of one side alone, such as `model.` or `bert.`."""


@dataclass(frozen=True)
class BaseModules:
    """The modules of one state dict.

    Attributes:
        shapes: module -> shape of its weight; empty where it is packed or has none.
        parameters: full names of tensors.
    """

    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]


def modules_of(layout: Iterable[TensorSpec]) -> BaseModules:
    """The modules of a base, also of one that an adapter is wrapped around."""
    shapes: dict[str, tuple[int, ...]] = {}
    parameters = set()
    for spec in layout:
        if is_adapter_tensor(spec.name):
            continue
        name = base_name(spec.name)
        parameters.add(name)
        module, _, leaf = name.rpartition(".")
        is_plain = spec.dtype.startswith("F") or spec.dtype == "BF16"  # else it is quantised, and packed somehow
        if leaf in ("weight", "in_proj_weight") and is_plain:
            shapes[module] = spec.shape
        else:
            shapes.setdefault(module, ())
    return BaseModules(shapes, frozenset(parameters))


def live_modules(layout: Layout, names: Mapping[str, Any]) -> BaseModules:
    """The modules under the names that they have once a library loaded them.

    Args:
        names: the map of this component, as it stands in a document of live names.
    """
    renamed = names["renamed"]
    gone = {name for one in names["converted"] for group in one["saved"] for name in group}
    kept = [
        TensorSpec(renamed.get(spec.name, spec.name), spec.dtype, spec.shape)
        for spec in layout
        if spec.name not in gone
    ]
    made = [TensorSpec(name, "F32", tuple(shape)) for one in names["converted"] for name, shape in one["live"]]
    return modules_of([*kept, *made])


def live_names_by_component(document: bytes) -> dict[str, Mapping[str, Any]]:
    """A document of live names as plain data."""
    found: dict[str, Mapping[str, Any]] = json.loads(document)["components"]
    return found


def asked_targets(targets: Sequence[Target]) -> tuple[Target, ...]:
    """Those targets that a base can be held against."""
    return tuple(target for target in targets if target.kind.partition("+")[0] in ASKED)


def misfit(targets: Sequence[Target], base: BaseModules) -> str | None:
    """What first keeps an adapter from a base; None: all its targets are there, in their sizes.

    Args:
        targets: `asked_targets`, at least one.
    """
    first = targets[0].module
    found: str | None = None
    for strip, add in _shifts(first, base):
        found = next((why for target in targets if (why := _misfit(target, base, strip, add)) is not None), None)
        if found is None:
            return None
    return found or f"it has no module {shown(first, 120)}"


def _shifts(module: str, base: BaseModules) -> Iterable[tuple[str, str]]:
    """Prefixes to take from the targets' names and to put before them, by which the module is in the base."""
    known = base.shapes.keys() | base.parameters
    if module in known:
        yield "", ""
    parts = module.split(".")
    for count in range(1, min(MOST_SHIFT, len(parts) - 1) + 1):
        if ".".join(parts[count:]) in known:
            yield ".".join(parts[:count]) + ".", ""
    for name in sorted(name for name in known if name.endswith(f".{module}")):
        if name.count(".") - module.count(".") <= MOST_SHIFT:
            yield "", name[: -len(module)]


def _misfit(target: Target, base: BaseModules, strip: str, add: str) -> str | None:
    module = add + target.module.removeprefix(strip)
    kind, *flags = target.kind.split("+")
    if kind == "parameter":
        # Where several parameters of one module are wrapped, which is which stands in no file.
        owner = ".".join(part for part in module.split(".") if part != "base_layer")
        known = owner in base.parameters or owner in base.shapes
        known = known or any(name.startswith(f"{owner}.") for name in base.parameters)
        return None if known else f"it has no parameter {shown(owner, 120)}"
    if module not in base.shapes:
        return f"it has no module {shown(module, 120)}"
    shape = base.shapes[module]
    wanted = (target.out_features, target.in_features)
    if len(shape) < 2 or None in wanted or "grouped" in flags:
        return None
    sizes = (shape[0], shape[1])
    turned = kind in ("linear", "embedding") and (sizes[1], sizes[0]) == wanted
    if sizes == wanted or turned:
        return None
    return f"{shown(module, 120)} has (out, in) {sizes}, and the adapter is for {wanted}"
