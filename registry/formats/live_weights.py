"""The weights of a model in memory as digests, without a copy of it: what a rule compares with the weights that an
adapter was trained on. Names are those of the model without PEFT's and torch's wrappers."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from registry.compat.case import Weights
from registry.core.digest import tensor_hasher
from registry.core.errors import UnsupportedTensor
from registry.core.layout import TensorSpec
from registry.formats.live import tensor_bytes, tensor_spec
from registry.formats.live_form import own_tensors, plain_model, plain_modules
from registry.formats.rounding import ROUNDED_DTYPES, rounded_digest

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Digests(NamedTuple):
    dtype: str
    digest: str
    rounded: str | None


def live_weights(model: nn.Module, paths: Collection[str] | None) -> Weights:
    """Digests, dtypes and rounded digests of a model's parameters and persistent buffers.

    What has no bytes of its own to compare is left out: meta tensors, and those that a quantiser packed.

    Args:
        paths: of the modules whose own tensors are asked for, as in `live_form`; None: all.

    Raises:
        InvalidInput: as `live_form` does.
    """
    base = plain_model(model)
    wanted = None if paths is None else frozenset(paths)
    named: dict[str, torch.Tensor] = {}
    for path, module in plain_modules(base):
        if wanted is None or path in wanted:
            named |= {f"{path}.{name}" if path else name: one for name, one in own_tensors(module).items()}
    once = list({id(tensor): (name, tensor) for name, tensor in named.items()}.values())
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="registry-hash") as pool:
        digests = list(pool.map(_digests, [name for name, _ in once], [tensor for _, tensor in once]))
    known = {id(tensor): found for (_, tensor), found in zip(once, digests, strict=True) if found is not None}
    found = {name: known[id(tensor)] for name, tensor in named.items() if id(tensor) in known}
    return Weights(
        reference=type(base).__name__,
        digests={name: one.digest for name, one in found.items()},
        dtypes={name: one.dtype for name, one in found.items()},
        rounded={name: one.rounded for name, one in found.items() if one.rounded is not None},
    )


def _digests(name: str, tensor: torch.Tensor) -> _Digests | None:
    try:
        spec = tensor_spec(name, tensor)
    except UnsupportedTensor:
        return None
    data = tensor_bytes(tensor)
    hasher = tensor_hasher(spec.dtype, spec.shape)
    hasher.update(data)
    digest = str(hasher.hexdigest())
    return _Digests(spec.dtype, digest, digest if spec.dtype == "BF16" else _rounded(spec, data))


def _rounded(spec: TensorSpec, data: memoryview) -> str | None:
    return rounded_digest(spec, [data]) if spec.dtype in ROUNDED_DTYPES else None
