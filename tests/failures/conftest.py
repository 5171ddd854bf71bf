"""A registry to fail on: made once a session, copied for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry import Registry
from tests.failures.support import tensor_file


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed registry that holds `walk/base@1`; it is only to be copied."""
    folder = tmp_path_factory.mktemp("template")
    with Registry.init(folder / "registry") as registry:
        registry.push(tensor_file(folder / "model.safetensors"), "walk/base", tags=["v1"])
    return folder / "registry"


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A copy of the template."""
    return Path(shutil.copytree(template, tmp_path / "registry"))


@pytest.fixture
def registry(root: Path) -> Iterator[Registry]:
    with Registry.open(root) as opened:
        yield opened
