"""One registry for all pairs of a session: every model is pushed once, when it is first needed, and adapters go beside
it under names of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from registry import Registry
from tests.compatibility import models
from tests.compatibility.adapters import quietly


class Shelf:
    """A registry with the models of `models` in it.

    Attributes:
        registry: open for the session.
        room: a folder for files.
    """

    def __init__(self, registry: Registry, room: Path) -> None:
        self.registry = registry
        self.room = room
        self._pushed: dict[str, str] = {}
        self._folders = 0

    def folder(self) -> Path:
        """A new, empty folder."""
        self._folders += 1
        made = self.room / str(self._folders)
        made.mkdir()
        return made

    def base(self, name: str, dtype: torch.dtype = torch.float32, *, folder: bool = False) -> str:
        """The reference of an example's model: pushed live, or as the folder that its library saves."""
        slug = f"{name}-{str(dtype).rpartition('.')[2]}{'-folder' if folder else ''}".replace("_", "-")
        return self.put(slug, lambda: models.fresh(name, dtype), folder=folder)

    def put(self, slug: str, make: Callable[[], nn.Module], *, folder: bool = False) -> str:
        """Pushes a model, once for each name."""
        if slug not in self._pushed:
            model = make()
            if folder:
                place = self.folder()
                quietly(lambda: model.save_pretrained(place))  # type: ignore[operator]
                pushed = self.registry.push(place, f"models/{slug}", probe=False)
            else:
                pushed = self.registry.push(model, f"models/{slug}", probe=False)
            self._pushed[slug] = pushed.reference
        return self._pushed[slug]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    home = tmp_path_factory.mktemp("shelf")
    (home / "room").mkdir()
    with Registry.init(home / "registry") as registry:
        yield Shelf(registry, home / "room")
