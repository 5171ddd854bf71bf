"""The form of a model in memory: its modules as rows, with their sizes and parameters. It may be on the meta device; of
weights only shapes and places are looked at. What PEFT and torch wrap around a module counts as what is wrapped, so a
model has one form before and after an adapter is put on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from registry.core.errors import InvalidInput
from registry.core.layout import NOT_IN_A_NAME
from registry.core.model_form import ASKED_ATTRIBUTES, MAX_NAME, ModelForm, Module, Parameter
from registry.core.reference import shown
from registry.formats.live import base_of, dtype_code, find_adapted
from registry.formats.live_arguments import arguments_of
from registry.formats.source_code import sources_of

if TYPE_CHECKING:
    import torch
    from torch import nn

MAX_MODULES = 1_000_000
"""Modules that share others can have more paths than anybody can list."""

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""torch's own, by class: the attribute that has what is wrapped."""
_WRAPPED_BY_PEFT = ("base_layer", "original_module", "token_adapter")
"""Of all its layers; of `modules_to_save`; of `trainable_token_indices`, around one of its layers."""
_QUANTISED = re.compile(
    r"Linear(4bit|8bitLt|FP4|NF4)|Embedding(4bit|8bit|FP4|NF4)"  # bitsandbytes
    r"|.*(QuantLinear|QuantizedLinear).*|WQLinear.*"  # GPTQ, AWQ, AQLM
    r"|HQQLinear|EetqLinear|(FP8|FbgemmFp8)Linear|(Auto)?BitLinear|Q(Linear|Conv2d|Embedding)"
)
_PACKED = frozenset(("qweight", "qzeros", "weight_packed", "SCB"))
_NOT_QUANTISED = frozenset(("DTensor", "FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor", "ShardedTensor"))
"""Classes of tensors that show what they store, elsewhere."""


def live_form(model: nn.Module) -> ModelForm:
    """The form of a model, or of the base within the one PeftModel that it is or holds.

    A module that is registered under two names has a row for each, the second tied to the first.

    Raises:
        InvalidInput: the model contains itself, holds several models with adapters, has over `MAX_MODULES` paths, or
            a name that cannot be written down.
    """
    base = plain_model(model)
    source, packages = sources_of(base)
    prefix = getattr(type(base), "base_model_prefix", "")
    ties = _Ties()
    rows = [row for path, module in plain_modules(base) if (row := _row(path, module, ties)) is not None]
    return ModelForm(
        modules=tuple(rows),
        exact=True,
        class_name=_class_name(type(base)),
        arguments=arguments_of(base),
        source=source,
        packages=packages,
        prefix=prefix if isinstance(prefix, str) else "",
        has=tuple(name for name in ASKED_ATTRIBUTES if _has(base, name)),
    )


def plain_model(model: nn.Module) -> nn.Module:
    """What is within torch's wrappers and PEFT's, PEFT's layers still in it.

    Raises:
        InvalidInput: it holds several models with adapters, or contains itself.
    """
    model = _within(model)
    adapted = find_adapted(model)
    base: nn.Module = model if adapted is None else base_of(adapted)
    return _within(base)


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its path, in the order of `named_modules`, a PEFT layer as what it wraps.

    Args:
        model: of `plain_model`.

    Raises:
        InvalidInput: a module contains itself, or there are over `MAX_MODULES` paths.
    """
    found = 0
    above: dict[int, str] = {}
    waiting: list[tuple[str, nn.Module, bool]] = [("", _within(model), False)]
    while waiting:
        path, module, is_done = waiting.pop()
        if is_done:
            del above[id(module)]
            continue
        if id(module) in above:
            raise _contains_itself(path, above[id(module)])
        found += 1
        if found > MAX_MODULES:
            raise InvalidInput(f"the {type(model).__name__} has over {MAX_MODULES} paths to modules; expected fewer")
        if len(path) > MAX_NAME or NOT_IN_A_NAME.search(path):
            raise InvalidInput(
                f"the module {shown(path, 80)} has a name of {len(path)} characters, or one with a control character; "
                f"expected at most {MAX_NAME} that can be printed: name it otherwise"
            )
        yield path, module
        above[id(module)] = path
        waiting.append((path, module, True))
        prefix = f"{path}." if path else ""
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        waiting += [(f"{prefix}{name}", _within(child), False) for name, child in reversed(children)]


def _within(module: nn.Module) -> nn.Module:
    """The module that PEFT or torch has wrapped, through all wrappers."""
    seen = {id(module)}
    while (inner := _wrapped(module)) is not None:
        if id(inner) in seen:
            raise _contains_itself(type(inner).__name__, "")
        seen.add(id(inner))
        module = inner
    return module


def _wrapped(module: nn.Module) -> nn.Module | None:
    for one in type(module).__mro__:
        if one.__module__.startswith("peft."):
            held = map(module._modules.get, _WRAPPED_BY_PEFT)
            return next((inner for inner in held if inner is not None), None)
        if one.__module__.startswith("torch.") and one.__name__ in _WRAPPERS:
            return module._modules.get(_WRAPPERS[one.__name__])
    return None


def _contains_itself(path: str, other: str) -> InvalidInput:
    return InvalidInput(
        f"the model contains itself: {shown(path, 200)} is the same module as {shown(other, 200) or 'the model'} above "
        "it, and its state dict has no end; expected a tree: keep the way back out of its modules, in a tuple say"
    )


class _Ties:
    """Which modules have their weight in memory from an earlier one."""

    def __init__(self) -> None:
        self._first: dict[object, str] = {}
        self._kept: list[nn.Module] = []
        """So that no other has the id of one that was seen."""

    def owner(self, path: str, module: nn.Module, own: dict[str, torch.Tensor]) -> str | None:
        """The first module with the same weight, or the same module; None: it is the first."""
        self._kept.append(module)
        keys: list[object] = [("module", id(module))]
        weights = [own["weight"]] if "weight" in own else [one for one in own.values() if _dimensions(one) >= 2]
        for weight in weights:
            keys.append(("tensor", id(weight)))
            if (place := _place(weight)) is not None:
                keys.append(place)
        known = next((self._first[key] for key in keys if key in self._first), None)
        for key in keys:
            self._first.setdefault(key, path if known is None else known)
        return known


def _place(tensor: torch.Tensor) -> object | None:
    """Where its elements lie, and how many; None where that says nothing."""
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor) or tensor.is_meta or _is_subclass(tensor) or not tensor.numel():
        return None
    try:
        pointer = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
    return (str(tensor.device), pointer, tensor.numel()) if pointer else None


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a module itself, by name within it; sorted, as PEFT puts some back last."""
    kept = {
        name: one for name, one in module._buffers.items() if name not in module._non_persistent_buffers_set
    } | module._parameters
    return {name: one for name, one in sorted(kept.items()) if one is not None}


def _row(path: str, module: nn.Module, ties: _Ties) -> Module | None:
    own = own_tensors(module)
    kind, in_features, out_features, bias, groups = _kind(module, own)
    if not own and kind == "other":
        return None
    return Module(
        path=path,
        kind=kind,
        type_name=NOT_IN_A_NAME.sub("?", type(module).__name__)[:MAX_NAME],
        in_features=in_features,
        out_features=out_features,
        bias=bias,
        groups=groups,
        tied_to=ties.owner(path, module, own),
        parameters=tuple(_parameter(name, one) for name, one in own.items()),
    )


def _parameter(name: str, tensor: torch.Tensor) -> Parameter:
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return Parameter(name, dtype_code(tensor.dtype) or "", ())
    packed = _is_packed(tensor)
    code = "" if packed else dtype_code(tensor.dtype) or ""
    shape = tuple(tensor.shape)
    return Parameter(name, code, (*shape[:-1], shape[-1] * 2) if code == "F4" and shape else shape)


def _kind(module: nn.Module, own: dict[str, torch.Tensor]) -> tuple[str, int | None, int | None, bool | None, int]:
    """Kind, in_features, out_features, bias and groups of a row."""
    from torch import nn

    bias = getattr(module, "bias", None) is not None
    if _is_quantised(module, own):
        return "quantised", *_sizes(module, _QUANTISED_SIZES), bias, 1
    if isinstance(module, nn.MultiheadAttention):
        width = _size(module.embed_dim)
        return "attention", width, width, module.in_proj_bias is not None, 1
    if isinstance(module, nn.Linear):
        return "linear", _size(module.in_features), _size(module.out_features), bias, 1
    for kind, convolution in (("conv1d", nn.Conv1d), ("conv2d", nn.Conv2d), ("conv3d", nn.Conv3d)):
        if isinstance(module, convolution):
            return kind, _size(module.in_channels), _size(module.out_channels), bias, module.groups
    if isinstance(module, nn.Embedding):
        return "embedding", _size(module.num_embeddings), _size(module.embedding_dim), None, 1
    if any((one.__module__, one.__name__) == ("transformers.pytorch_utils", "Conv1D") for one in type(module).__mro__):
        weight = own.get("weight")
        if weight is not None and _dimensions(weight) == 2:
            return "transformers_conv1d", weight.shape[0], weight.shape[1], bias, 1
    # A transposed convolution has a weight of as many dimensions.
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    if not is_convolution and any(_dimensions(own[name]) >= 3 for name in own.keys() & module._parameters.keys()):
        return "experts", None, None, None, 1
    return "other", None, None, None, 1


_QUANTISED_SIZES = (
    ("in_features", "out_features"),
    ("infeatures", "outfeatures"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
)


def _sizes(module: nn.Module, pairs: tuple[tuple[str, str], ...]) -> tuple[int | None, int | None]:
    for first, second in pairs:
        if hasattr(module, first) and hasattr(module, second):
            return _size(getattr(module, first)), _size(getattr(module, second))
    return None, None


def _size(value: Any) -> int | None:
    """A lazy module says 0 until it has run."""
    return value if isinstance(value, int) and value > 0 else None


def _is_quantised(module: nn.Module, own: dict[str, torch.Tensor]) -> bool:
    """By the names of classes, and by what holds the weight; no library of quantisation is imported."""
    for one in type(module).__mro__:
        if _QUANTISED.fullmatch(one.__name__) or ".nn.quantized." in f"{one.__module__}.":
            return True
    if not _PACKED.isdisjoint(own):
        return True
    weight = own.get("weight")
    if weight is None or _dimensions(weight) < 2:
        return False
    return _is_packed(weight) or not (
        weight.dtype.is_complex or (weight.dtype.is_floating_point and weight.dtype.itemsize > 1)
    )


def _dimensions(tensor: torch.Tensor) -> int:
    """0 for a lazy parameter, which has no shape yet."""
    from torch.nn.parameter import is_lazy

    return 0 if is_lazy(tensor) else tensor.dim()


def _is_packed(tensor: torch.Tensor) -> bool:
    """Whether a quantiser decides what its elements are."""
    return tensor.is_quantized or (_is_subclass(tensor) and type(tensor).__name__ not in _NOT_QUANTISED)


def _is_subclass(tensor: torch.Tensor) -> bool:
    import torch

    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _class_name(kind: type) -> str:
    return NOT_IN_A_NAME.sub("?", f"{kind.__module__}.{kind.__qualname__}")[:MAX_NAME]


def _has(model: nn.Module, name: str) -> bool:
    try:
        return hasattr(model, name)
    except Exception:  # noqa: BLE001  # a property of the user's, which may fail in any way
        return False
