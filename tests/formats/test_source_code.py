"""Digests of source code: what does not count, and that every Python gives the same."""

from __future__ import annotations

import shutil
import subprocess
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

from registry.formats import source_code
from registry.formats.source_code import NO_SOURCE, normalised, normalised_class, sources_of

SOURCE = '''
import torch  # not part of it


def outer():
    class Net:
        """Of a function."""
        x = 1
    return Net


if True:
    @decorated(
        "twice",  # a comment
    )
    class Net(Base):
        """A docstring.

    That leaves the block.
        """

        size: int = 0x10 if 1_000 else 1e-3; other = (1,
            2)

        # Ä comment
        async def forward(self, x, *, y=b"\\x00", **rest):
            r"""Raw."""
            text = f"ä {x!r:>{self.size}} {{literal}} {'nested' + f'{y}'} ö" "plain"
            more = f\'\'\'over
            {x
             } lines {{}}\'\'\' \\
                + rf"\\d{x}"
            if (y := x) is not None:
                return [one async for one in x if one != y]
            elif text:
                pass

            else:

                    return lambda: ~x @ y ** -1 // 2
            match x:
                case {"a": [1, *_]}:
                    return ...
            f"called {more()}"
            return "é" 'single'
'''
DIGEST = "2f876d247b2a85ce347a566b8d1aaeae37bfbb4a6ac6d8ea80dc2e4cd21361cb"
"""Once and for all: another one would make every model look changed."""


def digest(source: str, name: str = "Net") -> str:
    text = normalised_class(source, name)
    assert text is not None
    return sha256(text.encode()).hexdigest()


def test_a_fixed_source_has_a_fixed_digest() -> None:
    assert digest(SOURCE) == DIGEST


@pytest.mark.parametrize("python", ["python3.10", "python3.11", "python3.12", "python3.13", "python3.14"])
def test_every_python_gives_the_same(python: str, tmp_path: Path) -> None:
    found = interpreter(python)
    if found is None:
        pytest.skip(f"there is no {python}")
    (tmp_path / "source.txt").write_text(SOURCE, encoding="utf-8")
    program = (
        "import hashlib, pathlib, runpy, sys\n"
        "made = runpy.run_path(sys.argv[1])\n"
        "text = made['normalised_class'](pathlib.Path(sys.argv[2]).read_text('utf-8'), 'Net')\n"
        "print(hashlib.sha256(text.encode('utf-8')).hexdigest())\n"
    )
    run = subprocess.run(
        [found, "-I", "-W", "error", "-c", program, source_code.__file__, str(tmp_path / "source.txt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout.strip(), run.stderr) == (DIGEST, "")


def interpreter(python: str) -> str | None:
    """One that runs: a shim of pyenv may be there for a version that is not."""
    places = sorted(Path.home().glob(f".pyenv/versions/{python.removeprefix('python')}.*/bin/{python}"))
    for one in (*map(str, places), shutil.which(python)):
        if one and subprocess.run([one, "-c", ""], capture_output=True, check=False).returncode == 0:
            return one
    return None


BEFORE = """
class Net:
    def forward(self, x):
        return self.a(x) + f"{x}"
"""


@pytest.mark.parametrize(
    "after",
    [
        BEFORE.replace("    ", "  "),
        BEFORE.replace("\n", "\r\n"),
        BEFORE.replace("class", "# about it\nclass").replace("return", "# why\n\n        return"),
        BEFORE.replace("x):\n", 'x):\n        """Says what."""\n'),
        BEFORE.replace("self.a(x) +", "self . a( x )+"),
        BEFORE.replace("self.a(x) +", "self.a(\n  x\n) \\\n  +"),
        "import os\n\n\nclass Other:\n    pass\n" + BEFORE,
        BEFORE.rstrip("\n"),
        "if 1:\n" + BEFORE.replace("\n", "\n    ").rstrip(),
    ],
    ids=[
        "indent",
        "crlf",
        "comments",
        "docstring",
        "spaces",
        "breaks",
        "neighbours",
        "no last line feed",
        "in a block",
    ],
)
def test_what_changes_nothing_does_not_count(after: str) -> None:
    assert digest(after) == digest(BEFORE)


@pytest.mark.parametrize(
    "after",
    [
        BEFORE.replace("+", "-"),
        BEFORE.replace('f"{x}"', 'f"{x} "'),
        BEFORE.replace("return", "if x:\n            return"),
        BEFORE.replace("return", 'f"{x}"\n        return'),
        "@compiled\n" + BEFORE.lstrip(),
        BEFORE + BEFORE,
    ],
    ids=["operator", "text", "block", "a call in an f-string", "decorator", "twice"],
)
def test_what_may_change_something_counts(after: str) -> None:
    assert digest(after) != digest(BEFORE)


def test_a_class_in_a_function_is_found_by_its_qualified_name() -> None:
    assert normalised_class(SOURCE, "outer.<locals>.Net") == "class Net :\n\tx = 1"
    assert normalised_class(SOURCE, "nowhere") is None


def test_tokens_are_apart_and_lines_are_deep() -> None:
    assert (
        normalised("def f( a ):\n  if a:\n     return f'{a}'  'b'\n")
        == "def f ( a ) :\n\tif a :\n\t\treturn f'{a}' 'b'"
    )


def test_half_a_source_is_refused() -> None:
    with pytest.raises(SyntaxError):
        normalised("def f(:\n  '''")


class Here(nn.Module):
    pass


class Sub(Here):
    pass


def test_classes_of_torch_and_peft_are_left_out() -> None:
    sources, packages = sources_of(nn.Sequential(nn.Linear(1, 1), Here(), Sub(), Here()))
    assert list(sources) == [f"{__name__}.Here", f"{__name__}.Sub"]
    assert packages == {}
    assert sources[f"{__name__}.Here"] == sha256(b"class Here ( nn . Module ) :\n\tpass").hexdigest()


def test_a_class_without_source_has_a_marker() -> None:
    made: dict[str, Any] = {"nn": nn, "__name__": "__main__"}
    exec("class Typed(nn.Module): pass", made)
    made_here = type("Made", (nn.Module,), {})
    sources, _ = sources_of(nn.Sequential(made["Typed"](), made_here()))
    assert sources == {"__main__.Typed": NO_SOURCE, f"{__name__}.Made": NO_SOURCE}


def test_packages_are_those_of_the_classes() -> None:
    model = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    sources, packages = sources_of(model)
    assert packages == {"transformers": version("transformers")}
    assert "transformers.models.gpt2.modeling_gpt2.GPT2Block" in sources
    assert all(len(one) == 64 for one in sources.values())
