"""What a live module says of how it was built: its `constructor_arguments`, a mapping that the module has as an
attribute or a property. Nothing is guessed from a signature, and nothing is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from registry.core.architecture import Architecture
from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.formats.live import base_of, find_adapted

if TYPE_CHECKING:
    from torch import nn

ATTRIBUTE = "constructor_arguments"


def live_architecture(module: nn.Module) -> tuple[Architecture | None, tuple[str, ...]]:
    """The architecture of a module, or of the base within the one PeftModel that it is or holds.

    Returns:
        None where nothing is said, and where it cannot be kept: then there is a note of why.
    """
    owner = _owner(module)
    if owner is None:
        return None, ()
    name = f"{type(owner).__module__}.{type(owner).__qualname__}"
    try:
        arguments = getattr(owner, ATTRIBUTE)
    except Exception as error:  # noqa: BLE001  # code of the user's, which may fail in any way
        return None, (f"no architecture is kept: {ATTRIBUTE} of {shown(name)} failed: {shown(repr(error))}",)
    if not isinstance(arguments, Mapping):
        found = type(arguments).__name__
        return None, (f"no architecture is kept: {ATTRIBUTE} of {shown(name)} is a {found}; expected a mapping",)
    try:
        found_here = Architecture(name, dict(arguments))
        found_here.to_bytes()
    except InvalidInput as error:
        return None, (f"no architecture is kept of {shown(name)}: {error}",)
    return found_here, ()


def _owner(module: nn.Module) -> nn.Module | None:
    while (compiled := module._modules.get("_orig_mod")) is not None:  # of torch.compile
        module = compiled
    if _has(module):
        return module
    adapted: Any = find_adapted(module)
    base = None if adapted is None else base_of(adapted)
    return base if base is not None and _has(base) else None


def _has(module: nn.Module) -> bool:
    # By hasattr a PeftModel has all that is within it, and the class would be PEFT's.
    return ATTRIBUTE in vars(module) or hasattr(type(module), ATTRIBUTE)
