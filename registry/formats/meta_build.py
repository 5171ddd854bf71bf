"""Watches a constructor that runs on torch's meta device: what it makes elsewhere takes memory, and is refused, before
it is made where torch tells."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from registry.core.errors import InvalidInput
from registry.core.reference import shown

if TYPE_CHECKING:
    import torch
    from torch import nn

MAX_ALLOCATED = 64 << 20
"""Bytes of parameters and buffers that may have bytes all the same: tables of positions and the like."""

_FACTORIES = frozenset(
    ("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "randint", "normal", "arange", "scalar_tensor")
)
"""Of these the first argument is the shape, or it is small; the others are seen as parameters and buffers."""


class _Refused(InvalidInput):
    """A constructor allocates too much."""


class Allocated:
    """What a constructor made with bytes.

    Attributes:
        refusal: what was refused, as the end of a sentence; None: nothing.
    """

    def __init__(self) -> None:
        self.refusal: str | None = None
        self._registered: dict[int, int] = {}

    def before(self, nbytes: int, where: str) -> None:
        """
        Raises:
            InvalidInput: one tensor is larger than all may be.
        """
        if nbytes > MAX_ALLOCATED:
            self._refuse(f"allocates {_mib(nbytes)} {where}")

    def registered(self, module: nn.Module, name: str, tensor: Any) -> None:
        """
        Raises:
            InvalidInput: parameters and buffers with bytes have become too many.
        """
        import torch

        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            return
        self._registered[id(tensor)] = tensor.nbytes
        if tensor.nbytes > MAX_ALLOCATED or sum(self._registered.values()) > 4 * MAX_ALLOCATED:
            # Some of them may be gone already, so several small ones get more room until the model is whole.
            self._refuse(f"allocates {shown(name)} of a {type(module).__name__} on {tensor.device}")

    def _refuse(self, what: str) -> None:
        self.refusal = f"{what}; expected at most {_mib(MAX_ALLOCATED)} beside the meta device"
        raise _Refused(self.refusal)


@contextmanager
def building_on_meta() -> Iterator[Allocated]:
    """Within it tensors are made on the meta device, unless the code says another; that is watched."""
    import torch
    from torch.nn.modules import module as registration
    from torch.utils._python_dispatch import TorchDispatchMode

    allocated = Allocated()

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = func.overloadpacket.__name__
            if name in _FACTORIES and args and isinstance(args[0], list | tuple):
                device = torch.device(kwargs.get("device") or "cpu")
                if device.type != "meta":
                    dtype = kwargs.get("dtype") or torch.get_default_dtype()
                    allocated.before(_elements(args[0]) * dtype.itemsize, f"on {device}")
            return func(*args, **kwargs)

    hooks = (
        registration.register_module_parameter_registration_hook(allocated.registered),
        registration.register_module_buffer_registration_hook(allocated.registered),
    )
    try:
        with Watch(), torch.device("meta"):  # type: ignore[no-untyped-call]  # likewise
            yield allocated
    finally:
        for hook in hooks:
            hook.remove()


def _elements(shape: Any) -> int:
    return math.prod(size for size in shape if isinstance(size, int))


def refuse_allocated(path: str, model: nn.Module) -> tuple[str, ...]:
    """A note on what of a built model has bytes.

    Args:
        path: names the class in messages.

    Raises:
        InvalidInput: that is more than `MAX_ALLOCATED`.
    """
    seen: dict[int, int] = {}
    first: tuple[str, torch.Tensor] | None = None
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_meta:
            first = first or (name, tensor)
            seen[id(tensor)] = tensor.nbytes
    if first is None:
        return ()
    total, (name, tensor) = sum(seen.values()), first
    what = f"{len(seen)} tensors with {_mib(total)} on {tensor.device}, {shown(name)} first"
    if total > MAX_ALLOCATED:
        raise InvalidInput(
            f"{path} allocates {what}; expected at most {_mib(MAX_ALLOCATED)}: let its constructor leave the device to "
            "torch, or give the live model to Registry.check"
        )
    return (f"{path} allocates {what}, though it is built on the meta device",)


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f} MiB"
