"""Every adapter that fits one model. SQL says which forms of adapter have all their targets in the model, once for each
form; what it cannot tell (experts, attention, unknown sizes) is told by the rules, once for each form and
configuration; and the weights that adapters were trained on are compared by digest, once for each base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from registry.catalog.contents import findings_of
from registry.catalog.fitting import (
    LayoutFit,
    fitting_versions,
    layout_bases,
    layout_fits,
)
from registry.catalog.fitting_groups import form_keys, samples_of_layouts, target_paths
from registry.catalog.rows import ids_by_digest
from registry.catalog.search import Search, find_ids
from registry.catalog.tables import architecture
from registry.catalog.versions import resolve
from registry.compat.case import Case, ModelSide
from registry.compat.compatibility import Verdict
from registry.compat.rules import check_case
from registry.compat.rules_model import changed_modules
from registry.core.findings import Finding
from registry.core.query import parse_where
from registry.core.reference import parse_reference
from registry.operations.checking import live_side
from registry.operations.context import Context
from registry.operations.inspect import Found, found_of
from registry.operations.sides import Sides
from registry.operations.version import Version, as_version

if TYPE_CHECKING:
    from torch import nn

_OF_ONE_VERSION = frozenset({"C04", "C10", "C15", "C17", "C27", "C29", "C30"})
"""Codes in which versions of one layout and configuration may differ."""


@dataclass(frozen=True)
class Fit:
    """An adapter, and whether it fits.

    Attributes:
        matched: targets that the model has a module for, in its sizes.
        verdict: `undecided` where it is not known with which weights the adapter was trained.
        reason: the first thing that speaks against it, or that is not known; empty where it fits.
    """

    version: Version
    matched: int
    total: int
    verdict: Verdict
    reason: str


def fits(
    context: Context,
    model: str | nn.Module,
    where: Sequence[str] = (),
    *,
    everything: bool = False,
    limit: int | None = None,
) -> list[Fit]:
    """The adapters that fit a model; see `Registry.fits`."""
    side = None if isinstance(model, str) else live_side(model, None)
    search = Search(kind="adapter", where=parse_where(where), limit=limit)
    with context.reading() as connection:
        sides = Sides(context, connection)
        if isinstance(model, str):
            side = sides.model(resolve(connection, parse_reference(model)).id)
        assert side is not None
        question = _Question(sides, connection, side)
        if everything:
            ids = find_ids(connection, search)
        else:
            ids = fitting_versions(
                connection,
                question.layouts,
                excluded=question.excluded,
                refused=question.refused,
                search=search,
            )
        keys = form_keys(connection, ids)
        return [question.fit(found, *keys[found.record.id]) for found in found_of(connection, ids)]


class _Question:
    """One model, and what is known of all layouts of adapters against it."""

    def __init__(self, sides: Sides, connection: Connection, side: ModelSide) -> None:
        self._sides = sides
        self._connection = connection
        self._side = side
        self._grades: dict[int, dict[str, str] | None] = {}
        self._names: dict[int, str] = {}
        self._targets: dict[int, frozenset[str]] = {}
        self._checked: dict[tuple[int | None, int | None], Finding | None] = {}
        form_id = ids_by_digest(connection, architecture, [side.form.digest]).get(side.form.digest)
        self._fits = {one.layout_id: one for one in layout_fits(connection, side.form, form_id)}
        fitting = {one.layout_id for one in self._fits.values() if one.fits}
        opened = {one for one in fitting if self._fits[one].open}
        self.refused = {
            (layout_id, config_id)
            for layout_id, config_id, version_id in samples_of_layouts(connection, opened)
            if self._error_of_form(layout_id, config_id, version_id) is not None
        }
        self.layouts = fitting
        self.excluded = {pair for pair in layout_bases(connection, fitting) if self._has_other_weights(*pair)}

    def fit(self, found: Found, config_id: int | None, base_id: int | None) -> Fit:
        """One adapter with its verdict."""
        layout_id = found.record.layout_id or 0
        of_layout = self._fits.get(layout_id) or LayoutFit(layout_id, 0, 0, open=False)
        reason = self._reason(found, of_layout, config_id, base_id)
        verdict: Verdict = "fits" if reason is None else "does not fit" if reason.severity == "error" else "undecided"
        text = ""
        if reason is not None:
            text = f"{reason.code} {reason.subject}: {reason.message}" if reason.subject else reason.message
        return Fit(as_version(found), of_layout.matched, of_layout.total, verdict, text)

    def _reason(self, found: Found, of_layout: LayoutFit, config_id: int | None, base_id: int | None) -> Finding | None:
        """What first speaks against an adapter, or is not known."""
        if found.record.findings:
            stored = [one for one in findings_of(self._connection, found.record.id) if one.severity == "error"]
            if stored:
                return stored[0]
        if not of_layout.fits or of_layout.open:
            error = self._error_of_form(of_layout.layout_id, config_id, found.record.id)
            if error is not None:
                return error
            if not of_layout.fits:
                return Finding("C31", "undecided", "", "its targets are not compared with the model")
        return self._reason_of_weights(of_layout.layout_id, base_id)

    def _reason_of_weights(self, layout_id: int, base_id: int | None) -> Finding | None:
        if self._side.weights is None:
            return None
        if base_id is None:
            return Finding("C04", "undecided", "base", "with which weights it was trained is not recorded")
        grades = self._grades_of(base_id)
        if grades is None:
            return None
        found = self._at_targets(layout_id, grades)
        if "different" in found:
            return Finding("C04", "error", "base", f"trained on other weights: {self._names[base_id]}")
        if "unknown" in found or not found:
            return Finding("C04", "undecided", "base", f"cannot be compared with {self._names[base_id]}")
        return None

    def _error_of_form(self, layout_id: int, config_id: int | None, version_id: int) -> Finding | None:
        """The first error that all versions of this layout and configuration have."""
        key = layout_id, config_id
        if key not in self._checked:
            adapter = replace(self._sides.adapter(version_id), weights=None, form=None)
            errors = check_case(Case(adapter, replace(self._side, weights=None))).errors
            self._checked[key] = next((one for one in errors if one.code not in _OF_ONE_VERSION), None)
        return self._checked[key]

    def _has_other_weights(self, layout_id: int, base_id: int | None) -> bool:
        grades = None if base_id is None else self._grades_of(base_id)
        return grades is not None and "different" in self._at_targets(layout_id, grades)

    def _grades_of(self, base_id: int) -> dict[str, str] | None:
        """Grade of each tensor of another base by live name; None where it is the model's own."""
        if base_id not in self._grades:
            asked = self._side.weights
            trained = None if asked is None else self._sides.weights(base_id)
            is_other = asked is not None and trained is not None and trained.reference != asked.reference
            self._grades[base_id] = changed_modules(trained, asked) if is_other and trained and asked else None
            self._names[base_id] = "" if trained is None else trained.reference
        return self._grades[base_id]

    def _at_targets(self, layout_id: int, grades: Mapping[str, str]) -> set[str]:
        prefix = f"{self._side.form.prefix}." if self._side.form.prefix else ""
        paths = self._paths(layout_id)
        if prefix:
            paths = paths | {f"{prefix}{path}" for path in paths} | {path.removeprefix(prefix) for path in paths}
        return {grade for name, grade in grades.items() if name.rpartition(".")[0] in paths}

    def _paths(self, layout_id: int) -> frozenset[str]:
        if layout_id not in self._targets:
            self._targets[layout_id] = target_paths(self._connection, layout_id)
        return self._targets[layout_id]
