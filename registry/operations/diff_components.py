"""Two components of one role against each other, as far as the catalog tells: tensors by digest, and the modules of two
LoRAs by factors, rank and scaling. Names are compared in their canonical form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from registry.catalog.contents import StoredComponent
from registry.core.adapter_config import AdapterConfig
from registry.core.adapter_names import canonical_name
from registry.core.layout import Layout, TensorSpec
from registry.core.tensor_names import split_at_tuner, without_layers
from registry.merge.lora_modules import LoraModule, lora_modules
from registry.operations.difference import (
    Change,
    ComponentDifference,
    ModuleDifference,
    ModuleSide,
    TensorDifference,
)

T = TypeVar("T")
D = TypeVar("D", TensorDifference, ModuleDifference)
Pair = tuple[LoraModule | None, LoraModule | None]
_ORDER: dict[Change, int] = {"changed": 0, "removed": 1, "added": 2}
_FLOATS = ("F16", "BF16", "F32", "F64", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_COUNTED = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")


def changes(a: Mapping[str, T], b: Mapping[str, T]) -> Iterator[tuple[str, Change, T | None, T | None]]:
    """What differs between two mappings, in the order of the first and then of the second."""
    for key, value in a.items():
        if key not in b:
            yield key, "removed", value, None
        elif b[key] != value:
            yield key, "changed", value, b[key]
    yield from ((key, "added", None, value) for key, value in b.items() if key not in a)


def compare(
    one: StoredComponent, two: StoredComponent, config_a: AdapterConfig | None, config_b: AdapterConfig | None
) -> tuple[ComponentDifference, dict[str, Pair]]:
    """What differs, and the two adapters' modules by path, for those that differ.

    Args:
        config_a: of the first version, if it is an adapter and its configuration is known.
    """
    modules: dict[str, Pair] = {}
    listed: list[ModuleDifference] = []
    same_modules = 0
    # Beside a LoRA, another tuner may change the same modules, in a way that is not known.
    if one.role == "adapter" and all(config is None or config.peft_type == "LORA" for config in (config_a, config_b)):
        mine, others = lora_modules(one.layout, config_a), lora_modules(two.layout, config_b)
        pairs = {path: (mine.get(path), others.get(path)) for path in {**mine, **others}}
        modules = {path: pair for path, pair in pairs.items() if _differs(pair, one, two)}
        touched = (_touched(one.layout, mine), _touched(two.layout, others))
        listed = [_module(path, pair, (one.layout, two.layout), touched) for path, pair in modules.items()]
        same_modules = len(pairs) - len(modules)
    factor_of = [
        {name: module.module for module in listed if not module.note for name in _factors(modules[module.module][side])}
        for side in (0, 1)
    ]
    specs_a, specs_b = _by_name(one.layout), _by_name(two.layout)
    digests = [
        {name: component.tensors[component.layout.position[spec.name]] for name, spec in specs.items()}
        for component, specs in ((one, specs_a), (two, specs_b))
    ]
    tensors = [
        _tensor(name, change, specs_a.get(name), specs_b.get(name), factor_of)
        for name, change, _, _ in changes(*digests)
    ]
    difference = ComponentDifference(
        one.role,
        "changed" if tensors or listed else None,
        len(one.layout),
        len(two.layout),
        len(one.layout) - sum(tensor.a is not None for tensor in tensors),
        largest_first(tensors),
        largest_first(listed),
        same_modules,
    )
    return difference, modules


def largest_first(differences: Iterable[D]) -> tuple[D, ...]:
    """Changed ones before removed and added ones; the largest relative change first, before it what has no such number
    or NaN."""

    def key(one: D) -> tuple[int, float, str]:
        relative = math.inf if one.relative is None or math.isnan(one.relative) else one.relative
        return _ORDER[one.change], -relative, one.name if isinstance(one, TensorDifference) else one.module

    return tuple(sorted(differences, key=key))


def _by_name(layout: Layout) -> dict[str, TensorSpec]:
    """Tensors by canonical name; those that share one, as of two adapters in one model, keep the names they have."""
    names = [canonical_name(spec.name) for spec in layout]
    often = Counter(names)
    return {name if often[name] == 1 else spec.name: spec for name, spec in zip(names, layout, strict=True)}


# ---------------------------------------------------------------- tensors


def _tensor(
    name: str, change: Change, a: TensorSpec | None, b: TensorSpec | None, factor_of: list[dict[str, str]]
) -> TensorDifference:
    module = ""
    for spec, of in zip((a, b), factor_of, strict=True):
        if spec is not None:
            module = module or of.get(spec.name, "")
    note = "" if a is None or b is None else _not_measured(a, b)
    return TensorDifference(name, change, a, b, module=module, note=note)


def is_counted(spec: TensorSpec) -> bool:
    """Whether tensors of this dtype are compared element by element, and not by norms."""
    return spec.dtype in _COUNTED


def _not_measured(a: TensorSpec, b: TensorSpec) -> str:
    """Why numbers cannot tell how far two tensors are apart; empty where they can."""
    if a.shape != b.shape:
        return "the shapes differ"
    for spec in (a, b):
        if spec.dtype not in (*_FLOATS, *_COUNTED, "C64"):
            return f"torch does not compute with {spec.dtype}"
    if a.dtype != b.dtype and not (a.dtype in _FLOATS and b.dtype in _FLOATS):
        return "the dtypes differ"
    return ""


# ---------------------------------------------------------------- modules


def _factors(module: LoraModule | None) -> tuple[str, ...]:
    return () if module is None else (module.a, module.b)


def _differs(pair: Pair, one: StoredComponent, two: StoredComponent) -> bool:
    a, b = pair
    if a is None or b is None:
        return True
    digests = [
        {canonical_name(name): component.tensors[component.layout.position[name]] for name in module.tensors}
        for module, component in ((a, one), (b, two))
    ]
    return _side(a) != _side(b) or a.obstacle != b.obstacle or digests[0] != digests[1]


def _touched(layout: Layout, modules: Mapping[str, LoraModule]) -> set[str]:
    """Paths of the modules whose weights an adapter's tensors say something of, in whatever way."""
    found = set(modules)
    factors = {name for module in modules.values() for name in module.tensors}
    for spec in (spec for spec in layout if spec.name not in factors):
        name = canonical_name(spec.name)
        split = split_at_tuner(name)
        path, _, leaf = name.rpartition(".")
        if split is not None or leaf != "bias":
            found.add(".".join(without_layers((split[0] if split is not None else path).split("."))))
    return found


def _module(
    path: str, pair: Pair, layouts: tuple[Layout, Layout], touched: tuple[set[str], set[str]]
) -> ModuleDifference:
    a, b = pair
    change: Change = "removed" if b is None else "added" if a is None else "changed"
    note = (a.obstacle if a is not None else "") or (b.obstacle if b is not None else "")
    sizes = {_sizes(module, layout) for module, layout in zip(pair, layouts, strict=True) if module is not None}
    dtypes = {
        layout.by_name[name].dtype for module, layout in zip(pair, layouts, strict=True) for name in _factors(module)
    }
    if not note and len(sizes) > 1:
        note = f"the modules differ: {' and '.join(sorted(sizes))}"
    if not note and not dtypes <= set(_FLOATS):
        note = f"the factors are no floats: {', '.join(sorted(dtypes))}"
    owner = path.rpartition(".")[0] if any(size.startswith("parameter") for size in sizes) else path
    if not note and change != "changed" and {path, owner} & touched[0 if a is None else 1]:
        note = "the other adapter changes it too, and not by a pair of factors"
    return ModuleDifference(path, change, _side(a), _side(b), note=note)


def _side(module: LoraModule | None) -> ModuleSide | None:
    return None if module is None else ModuleSide(module.target.kind, module.target.rank, module.scaling)


def _sizes(module: LoraModule, layout: Layout) -> str:
    """Kind and sizes of the weight that is changed, where B is one by one in space."""
    a, b = layout.by_name[module.a].shape, layout.by_name[module.b].shape
    times = f"{module.blocks} x " if module.blocks > 1 else ""
    return f"{module.target.kind.partition('+')[0]} {times}{b[0]} x {' x '.join(map(str, a[1:]))}"
