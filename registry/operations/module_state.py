"""What a live module was, so that it can be put back after an attempt that failed: PEFT changes models in place, and
stops in the middle where it does not know how to go on."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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
            (one, type(one), {name: (value, _shallow(value)) for name, value in vars(one).items()})
            for one in module.modules()
        ]
        self._tensors = [
            (tensor, tensor.data, tensor.requires_grad) for tensor in (*module.parameters(), *module.buffers())
        ]
        self._values = [(tensor, tensor.detach().clone()) for tensor in values]

    def restore(self) -> None:
        """Puts everything back; containers stay the objects that they were, because handles of hooks point to them."""
        import torch

        for module, kind, attributes in self._modules:
            module.__class__ = kind
            vars(module).clear()
            for name, (value, content) in attributes.items():
                if isinstance(value, list):
                    value[:] = content
                elif isinstance(value, dict | set):
                    value.clear()
                    value.update(content)
                vars(module)[name] = value
        for tensor, data, requires_grad in self._tensors:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            tensor.requires_grad_(requires_grad)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


def _shallow(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list | set) else None
