"""Every example in README.md runs, in order and as written: Python blocks in one namespace, `console`
blocks as a user would type them, with the output that is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHANGING = (
    (re.compile(r"sha256:[0-9a-f]{12,64}"), "sha256:DIGEST"),
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d+)?)?Z?"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d"), "DAY"),
    (re.compile(r"[ \t]+"), " "),
)


def blocks(document: str) -> list[tuple[str, str]]:
    return [(kind, body) for kind, body in BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))]


def normal(text: str) -> list[str]:
    """Lines without digests, times and the width of columns."""
    for pattern, word in CHANGING:
        text = pattern.sub(word, text)
    return [line.strip() for line in text.strip().splitlines()]


def commands(body: str) -> list[tuple[str, str]]:
    """(command, shown output) of a console block."""
    found: list[tuple[str, list[str]]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return [(command, "\n".join(shown)) for command, shown in found]


@pytest.mark.parametrize("document", ["README.md"])
def test_every_example_runs_and_prints_what_is_shown(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGISTRY_ACTOR", "ada")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "80",
    }
    namespace: dict[str, object] = {"__name__": "readme"}
    found = blocks(document)
    assert {kind for kind, _ in found} == {"python", "console"}
    for kind, body in found:
        if kind == "python":
            exec(compile(body, document, "exec"), namespace)
            shown = [line.partition("# -> ")[2] for line in body.splitlines() if "# -> " in line]
            assert normal(capsys.readouterr().out) == [line for text in shown for line in normal(text)]
            continue
        for command, shown_output in commands(body):
            done = subprocess.run(
                ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            if shown_output.strip():
                assert normal(done.stdout) == normal(shown_output), command
