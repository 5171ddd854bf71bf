"""A registry to fail on: made once a session, copied for each test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
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


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options, once; skips where that cannot be done."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        if os.geteuid() != 0:
            pytest.skip("NOT TESTED: only root can mount a small disk; RLIMIT_FSIZE covers a part of it without root")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"NOT TESTED: root may not mount a small disk here: {done.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)
