"""An empty registry, made once a session and copied for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry import Registry
from tests.operations import varied


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed registry that is only to be copied."""
    folder = tmp_path_factory.mktemp("template") / "registry"
    Registry.init(folder).close()
    return folder


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed registry with something of everything, only to be copied."""
    folder = tmp_path_factory.mktemp("filled")
    (folder / "source").mkdir()
    with Registry.init(folder / "registry") as made:
        varied.fill(made, folder / "source")
    return folder / "registry"


@pytest.fixture
def root(empty_registry: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(empty_registry, tmp_path / "registry"))


@pytest.fixture
def registry(root: Path) -> Iterator[Registry]:
    with Registry.open(root) as opened:
        yield opened
