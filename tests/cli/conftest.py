"""A filled registry (made once, copied for each test), and two ways to run a command on it: in this process, and as a
process of its own where exit, signals, pipes or imports are the question."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from registry import Registry
from registry.cli.app import app
from tests.cli.artifacts import write_adapter, write_base

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ran:
    """What came of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of a refusal, without its `registry: `."""
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("registry: ")
        return lines[0].removeprefix("registry: ")


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.safetensors`, and the PEFT folders `first`, `second`, `wide` (r 8, no peft_version), `nan` and `evil`."""
    folder = tmp_path_factory.mktemp("artifacts")
    write_base(folder / "base.safetensors")
    write_adapter(folder / "first", seed=1)
    write_adapter(folder / "second", seed=2)
    write_adapter(folder / "wide", seed=3, r=8, peft_version=None)
    write_adapter(folder / "nan", seed=4, nan=True)
    write_adapter(folder / "evil", seed=5, base_model_name_or_path="acme/\x1b[31mred\u202e[bold]x[/bold]")
    return folder


@pytest.fixture(scope="session")
def filled(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """walk/base@1 (v1), walk/perturb@1 to @3 (prod on 2), each of the last two continuing the one before."""
    folder = tmp_path_factory.mktemp("filled") / "registry"
    with Registry.init(folder) as registry:
        registry.push(artifacts / "base.safetensors", "walk/base:v1")
        registry.push(
            artifacts / "first",
            "walk/perturb",
            base="walk/base:v1",
            metadata={"robot": "a1", "seed": 3},
            metrics={"reward": 912.5, "loss": float("nan")},
            step=100,
            message="the first one",
        )
        registry.push(
            artifacts / "second",
            "walk/perturb:prod",
            base="walk/base:v1",
            continued_from="walk/perturb@1",
            metrics={"reward": float("inf"), "loss": float("-inf")},
        )
        registry.push(artifacts / "wide", "walk/perturb", continued_from="walk/perturb@2")
    return folder


@pytest.fixture
def here(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, an empty one, with a copy of the filled registry beside it that `$REGISTRY_URL` names."""
    shutil.copytree(filled, tmp_path / "registry")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("REGISTRY_URL", str(tmp_path / "registry"))
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path / "here"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, an empty one; no registry is named, and the user has none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_URL", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def run() -> Run:
    """Runs a command in this process."""

    def run(*words: str | Path, columns: int | None = None) -> Ran:
        environment = {"COLUMNS": None if columns is None else str(columns)}
        result = CliRunner().invoke(app, [str(word) for word in words], env=environment)
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


def start(*words: str | Path, **keywords: Any) -> subprocess.Popen[bytes]:
    """Starts the command as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)} | keywords.pop("env", {})
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-m", "registry", *map(str, words)], env=environment, **settings | keywords
    )


def finished(process: subprocess.Popen[bytes]) -> Ran:
    out, err = process.communicate(timeout=60)
    return Ran(process.returncode, (out or b"").decode(), (err or b"").decode())
