"""Opening the registry that a command works on. Only `push` makes the user's default registry; a command that reads
says where it looked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from registry.cli.output import message
from registry.cli.startup import quick_imports

if TYPE_CHECKING:
    from registry.cli.options import Options
    from registry.core.errors import RegistryNotFound
    from registry.operations.discover import Location
    from registry.registry import Registry


@contextmanager
def opened(options: Options, *, make_default: bool = False) -> Iterator[Registry]:
    """The registry that the options name.

    Args:
        make_default: make the one in the user's data folder where no other is named or found.

    Raises:
        RegistryNotFound, SchemaOutOfDate, WrongStore, StoreUnreachable
    """
    with quick_imports():
        from registry.core.errors import RegistryNotFound
        from registry.operations import discover
        from registry.registry import Registry

    location = discover.locate(options.registry)
    try:
        registry = Registry(discover.open_registry(location))
    except RegistryNotFound:
        if not location.default or Path(location.database).exists():
            raise
        if not make_default:
            raise not_found(location) from None
        registry = Registry.open()
        message(f"note: made the registry {location.url}; 'registry init' makes one for a project alone")
    with registry:
        yield registry


def not_found(location: Location) -> RegistryNotFound:
    """The error where no registry was named and none was found: all places that were looked at."""
    from registry.core.errors import RegistryNotFound
    from registry.operations.discover import FOLDER, working_folder

    return RegistryNotFound(
        f"no registry: $REGISTRY_URL is not set, there is no {FOLDER} in {working_folder()} or above it, and none in "
        f"{location.url}; make one with 'registry init', or name one with --registry"
    )
