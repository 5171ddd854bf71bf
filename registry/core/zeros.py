"""Which tensors are zeros throughout, told by their digests alone: no byte of them is read."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from registry.core.digest import tensor_hasher
from registry.core.layout import TensorSpec

_CHUNK = bytes(1 << 20)


def zero_tensors(tensors: Iterable[tuple[TensorSpec, str]]) -> frozenset[str]:
    """Names of a LoRA's tensors that are zeros throughout.

    Args:
        tensors: with their digests. One with a -0.0 in it counts as something else.
    """
    return frozenset(
        spec.name for spec, digest in tensors if "lora_" in spec.name and digest == _zero_digest(spec.dtype, spec.shape)
    )


@lru_cache(4096)
def _zero_digest(dtype: str, shape: tuple[int, ...]) -> str:
    hasher = tensor_hasher(dtype, shape)
    left = TensorSpec("", dtype, shape).nbytes
    while left > 0:
        hasher.update(_CHUNK[: min(left, len(_CHUNK))])
        left -= len(_CHUNK)
    return str(hasher.hexdigest())
