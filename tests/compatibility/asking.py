"""Pushes a fault into a registry and asks the registry about it: against the version and against a live model, whose
answers must agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from registry.compat.compatibility import Compatibility
from registry.core.findings import Finding
from tests.compatibility.adapters import quietly
from tests.compatibility.fault import Fault

if TYPE_CHECKING:
    from tests.compatibility.conftest import Shelf


def answers(fault: Fault, folder: Path, shelf: Shelf) -> dict[str, Compatibility]:
    """What the registry says of a fault, by what it was asked about: `version` and `live`."""
    registry = shelf.registry
    base = _base(fault, shelf)
    name = f"faults/{fault.slug}"
    if fault.before:
        whole = fault.make(shelf.folder(), whole=True).folder
        registry.push(whole, name, base=base, probe=False)
    pushed = quietly(lambda: registry.push(folder, name, base=base, probe=False, force=True))
    asked = base if fault.asked is None else _asked(fault, shelf)
    found = {}
    if fault.only != "live":
        found["version"] = registry.check(pushed.reference, asked, peft=fault.peft, purpose=fault.purpose)
    if fault.only != "version":
        live = fault.loaded_into()
        found["live"] = registry.check(pushed.reference, live, peft=fault.peft, purpose=fault.purpose)
    return found


def _base(fault: Fault, shelf: Shelf) -> str:
    if fault.files[0]:
        return _with_files(fault, shelf)
    if fault.base is None:
        return shelf.base(fault.model)
    return shelf.put(f"{fault.slug}-base", fault.base)


def _asked(fault: Fault, shelf: Shelf) -> str:
    assert fault.asked is not None
    return "" if fault.only == "live" else shelf.put(f"{fault.slug}-asked", fault.asked)


def _with_files(fault: Fault, shelf: Shelf) -> str:
    place = shelf.folder()
    model = fault.trained_on()
    quietly(lambda: model.save_pretrained(place))  # type: ignore[operator]
    for file, text in fault.files[0].items():
        (place / file).write_text(text, encoding="utf-8")
    return shelf.registry.push(place, f"models/{fault.slug}", probe=False).reference


def of_code(found: Compatibility, code: str, severity: str) -> list[Finding]:
    return [one for one in found.findings if one.code == code and one.severity == severity]
