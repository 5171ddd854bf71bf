"""What a live module was, so that it can be put back after an attempt that failed: PEFT changes models in place, and
stops in the middle where it does not know how to go on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from registry.formats.live import not_plain

if TYPE_CHECKING:
    import torch
    from torch import nn


class ModuleState:
    """A module's submodules, attributes, hooks and flags, and which memory each parameter and buffer uses.

    Values in memory are not copied, but for the tensors that are named.

    Args:
        values: tensors whose elements may be changed in place.
    """

    def __init__(self, module: nn.Module, *, values: Iterable[torch.Tensor] = ()) -> None:
        self._modules = [
            (one, type(one), {name: (value, _content(value)) for name, value in vars(one).items()})
            for one in module.modules()
        ]
        self._tensors = [
            (tensor, tensor.data if not_plain(tensor) is None else None, tensor.requires_grad)
            for tensor in (*module.parameters(), *module.buffers())
        ]
        self._values = [(tensor, tensor.detach().clone()) for tensor in values]

    def restore(self) -> None:
        """Puts everything back; containers stay the objects that they were, because handles of hooks point to them."""
        import torch

        for module, kind, attributes in self._modules:
            module.__class__ = kind
            vars(module).clear()
            for name, (value, content) in attributes.items():
                if content is not None and not _is_same(_content(value), content):
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)
                vars(module)[name] = value
        for tensor, data, requires_grad in self._tensors:
            if data is not None and tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
        with torch.no_grad():
            for tensor, value in self._values:
                # Only what differs: a copy makes every graph useless that still needs the tensor for its backward pass.
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _content(value: Any) -> dict[Any, Any] | list[Any] | set[Any] | None:
    """What a container holds; None for anything else."""
    return next((kind(value) for kind in (dict, list, set) if isinstance(value, kind)), None)


def _is_same(now: Any, before: Any) -> bool:
    """Whether the very same objects are in there, in the same order."""
    if isinstance(before, set):
        return bool(now == before)
    flat = [[*one, *one.values()] if isinstance(one, dict) else one for one in (now, before)]
    return len(flat[0]) == len(flat[1]) and all(a is b for a, b in zip(*flat, strict=True))
