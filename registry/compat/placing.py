"""Where an adapter's targets are in a model: for each the module of its path, whether the sizes agree, and whether all
of them would be found under another prefix. Several rules read this, so it is worked out once a case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from registry.core.adapter_names import Target
from registry.core.model_form import ModelForm, Module

MOST_SHIFT = 3
_MOST_LAYERS = 10_000
"""Parts of a path that may stand before the names of one side alone."""
Fault = Literal["", "module", "kind", "sizes"]
Sizes = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Placed:
    """One target in the model.

    Attributes:
        path: where it was looked for.
        module: None: the model has none of this path.
        fault: `module` (there is none), `kind` (it is one that these factors are not for), `sizes`.
        wanted: (in, out) of the adapter, as far as the tensors say.
        there: (in, out) of the module, to be compared with `wanted`.
    """

    target: Target
    path: str
    module: Module | None
    fault: Fault
    wanted: Sizes = (None, None)
    there: Sizes = (None, None)


@dataclass(frozen=True, slots=True)
class Shift:
    """Another prefix, by which the targets would be found.

    Attributes:
        strip: what the adapter's names begin with, and the model's do not.
        add: the other way round.
        found: targets that are then found, in their sizes.
    """

    strip: str
    add: str
    found: int


@dataclass(frozen=True)
class Placing:
    """All targets in the model.

    Attributes:
        shift: where targets are not found as they are, the prefix by which most of them are; None: by none.
        by_family: the shift is one between a model with a head and its body, so it goes away once the model is
            loaded with the head that the adapter was trained with; targets are placed with it.
    """

    placed: tuple[Placed, ...]
    shift: Shift | None = None
    by_family: bool = False

    @property
    def matched(self) -> int:
        return sum(not one.fault for one in self.placed)

    def of_fault(self, fault: Fault) -> tuple[Placed, ...]:
        return tuple(one for one in self.placed if one.fault == fault)


def place(
    targets: Sequence[Target],
    form: ModelForm | None,
    *,
    is_version: bool,
    replication: Sequence[tuple[int, int]] = (),
) -> Placing:
    """Finds the targets of an adapter in a model.

    Args:
        replication: (first, end) of layers that PEFT puts one after the other before it wraps them.
        is_version: the model is a version, which may be loaded with another head than it was saved with.
    """
    if form is None:
        return Placing(())
    order = layer_order(replication)
    placed = tuple(_place(target, _of_layer(target.module, order), form) for target in targets)
    missing = [one.target for one in placed if one.fault == "module" and one.target.kind != "full"]
    if not missing:
        return Placing(placed)
    shift = find_shift([one.target for one in placed], form)
    prefix = f"{form.prefix}." if form.prefix else ""
    if shift is not None and is_version and prefix and (shift.strip, shift.add) in ((prefix, ""), ("", prefix)):
        shifted = tuple(_place(target, _shifted(target.module, shift), form) for target in targets)
        return Placing(shifted, shift, by_family=True)
    return Placing(placed, shift)


def layer_order(replication: Sequence[tuple[int, int]]) -> list[int]:
    """Which layer of the base each replicated layer is a copy of."""
    return [layer for first, end in replication for layer in range(first, min(end, first + _MOST_LAYERS))]


def _of_layer(path: str, order: Sequence[int]) -> str:
    """The path in the layer of which the replicated one is a copy."""
    segments = path.split(".")
    at = next((at for at, segment in enumerate(segments) if segment.isdecimal()), None)
    if at is None or len(segments[at]) > 6 or int(segments[at]) >= len(order):
        return path
    return ".".join([*segments[:at], str(order[int(segments[at])]), *segments[at + 1 :]])


def _shifted(path: str, shift: Shift) -> str:
    return shift.add + path.removeprefix(shift.strip)


def find_shift(targets: Sequence[Target], form: ModelForm) -> Shift | None:
    """The change of prefix by which the most targets are found in their sizes; None where it is not most of them."""
    asked = [target for target in targets if target.kind.partition("+")[0] not in ("full", "bias", "token")]
    if not asked:
        return None
    counts = Counter(one for target in asked[:20] for one in _shifts(target.module, form))
    best: Shift | None = None
    for (strip, add), _ in counts.most_common(10):
        one = Shift(strip, add, 0)
        fitting = [
            t for t in asked if t.module.startswith(strip) and not _place(t, _shifted(t.module, one), form).fault
        ]
        if best is None or len(fitting) > best.found:
            best = Shift(strip, add, len(fitting))
    return best if best is not None and 2 * best.found > len(asked) else None


def _shifts(path: str, form: ModelForm) -> Iterable[tuple[str, str]]:
    """Prefixes to take away and to put before, by which the model has the path."""
    parts = path.split(".")
    for count in range(min(MOST_SHIFT, len(parts) - 1) + 1):
        rest = ".".join(parts[count:])
        strip = path[: len(path) - len(rest)]
        if count and rest in form.by_path:
            yield strip, ""
        for other in form.by_end.get(".".join(parts[-2:]), ()):
            if other.endswith(f".{rest}") and other.count(".") - rest.count(".") <= MOST_SHIFT:
                add = other[: len(other) - len(rest)]
                if add != strip:
                    yield strip, add


def _place(target: Target, path: str, form: ModelForm) -> Placed:
    kind, *flags = target.kind.split("+")
    if kind == "parameter":
        return _place_parameter(target, path, form)
    module = form.by_path.get(path)
    if module is None:
        holds_others = kind == "full" and path in form.paths
        return Placed(target, path, None, "" if holds_others else "module")
    if kind in ("full", "bias", "token"):
        return _place_copy(target, path, kind, module)
    if not _is_for(kind, module):
        return Placed(target, path, module, "kind")
    wanted = (target.in_features, target.out_features)
    there: Sizes = (module.in_features, module.out_features)
    if module.kind.startswith("conv") and "grouped" in flags and not form.exact and there[0] and wanted[0]:
        # A file has the channels of one group alone, and PEFT's A takes those of all.
        there = (wanted[0] if wanted[0] % there[0] == 0 else there[0], there[1])
    turned = module.kind == "matrix" and _agree(wanted, (there[1], there[0]))
    if kind == "attention":
        # The fused projection of query, key and value has three times the width.
        there = (module.in_features, None if module.out_features is None else 3 * module.out_features)
    if _agree(wanted, there) or turned:
        return Placed(target, path, module, "", wanted, there)
    return Placed(target, path, module, "sizes", wanted, there)


def _is_for(kind: str, module: Module) -> bool:
    """Whether factors of this kind are for such a module at all."""
    if module.kind in ("other", "quantised"):
        # LoRA on what is not known here is PEFT's or a library's affair, but a LayerNorm has no factors.
        return module.kind == "quantised" or not module.type_name
    if kind in ("linear", "attention_out"):
        return module.kind in ("linear", "transformers_conv1d", "matrix")
    if kind == "embedding":
        return module.kind in ("embedding", "matrix")
    if kind == "unknown":
        return True
    return module.kind == kind


def _place_parameter(target: Target, path: str, form: ModelForm) -> Placed:
    owner, _, leaf = path.rpartition(".")
    module = form.by_path.get(owner)
    parameter = None if module is None else module.parameter(leaf)
    if module is None or parameter is None:
        # Where several parameters of one module are wrapped, which is which stands in no file.
        bare = ".".join(part for part in path.split(".") if part != "base_layer")
        module = form.by_path.get(bare)
        if module is None:
            return Placed(target, path, None, "module")
        wanted = (target.in_features, target.out_features)
        shapes = [one.shape for one in module.parameters if len(one.shape) in (2, 3)]
        fits = any(sorted(shape[-2:]) == sorted(one or 0 for one in wanted) for shape in shapes)
        return Placed(target, path, module, "" if fits or not shapes else "sizes", wanted)
    wanted = (target.in_features, target.out_features)
    sizes = parameter.shape[-2:]
    if len(sizes) < 2 or sorted(sizes) == sorted(one or 0 for one in wanted):
        return Placed(target, path, module, "", wanted)
    return Placed(target, path, module, "sizes", wanted, (sizes[1], sizes[0]))


def _place_copy(target: Target, path: str, kind: str, module: Module) -> Placed:
    wanted = (target.in_features, target.out_features)
    if kind == "token":
        # Of a weight that was only saved, out_features are its rows, and an embedding's rows are its tokens.
        columns = module.in_features if module.kind == "matrix" else module.out_features
        return Placed(target, path, module, "" if _agree(wanted, (None, columns)) else "sizes", wanted, (None, columns))
    if kind == "bias":
        bias = module.parameter("bias")
        there: Sizes = (None, bias.shape[0] if bias is not None and bias.shape else None)
        if bias is None and module.type_name:
            return Placed(target, path, module, "module")
        return Placed(target, path, module, "" if _agree((None, wanted[1]), there) else "sizes", wanted, there)
    weight = module.parameter("weight")
    if weight is None or not weight.shape or module.kind == "quantised":
        return Placed(target, path, module, "", wanted)
    there = (weight.shape[1] if len(weight.shape) > 1 else None, weight.shape[0])
    return Placed(target, path, module, "" if _agree(wanted, there) else "sizes", wanted, there)


def _agree(a: Sizes, b: Sizes) -> bool:
    return all(one is None or other is None or one == other for one, other in zip(a, b, strict=True))
