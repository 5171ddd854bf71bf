"""Before an adapter is loaded into a model: the rules of `registry.compat`, on the model at hand and its weights.
Where the model carries an adapter already, names, ranks and options are left to the copying, which compares tensor
with tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from registry.catalog.versions import VersionRecord
from registry.compat.case import Case
from registry.compat.rules import check_case
from registry.core.findings import Finding
from registry.operations.checking import live_side, peft_to_ask
from registry.operations.context import Context
from registry.operations.sides import Sides

if TYPE_CHECKING:
    from torch import nn

_LEFT_TO_COPYING = frozenset({"C05", "C06", "C08", "C09", "C10", "C12", "C13", "C14", "C23"})
_WARNED = frozenset({"C04", "C22"})


def findings_first(
    context: Context, record: VersionRecord, model: nn.Module, *, adapter_name: str | None
) -> tuple[Finding, ...]:
    """What the rules say against a load: errors, and warnings of weights that are not those of the training.

    Args:
        adapter_name: under which it is to be loaded; None: into the one that is there.
    """
    with context.reading() as connection:
        adapter = Sides(context, connection).adapter(record.id)
    side = live_side(model, adapter)
    is_held = bool(side.adapters)
    if adapter_name is None or adapter_name in side.adapters:
        side = replace(side, adapters=())  # it takes the place of one that is there
    found = check_case(Case(adapter, side, peft_to_ask(None)))
    return tuple(one for one in found.findings if _counts(one, is_held=is_held))


def _counts(finding: Finding, *, is_held: bool) -> bool:
    if finding.severity == "warning":
        return finding.code in _WARNED
    if finding.severity != "error" or (is_held and finding.code in _LEFT_TO_COPYING):
        return False
    # PEFT would not find tensors without its prefix; here they are found.
    return not (finding.code == "C26" and finding.expected == "base_model.model.")
