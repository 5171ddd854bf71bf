"""A copy of the committed store for each test that damages it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conformance.damage import (
    COMMITTED,
)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(COMMITTED, tmp_path_factory.mktemp("template") / "store"))


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    """The committed store, to be damaged by `write` alone: its files are linked to those of other tests."""
    return Path(shutil.copytree(template, tmp_path / "store", copy_function=os.link))
