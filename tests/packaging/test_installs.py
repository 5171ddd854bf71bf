"""The three ways to have the registry, each in an interpreter of its own that holds our dependencies but not us:
the wheel, an editable install, the bare checkout. Nothing is fetched; builds use the running environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import registry

ROOT = Path(__file__).parents[2]

PROBE = """
import json, registry
from registry.catalog.schema import migrations_path
print(json.dumps({"package": registry.__file__, "migrations": str(migrations_path())}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that succeeds. It sees no PYTHONPATH but a given one."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "REGISTRY_"))}
    command = tuple(str(part) for part in command)
    done = subprocess.run(
        command, cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def can_import(python: Path, module: str, cwd: Path) -> bool:
    found = run(python, "-c", f"import importlib.util as u; print(u.find_spec({module!r}) is not None)", cwd=cwd)
    return found == "True\n"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter with our dependencies and without us."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # A path in a .pth file is only a path: the .pth files in it, ours among them where we are installed, stay unread.
    Path(site, "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    assert not can_import(python, "registry", tmp_path)
    return python


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def install(python: Path, *what: str | Path) -> None:
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check",
        "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "--no-compile", *what,
        cwd=python.parent,
    )  # fmt: skip


def assert_registry_can_be_made(*command: str | Path, cwd: Path, **environment: str) -> None:
    """`init` runs every revision; `list` refuses a database that is not of the newest."""
    run(*command, "init", "made", cwd=cwd, **environment)
    assert json.loads(run(*command, "list", "--registry", "made", "--json", cwd=cwd, **environment)) == []


def test_wheel_makes_a_registry_elsewhere_with_its_own_migrations(wheel: Path, python: Path, elsewhere: Path) -> None:
    install(python, wheel)
    found = json.loads(run(python, "-c", PROBE, cwd=elsewhere))
    assert Path(found["package"]).is_relative_to(python.parents[1])
    assert Path(found["migrations"]) == Path(found["package"]).parent / "migrations"
    assert not can_import(python, "migrations", elsewhere)
    assert_registry_can_be_made(python.with_name("registry"), cwd=elsewhere)


def test_editable_install_makes_a_registry_elsewhere_with_the_checkouts_migrations(
    python: Path, elsewhere: Path
) -> None:
    install(python, "--editable", ROOT)
    found = json.loads(run(python, "-c", PROBE, cwd=elsewhere))
    assert found == {"package": str(ROOT / "registry" / "__init__.py"), "migrations": str(ROOT / "migrations")}
    for stranger in ("migrations", "tests", "examples"):
        assert not can_import(python, stranger, elsewhere)
    assert can_import(python, "pdp", elsewhere)
    assert_registry_can_be_made(python.with_name("registry"), cwd=elsewhere)


def test_checkout_makes_a_registry_without_being_installed(python: Path, elsewhere: Path) -> None:
    found = json.loads(run(python, "-c", PROBE, cwd=elsewhere, PYTHONPATH=str(ROOT)))
    assert found == {"package": str(ROOT / "registry" / "__init__.py"), "migrations": str(ROOT / "migrations")}
    start = "import sys; from registry.cli.main import main; sys.exit(main())"
    assert_registry_can_be_made(python, "-c", start, cwd=elsewhere, PYTHONPATH=str(ROOT))


def test_wheel_holds_our_two_packages_and_every_revision_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    version = registry.__version__
    assert {name.split("/")[0] for name in names} == {"registry", "pdp", f"lora_registry-{version}.dist-info"}
    revisions = {f"registry/migrations/versions/{path.name}" for path in (ROOT / "migrations/versions").glob("*.py")}
    assert revisions
    migrations = {name for name in names if name.startswith("registry/migrations/")}
    assert migrations == revisions | {"registry/migrations/env.py", "registry/migrations/script.py.mako"}
    assert {"registry/py.typed", "pdp/py.typed"} <= set(names)
    assert {f"pdp/config/{path.name}" for path in (ROOT / "pdp/config").glob("*.yaml")} <= set(names)
    assert not [name for name in names if name.endswith(".pyc")]


def test_metadata_says_version_license_and_command(wheel: Path) -> None:
    info = f"lora_registry-{registry.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "registry = registry.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Version"] == registry.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_sdist_holds_what_builds_and_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml", "hatch_build.py", "constraints-cpu.txt", "Makefile", ".ci/run", "alembic.ini", "README.md",
        "CHANGELOG.md", "LICENSE", "migrations/env.py", "migrations/script.py.mako", "tests/conftest.py",
        "registry/py.typed", "pdp/__init__.py",
    } <= names  # fmt: skip
    assert not [name for name in names if name.endswith(".pyc") or name.startswith((".venv", "dist"))]
