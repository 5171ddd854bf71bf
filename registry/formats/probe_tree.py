"""Nested arguments and outputs of a model as plain trees, and these as JSON beside named tensors. A tree is of None,
bool, int, float, text, tensors, tuples, lists and dicts with text as keys; what a model returns beside these stands in
it as `LeftOut`, and of a large tensor a `Sample`. Nothing here makes an object of a class that a document names."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from registry.core.canonical_json import MAX_INTEGER
from registry.core.errors import InvalidInput, UnsupportedTensor
from registry.core.reference import shown
from registry.formats.live import tensor_spec

if TYPE_CHECKING:
    import torch

MAX_DEPTH = 32
MAX_TEXT = 200
"""Characters of a text, or of a key."""
MAX_ELEMENTS = 1 << 15
"""Of an output; from a larger one (logits over a vocabulary) this many are kept."""
DTYPES = frozenset(
    (
        *("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"),
        *("F8_E5M2", "F8_E4M3", "F16", "BF16", "F32", "F64", "C64"),
    )
)
"""Of the tensors in a tree: what torch and safetensors both read and write."""

_FLOAT = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?(e[+-]?[0-9]{1,3})?|nan|-?inf")


@dataclasses.dataclass(frozen=True, slots=True)
class LeftOut:
    """Stands in a tree of outputs for something that is not kept.

    Attributes:
        kind: its type, such as `DynamicCache`.
    """

    kind: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Stands in a tree of outputs for a large tensor.

    Attributes:
        values: `MAX_ELEMENTS` of its elements in row-major order, evenly spaced: element `i * size // MAX_ELEMENTS`.
        shape: of the whole.
    """

    values: torch.Tensor
    shape: tuple[int, ...]


# ---------------------------------------------------------------- from what a model takes and gives


def plain_inputs(value: Any, path: str, depth: int = 0) -> Any:
    """Arguments as a plain tree; a mapping becomes a dict, a tensor a copy on the CPU.

    Raises:
        InvalidInput: names the first value that has no place in a tree.
        UnsupportedTensor: a tensor that safetensors cannot hold.
    """
    import torch

    if isinstance(value, torch.Tensor):
        if tensor_spec(path, value).dtype not in DTYPES:
            raise UnsupportedTensor(f"{shown(path)}: a probe cannot keep {value.dtype}; convert it first")
        return _copy(value)
    if _is_scalar(value):
        return _scalar(value)
    if depth > MAX_DEPTH:
        raise InvalidInput(f"{shown(path)}: nested over {MAX_DEPTH} levels deep; a probe takes simpler arguments")
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not _is_text(key)), None)
        if wrong is not None:
            raise InvalidInput(
                f"{shown(path)}: the key {shown(repr(wrong))} is no printable text of at most {MAX_TEXT} characters"
            )
        return {str(key): plain_inputs(one, f"{path}.{key}", depth + 1) for key, one in value.items()}
    if type(value) in (tuple, list, torch.Size):
        items = [plain_inputs(one, f"{path}.{place}", depth + 1) for place, one in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise InvalidInput(
        f"{shown(path)}: a probe cannot keep a {type(value).__name__}; expected a tensor, None, a number, printable "
        f"text of at most {MAX_TEXT} characters, or a tuple, list or dict of these"
    )


def plain_outputs(value: Any, depth: int = 0) -> Any:
    """What a model returned as a plain tree: a mapping or a dataclass (transformers' `ModelOutput`) becomes a dict of
    its members, a named tuple a tuple, a tensor a copy on the CPU, a large one a `Sample`, anything else `LeftOut`."""
    import torch

    if isinstance(value, torch.Tensor):
        try:
            kept = tensor_spec("output", value).dtype in DTYPES
        except UnsupportedTensor:
            kept = False
        if not kept:
            return LeftOut(f"{type(value).__name__} of {value.dtype}")
        return _copy(value) if value.numel() <= MAX_ELEMENTS else _sample(value)
    if _is_scalar(value):
        return _scalar(value)
    if depth <= MAX_DEPTH:
        if isinstance(value, Mapping) and all(map(_is_text, value)):
            return {str(key): plain_outputs(one, depth + 1) for key, one in value.items()}
        if isinstance(value, tuple | list):
            items = [plain_outputs(one, depth + 1) for one in value]
            return items if isinstance(value, list) else tuple(items)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            return {name: plain_outputs(getattr(value, name, None), depth + 1) for name in names}
    return LeftOut(type(value).__name__[:MAX_TEXT])


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU that shares no memory: a model may return its input, or a buffer that it writes to again."""
    import torch

    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()
    return plain.to("cpu", copy=True).contiguous()


def _sample(tensor: torch.Tensor) -> Sample:
    import torch

    flat = tensor.detach().as_subclass(torch.Tensor).reshape(-1)
    places = torch.arange(MAX_ELEMENTS, device=flat.device) * len(flat) // MAX_ELEMENTS
    return Sample(_copy(flat[places]), tuple(tensor.shape))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _is_scalar(value: object) -> bool:
    if isinstance(value, int):
        return -MAX_INTEGER <= value <= MAX_INTEGER
    return value is None or isinstance(value, float) or _is_text(value)


def _scalar(value: Any) -> bool | int | float | str | None:
    """The value without a subclass of its type, such as an enum or numpy's float64."""
    plain = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    return None if plain is None else plain(value)


# ---------------------------------------------------------------- walking


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything in a tree but its containers, each with its path, such as `outputs.logits`."""
    if isinstance(tree, dict):
        for key, one in tree.items():
            yield from leaves(one, f"{path}.{key}")
    elif isinstance(tree, tuple | list):
        for place, one in enumerate(tree):
            yield from leaves(one, f"{path}.{place}")
    else:
        yield path, tree


def with_tensors(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same tree with new containers and every tensor changed."""
    import torch

    if isinstance(tree, dict):
        return {key: with_tensors(one, change) for key, one in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(with_tensors(one, change) for one in tree)
    return change(tree) if isinstance(tree, torch.Tensor) else tree


# ---------------------------------------------------------------- to JSON and back


def to_json(tree: Any, path: str, keep: Callable[[str, torch.Tensor], str]) -> Any:
    """A tree as JSON: `{"$tensor": name}`, `{"$tuple": [...]}`, `{"$dict": [[key, value], ...]}`, `{"$float": text}`,
    `{"$left_out": type}`, `{"$sample": [name, dimension, ...]}`, and the rest as it is.

    Args:
        keep: takes a tensor with its path, and gives the name that it is kept under.
    """
    if isinstance(tree, dict):
        # Pairs, because a JSON object has no order, and a model may go through its argument in order.
        return {"$dict": [[key, to_json(one, f"{path}.{key}", keep)] for key, one in tree.items()]}
    if isinstance(tree, tuple | list):
        items = [to_json(one, f"{path}.{place}", keep) for place, one in enumerate(tree)]
        return items if isinstance(tree, list) else {"$tuple": items}
    if isinstance(tree, LeftOut):
        return {"$left_out": tree.kind}
    if isinstance(tree, Sample):
        return {"$sample": [keep(path, tree.values), *tree.shape]}
    if isinstance(tree, float):
        # Text, because JSON's 1.0 is 1, and it has no NaN.
        return {"$float": repr(tree)}
    return tree if tree is None or isinstance(tree, bool | int | str) else {"$tensor": keep(path, tree)}


def from_json(node: Any, path: str, take: Callable[[str], Any], depth: int = 0) -> Any:
    """The inverse of `to_json`.

    Args:
        take: gives the tensor of a name.

    Raises:
        InvalidInput: not such a document; and what `take` raises.
    """
    if depth > MAX_DEPTH + 2:
        raise InvalidInput(f"{shown(path)}: expected at most {MAX_DEPTH} levels, found more")
    if isinstance(node, list):
        return [from_json(one, f"{path}.{place}", take, depth + 1) for place, one in enumerate(node)]
    if not isinstance(node, dict):
        if isinstance(node, float) or not _is_scalar(node):
            raise InvalidInput(
                f"{shown(path)}: expected null, a truth value, whole number or text, found {_short(node)}"
            )
        return node
    mark, value = next(iter(node.items())) if len(node) == 1 else (None, None)
    if mark == "$dict" and isinstance(value, list):
        return _pairs(value, path, take, depth)
    if mark == "$tuple" and isinstance(value, list):
        return tuple(from_json(value, path, take, depth))
    if mark == "$tensor" and isinstance(value, str):
        return take(value)
    if mark == "$left_out" and isinstance(value, str) and _is_text(value):
        return LeftOut(value)
    if mark == "$sample" and isinstance(value, list) and value and isinstance(value[0], str):
        return _read_sample(take(value[0]), value[1:], path)
    if mark == "$float" and isinstance(value, str) and _FLOAT.fullmatch(value):
        return float(value)
    raise InvalidInput(
        f"{shown(path)}: expected $tensor, $sample, $tuple, $dict, $float or $left_out, found {_short(node)}"
    )


def _read_sample(values: torch.Tensor, shape: list[Any], path: str) -> Sample:
    sizes = [size for size in shape[:64] if type(size) is int and 0 < size <= MAX_INTEGER]
    if len(sizes) != len(shape) or tuple(values.shape) != (MAX_ELEMENTS,) or math.prod(sizes) <= MAX_ELEMENTS:
        found = f"{list(values.shape)} of {_short(shape)}"
        raise InvalidInput(f"{shown(path)}: expected {MAX_ELEMENTS} elements of a larger tensor, found {found}")
    return Sample(values, tuple(sizes))


def _pairs(pairs: list[Any], path: str, take: Callable[[str], Any], depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not _is_text(pair[0]) or pair[0] in found:
            raise InvalidInput(f"{shown(path)}: expected pairs of a new key and a value, found {_short(pair)}")
        found[pair[0]] = from_json(pair[1], f"{path}.{pair[0]}", take, depth + 1)
    return found


def _short(value: object) -> str:
    return shown(repr(value))
