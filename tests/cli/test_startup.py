"""What a command imports, and that the modules which are put off still work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import CHECKOUT, Ran

HEAVY = ("torch", "peft", "transformers", "numpy", "safetensors", "alembic", "sqlalchemy.orm")

RECORDED = """
import atexit, json, sys
atexit.register(lambda: open(sys.argv[0], "w").write(json.dumps(sorted(sys.modules))))
sys.argv.pop(0)
from registry.cli.main import main
main()
"""


def python(code: str, *words: str | Path) -> Ran:
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def imported(folder: Path, *words: str, code: int = 0) -> set[str]:
    """The modules that a command, run for real, has imported at its end."""
    ran = python(RECORDED, folder / "modules.json", *words)
    assert ran.code == code, ran
    assert ran.out != ""
    return set(json.loads((folder / "modules.json").read_text()))


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["list"],
        ["list", "--json"],
        ["list", "walk/*", "--base", "walk/base", "--where", "r >= 4 and meta.robot = a1", "--sort", "-metric.reward"],
        ["show", "walk/perturb"],
        ["show", "walk/perturb", "--tensors", "--json"],
        ["tag", "walk/perturb@1", "best", "--protect"],
        ["tag", "--history", "walk/perturb:prod"],
        ["log", "walk/perturb"],
        ["log", "walk/perturb", "--json"],
        ["annotate", "walk/perturb", "--meta", "a=1", "--metric", "b=2"],
        ["pull", "walk/perturb", "out"],
        ["export", "walk/perturb", "--to", "out.tar"],
    ],
    ids=" ".join,
)
def test_metadata_needs_no_torch(here: Path, tmp_path: Path, words: list[str]) -> None:
    found = imported(tmp_path, *words)
    assert not found & set(HEAVY)
    if words[0] != "--help":
        assert "sqlalchemy" in found


def test_a_push_of_files_needs_no_torch(here: Path, tmp_path: Path, artifacts: Path) -> None:
    assert not imported(tmp_path, "push", str(artifacts / "nan"), "walk/nan") & {"torch", "peft", "transformers"}


def test_help_needs_no_database_and_rich_is_for_trees(here: Path, tmp_path: Path) -> None:
    helped = imported(tmp_path, "--help") | imported(tmp_path, "list", "--help")
    assert not helped & {"sqlalchemy", "sqlite3", "rich"}
    for words in (["list"], ["list", "--json"], ["show", "walk/perturb"], ["log", "walk/perturb", "--json"]):
        assert "rich" not in imported(tmp_path, *words)
    assert "rich" in imported(tmp_path, "log", "walk/perturb")


def test_only_the_command_that_runs_is_imported(here: Path, tmp_path: Path) -> None:
    found = imported(tmp_path, "list")
    assert "registry.cli.list" in found
    assert not found & {"registry.cli.push", "registry.cli.tag", "registry.operations.push", "registry.operations.load"}


def test_no_stand_in_is_left_and_what_was_put_off_works() -> None:
    code = """
import sys
from registry.cli.startup import Deferred, quick_imports
with quick_imports():
    assert type(sys.modules["asyncio"]) is Deferred
    import registry.registry
assert not any(type(module) is Deferred for module in sys.modules.values())
assert "asyncio" not in sys.modules and "importlib.metadata" not in sys.modules
import sqlalchemy.util.concurrency as concurrency
put_off = concurrency.asyncio
assert type(put_off) is Deferred
import asyncio, importlib, importlib.metadata
assert put_off.Lock is asyncio.Lock and type(asyncio) is not Deferred
assert importlib.metadata.version("click")
async def one(): return 1
made = one()
assert concurrency.iscoroutine(made) and not concurrency.iscoroutine(1)
assert put_off.run(made) == 1
import gc
assert gc.isenabled()
"""
    assert python(code) == Ran(0, "", "")


def test_a_module_that_is_used_while_it_is_put_off_is_the_real_one() -> None:
    code = """
import sys
from registry.cli.startup import Deferred, quick_imports
with quick_imports():
    import asyncio, importlib.metadata
    from importlib import metadata
    import asyncio.events
    assert asyncio.Lock is asyncio.locks.Lock
    assert metadata.version("click") == importlib.metadata.version("click")
    import concurrent.futures
import asyncio as real
assert type(real) is not Deferred and real.Lock is asyncio.Lock
"""
    assert python(code) == Ran(0, "", "")


def test_imports_that_fail_leave_all_as_it_was() -> None:
    code = """
import gc, sys
from registry.cli.startup import Deferred, quick_imports
try:
    with quick_imports():
        raise ImportError("broken")
except ImportError:
    pass
assert gc.isenabled() and "asyncio" not in sys.modules
import asyncio
assert type(asyncio) is not Deferred
"""
    assert python(code) == Ran(0, "", "")
