"""The matrix of docs/compatibility.md: for each condition a real adapter with exactly that fault, what the registry
says of it, and what the installed PEFT does with it. Both are compared with matrix.json, so the page cannot rot;
`MATRIX=write pytest -n 0 tests/compatibility/test_matrix.py` writes it anew."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest

from registry.compat.rules import RULES
from tests.compatibility.asking import answers, of_code
from tests.compatibility.conftest import Shelf
from tests.compatibility.fault import Fault, peft_does
from tests.compatibility.faults import FAULTS

MATRIX = Path(__file__).with_name("matrix.json")
NOT_BROKEN_HERE = {
    "C30": "information alone; tests/formats/test_live_form.py edits a class",
    "C32": "the behaviour probe; tests/operations/test_proving.py",
}
"""Rules without an adapter in the table."""


@cache
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(MATRIX.read_text(encoding="utf-8")) if MATRIX.exists() else {}
    return found


def test_every_rule_has_a_fault() -> None:
    assert {one.code for one in FAULTS} | NOT_BROKEN_HERE.keys() == {one.code for one in RULES}
    assert {f"C{number:02}" for number in range(1, 28)} <= {one.code for one in FAULTS}
    assert len({one.slug for one in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.slug)
def test_the_finding_says_what_is_wrong_and_peft_does_what_the_page_says(fault: Fault, shelf: Shelf) -> None:
    trained = fault.make(shelf.folder())
    does = peft_does(fault, trained)
    found = answers(fault, trained.folder, shelf)
    says = ""
    wrong = []
    for asked, answer in found.items():
        named = of_code(answer, fault.code, fault.says)
        if not named:
            wrong.append(f"{asked}: no {fault.code} {fault.says}, but {[str(one) for one in answer.findings]}")
            continue
        if answer.verdict != fault.verdict or bool(answer) == (fault.verdict == "does not fit"):
            others = [str(one) for one in answer.findings if one.severity in ("error", "undecided")]
            wrong.append(f"{asked}: {answer.verdict}, expected {fault.verdict}: {others}")
        first = named[0]
        if not (first.message and first.subject and (first.expected or first.found)):
            wrong.append(f"{asked}: a finding that does not say what it is about: {first}")
        if first.severity != "info" and not first.mend:
            wrong.append(f"{asked}: no mend: {first}")
        says = says or f"{first.severity}: {first.subject}: {first.message}"
    assert not wrong, "\n".join(wrong)
    row = {"code": fault.code, "fault": fault.name, "for": fault.purpose, "peft": does, "verdict": fault.verdict}
    row["says"] = says
    if fault.peft:
        row["asked"] = fault.peft
    if os.environ.get("MATRIX") == "write":
        _write(fault, row)
        return
    matrix = recorded()
    if matrix["peft"] != peft.__version__:
        pytest.skip(f"the page is about PEFT {matrix['peft']}")
    assert row == matrix["rows"][fault.slug]


def test_the_matrix_has_no_other_rows() -> None:
    assert list(recorded()["rows"]) == [one.slug for one in FAULTS]


def _write(fault: Fault, row: dict[str, Any]) -> None:
    rows = recorded().get("rows", {}) | {fault.slug: row}
    kept = {one.slug: rows[one.slug] for one in FAULTS if one.slug in rows}
    document = {"peft": peft.__version__, "rows": kept}
    MATRIX.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    recorded.cache_clear()
