"""The command as a process: exit codes, signals, pipes, and a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from registry import Registry
from tests.cli.conftest import CHECKOUT, finished, start

PYTHON = f"PYTHONPATH={CHECKOUT} {sys.executable} -m registry"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["list"], 0),
        (["--version"], 0),
        (["list", "--frob"], 2),
        (["show", "walk"], 3),
        (["show", "walk/nobody"], 4),
        (["pull", "walk/base", "mine"], 5),
        (["list", "--registry", "postgresql://127.0.0.1:1/none"], 9),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_the_process_exits_with_the_code(here: Path, words: list[str], code: int) -> None:
    (here / "mine").write_text("")
    ran = finished(start(*words))
    assert ran.code == code, ran.err
    if code > 2:
        assert ran.out == ""
        assert re.fullmatch(r"registry: [^\n]+\n", ran.err)


def test_both_packages_run_as_modules(here: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    outs = [
        subprocess.run([sys.executable, "-m", module, "list"], env=environment, capture_output=True, check=True).stdout
        for module in ("registry", "registry.cli")
    ]
    assert outs[0] == outs[1] != b""


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["--help"]], ids=" ".join)
def test_a_closed_pipe_is_quiet(here: Path, words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*words, stdout=writing)
    os.close(writing)
    ran = finished(process)
    assert (ran.code, ran.err) == (141, "")


def test_messages_that_nobody_reads_do_no_harm(here: Path, artifacts: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start("push", artifacts / "nan", "walk/nan", stderr=writing)
    os.close(writing)
    assert finished(process).code == 0


def test_a_full_disk_behind_standard_output_is_one_line(here: Path) -> None:
    done = shell(f"{PYTHON} list > /dev/full")
    assert (done.returncode, done.stderr) == (
        9,
        "registry: cannot write to standard output: No space left on device\n",
    )


def test_closed_streams_do_no_harm(here: Path) -> None:
    assert shell(f"{PYTHON} list >&-").stderr == ""
    assert shell(f"{PYTHON} list >&-").returncode == 0
    assert shell(f"{PYTHON} show walk 2>&-").returncode == 3


def test_an_ascii_terminal_gets_ascii(here: Path) -> None:
    done = shell(f"PYTHONIOENCODING=ascii {PYTHON} log walk/perturb:prod")
    assert (done.returncode, done.stderr) == (0, "")
    assert "`-- walk/perturb@3  (continued_from it)" in done.stdout
    done = shell(f"PYTHONIOENCODING=ascii {PYTHON} show walk/pertürb")
    assert (done.returncode, done.stdout) == (3, "")


def big_file(path: Path, tensors: int, size: int) -> Path:
    """A safetensors file with holes for its tensors."""
    entries = {
        f"w{number:03}": {"dtype": "U8", "shape": [size], "data_offsets": [number * size, (number + 1) * size]}
        for number in range(tensors)
    }
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + tensors * size)
    return path


def test_ctrl_c_in_a_push_is_one_line_and_leaves_nothing(here: Path, tmp_path: Path) -> None:
    source = big_file(here / "big.safetensors", 200, 16 << 20)
    registry = tmp_path / "registry"
    blobs = set((registry / "blobs").rglob("*"))
    process = start("push", source, "walk/big")
    until = time.monotonic() + 30
    while not list((registry / "tmp").iterdir()):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    ran = finished(process)
    assert (ran.code, ran.out, ran.err) == (130, "", "registry: interrupted\n")
    assert list((registry / "tmp").iterdir()) == []
    assert {path for path in (registry / "blobs").rglob("*") if path.is_file()} == {p for p in blobs if p.is_file()}
    with Registry.open() as opened:
        assert opened.find("name = walk/big") == []


def test_ctrl_c_while_still_importing_is_one_line(here: Path) -> None:
    code = """
import builtins, os, signal
real = builtins.__import__
def slow(name, *rest):
    if name == WHEN:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest)
from registry.cli.main import main
builtins.__import__ = slow
main()
"""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    for when in ("click", "sqlalchemy"):
        command = [sys.executable, "-c", code.replace("WHEN", repr(when)), "list"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "registry: interrupted\n")


def in_terminal(*words: str, columns: int = 80) -> str:
    """What a command writes to a terminal, as it stands."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment: dict[str, Any] = {"TERM": "xterm-256color", "NO_COLOR": ""}
    process = start(*words, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says so where the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    process.wait(timeout=60)
    return written.decode().replace("\r\n", "\n")


def test_a_terminal_of_80_columns_is_not_overrun(here: Path, artifacts: Path) -> None:
    name = f"many/{'x' * 90}"
    with Registry.open() as registry:
        registry.push(artifacts / "nan", name, tags=[f"{'t' * 100}{number}" for number in range(10)])
    history = ["tag", "--history", "walk/perturb:prod"]
    for words in (["list"], ["show", name], ["log", "walk/perturb"], history):
        plain = re.sub(r"\x1b\[[0-9;]*m", "", in_terminal(*words))
        assert "\x1b" not in plain
        assert 0 < max(map(len, plain.splitlines())) <= 80


def test_a_terminal_gets_bold_headings_and_yellow_findings(here: Path, artifacts: Path) -> None:
    assert in_terminal("list").startswith("\x1b[1mNAME")
    assert "\x1b[33mC17 error: " in in_terminal("push", str(artifacts / "nan"), "walk/nan")
    assert "\x1b" not in in_terminal("list", "--json")


def test_a_server_is_reached_by_a_process_of_its_own(tmp_path: Path, artifacts: Path, postgresql_url: str) -> None:
    environment = {"REGISTRY_URL": postgresql_url}
    assert finished(start("init", postgresql_url, "--store", tmp_path / "blobs", env=environment)).code == 0
    assert finished(start("push", artifacts / "first", "walk/perturb", env=environment)).code == 0
    ran = finished(start("list", "--json", env=environment))
    assert (ran.code, ran.err) == (0, "")
    assert [one["name"] for one in json.loads(ran.out)] == ["walk/perturb"]
