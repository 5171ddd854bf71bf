"""Writes docs/compatibility.md: a paragraph a rule from the rules' own docstrings, and the matrix of what the installed
PEFT and the registry say of one fault each, from tests/compatibility/matrix.json. Run it after either has changed:
`python docs/generate_compatibility.py`; a test fails while the page is another one."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
MATRIX = ROOT / "tests" / "compatibility" / "matrix.json"
WIDTH = 120

OPENING = """# Will it load, and compute what it was trained to?

<!-- Written by docs/generate_compatibility.py from the rules and from tests/compatibility/matrix.json. -->

An adapter that does not fit its model loads anyway, more often than not, and serves the base. `registry check` holds
the two against each other before a byte of weights is read:

```text
registry check REF [--base REF | --model module:Class --kwargs JSON] [--peft VERSION]
                   [--for load|merge|hotswap] [--strict]
```

In Python, `registry.check(ref, model_or_reference)` gives a `Compatibility`: true unless it does not fit, with
`verdict`, `findings`, `errors` and `undecided`. Any error means that it does not fit; else anything undecided that this
cannot be told, and the finding says what is missing; else it fits. A push with a base runs the same rules and refuses
what does not fit (`--force` keeps it with its findings).

What no rule can see: `lora_alpha`, `use_rslora` or `alpha_pattern` edited before the first push; tensors of two modules
of one shape that have changed places; A and B of a square module that were transposed and have changed places. The
behaviour probe of a live push can, see [behaviour-probe.md](behaviour-probe.md).
"""


def page() -> str:
    """The page as it must be."""
    sys.path.insert(0, str(ROOT))
    from registry.compat.rules import RULES

    matrix: dict[str, Any] = json.loads(MATRIX.read_text(encoding="utf-8"))
    parts = [OPENING, "## The rules", ""]
    for one in RULES:
        rows = [row for row in matrix["rows"].values() if row["code"] == one.code]
        parts += [_paragraph(one), *_reproduced(one, rows), ""]
    parts += [_table(matrix)]
    return "\n".join(parts)


def _paragraph(one: Any) -> str:
    text, _, _ = _docstring(one).partition("\nReproduce:")
    return f"### {one.code}: {one.title}\n\nSeverity: {one.severity}.\n\n{text.strip()}\n"


def _reproduced(one: Any, rows: list[dict[str, Any]]) -> list[str]:
    _, _, how = _docstring(one).partition("\nReproduce:")
    lines = [f"To reproduce: {' '.join(how.split())}"] if how.strip() else []
    if rows:
        first = rows[0]
        lines += [
            "",
            f"With {first['fault']}:",
            "",
            "```text",
            *_wrapped("registry", f"{one.code} {first['says']}"),
            *_wrapped("PEFT", first["peft"]),
        ]
        lines += ["```"]
    return lines


def _wrapped(who: str, text: str) -> list[str]:
    """Who says what, in lines that fit the page."""
    lines, line = [], f"{who}:"
    for word in text.split():
        if len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = " " * (len(who) + 1)
        line += f" {word}"
    return [*lines, line]


def _docstring(one: Any) -> str:
    return inspect.cleandoc(one.function.__doc__ or "")


def _table(matrix: dict[str, Any]) -> str:
    lines = [
        "## Side by side",
        "",
        "Each row is a real adapter, made with PEFT and then broken in this one way, or loaded into another model.",
        "Without another word, PEFT was asked to load it.",
        "",
        f"| condition | what PEFT {matrix['peft']} does | what `registry check` says |",
        "|---|---|---|",
    ]
    for row in matrix["rows"].values():
        asked = f" `--peft {row['asked']}`" if "asked" in row else ""
        asked += f" `--for {row['for']}`" if row["for"] != "load" else ""
        says = f"{row['verdict']} ({row['code']} {row['says']}){asked}"
        lines.append(f"| {row['code']}: {_cell(row['fault'])} | {_cell(row['peft'])} | {_cell(says)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that stands in a table as it is: nothing in it is markup."""
    for mark in "\\`|*_<[":
        text = text.replace(mark, f"\\{mark}")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
