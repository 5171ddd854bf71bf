"""docs/compatibility.md is what its generator makes of the rules and of the matrix: nobody edits it, and no rule is
without its paragraph."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from registry.compat.rules import RULES

ROOT = Path(__file__).parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_compatibility", ROOT / "docs" / "generate_compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_generator_makes() -> None:
    made = generator().page()
    message = "run `python docs/generate_compatibility.py`"
    assert (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8") == made, message


def test_every_rule_says_what_goes_wrong_and_how_to_see_it() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    for one in RULES:
        assert f"### {one.code}: {one.title}" in page
        assert one.function.__doc__
        assert "Reproduce:" in one.function.__doc__ or one.code == "C31", f"{one.code} has no reproduction"
