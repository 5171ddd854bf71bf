"""Pickles that would run something, pushed as people push files: nothing runs, the registry stays as it was, and one
line says which name it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry import Registry
from registry.core.errors import UnsafePickle
from tests.failures.support import photograph
from tests.formats.pickles import assembler as asm
from tests.formats.pickles.test_hostile import CALLS, CANARY, PLACES

SYSTEM = asm.call(asm.name("os", "system"), CANARY)
ADAPTER = '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}'


def payloads() -> dict[str, bytes]:
    """What a checkpoint may hide a call in, once for every name that nobody may call."""
    made = {
        f"{module}.{name}": asm.pickle({"model": asm.call(asm.name(module, name), *arguments)})
        for module, name, arguments in CALLS
    }
    made.update({f"os.system {place}": raw for place, raw in PLACES.items()})
    made["os.system in dill bytes of a workspace"] = asm.torch_zip(
        {"cfg": None, "state_dicts": {"model": {}}, "pickles": {"epoch": asm.pickle(3), "cfg": asm.pickle(SYSTEM)}}
    )
    return made


PAYLOADS = payloads()

HARM = {
    *("os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.forkpty", "pty.spawn"),
    *("socket.connect", "socket.bind", "urllib.Request", "webbrowser.open", "shutil.rmtree", "ctypes.dlopen"),
    *("code.__new__", "function.__new__", "builtins.input", "os.chmod", "os.kill"),
}
_seen: list[str] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is not None and event in HARM:
        _seen.append(event)


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What the interpreter is asked to do that no push does."""
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


def test_the_watch_would_have_seen_it(tmp_path: Path) -> None:
    with watched() as ran:
        subprocess.run([sys.executable, "-c", ""], check=True)
    assert ran


@pytest.mark.parametrize("case", PAYLOADS)
def test_a_file_that_would_run_something_is_refused(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    path = tmp_path / "hostile.pth"
    path.write_bytes(PAYLOADS[case])
    monkeypatch.chdir(tmp_path)
    before = photograph(root)
    with watched() as ran, pytest.raises(UnsafePickle) as refused:
        registry.push(path, "evil/adapter")
    assert not ran
    assert not (tmp_path / "canary").exists()
    after = photograph(root)
    assert (after.files, after.rows) == (before.files, before.rows)
    assert case.split()[0].rpartition(".")[2] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_tensors_of_a_peft_folder_are_read_by_the_same_rules(
    registry: Registry, root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(ADAPTER)
    (folder / "adapter_model.bin").write_bytes(asm.torch_zip({"q.lora_A.weight": SYSTEM}))
    before = photograph(root)
    with pytest.raises(UnsafePickle, match=r"os\.system"):
        registry.push(folder, "evil/adapter")
    after = photograph(root)
    assert (after.files, after.rows) == (before.files, before.rows)


def test_the_command_line_says_it_in_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "hostile.pth").write_bytes(asm.pickle(SYSTEM))
    command = [sys.executable, "-P", "-m", "registry", "--registry", str(root), "push", "hostile.pth", "evil/adapter"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "os.system" in line
    assert not (tmp_path / "canary").exists()
