"""lora-registry: a team's LoRA adapters and checkpoints, as immutable versions that a database knows.

`from registry import Registry` is all that most users need. Importing this package imports neither
torch nor SQLAlchemy; names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.core.errors import RegistryError as RegistryError
    from registry.registry import PushResult as PushResult
    from registry.registry import Registry as Registry
    from registry.registry import Version as Version

__all__ = ["PushResult", "Registry", "RegistryError", "Version"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("Registry", "Version", "PushResult"):
        from registry import registry

        return getattr(registry, name)
    if name == "RegistryError":
        from registry.core.errors import RegistryError

        return RegistryError
    raise AttributeError(f"module 'registry' has no attribute {name!r}")
