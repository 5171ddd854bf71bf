"""lora-registry: a team's LoRA adapters and checkpoints, as immutable versions that a database knows.

`from registry import Registry` is all that most users need, beside the errors that they want to catch.
Importing this package imports neither torch nor SQLAlchemy; names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.core.errors import Conflict as Conflict
    from registry.core.errors import Corrupt as Corrupt
    from registry.core.errors import Denied as Denied
    from registry.core.errors import Incompatible as Incompatible
    from registry.core.errors import InvalidInput as InvalidInput
    from registry.core.errors import NotFound as NotFound
    from registry.core.errors import RegistryError as RegistryError
    from registry.core.errors import StorageError as StorageError
    from registry.registry import Difference as Difference
    from registry.registry import Proof as Proof
    from registry.registry import PullResult as PullResult
    from registry.registry import PushResult as PushResult
    from registry.registry import Registry as Registry
    from registry.registry import Version as Version

__version__ = "0.1.0"

_HOMES = {
    "registry.registry": ("Difference", "Proof", "PullResult", "PushResult", "Registry", "Version"),
    "registry.core.errors": (
        "Conflict",
        "Corrupt",
        "Denied",
        "Incompatible",
        "InvalidInput",
        "NotFound",
        "RegistryError",
        "StorageError",
    ),
}
__all__ = [  # noqa: PLE0604  # the names below are loaded by __getattr__
    *(name for names in _HOMES.values() for name in names)
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'registry' has no attribute {name!r}")
