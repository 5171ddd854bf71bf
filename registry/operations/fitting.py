"""Every adapter that fits one model. SQL says which forms of adapter have all their targets in the model, once for each
form; what it cannot tell (experts, attention, unknown sizes) is told by the rules, once for each form and
configuration; and the weights that adapters were trained on are compared by digest, once for each base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from registry.catalog.fitting_groups import Key, config_documents, form_keys, target_paths
from registry.catalog.rows import ids_by_digest
from registry.catalog.search import Search, find_ids
from registry.catalog.tables import architecture
from registry.catalog.versions import resolve
from registry.compat.case import Case, ModelSide
from registry.compat.compatibility import Verdict
from registry.compat.rules import check_case
from registry.compat.rules_model import changed_modules, differing_arguments
from registry.compat.target_modules import Targeting
from registry.core.adapter_config import AdapterConfig, read_adapter_config
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
            keys = form_keys(connection, ids)
        else:
            ids, keys = _fitting(connection, question, search)
        question.read_configs(key[1] for key in keys.values())
        return [question.fit(found, keys[found.record.id]) for found in found_of(connection, ids)]


def _fitting(connection: Connection, question: _Question, search: Search) -> tuple[list[int], dict[int, Key]]:
    """Those that fit, as many as are wanted. What SQL cannot tell takes some away, and then more are asked for."""
    take = search.limit
    while True:
        found = fitting_versions(
            connection, question.layouts, excluded=question.excluded, search=replace(search, limit=take)
        )
        keys = form_keys(connection, found)
        question.read_configs(key[1] for key in keys.values())
        fitting = [one for one in found if question.error_of_form(one, keys[one]) is None]
        if take is None or search.limit is None or len(fitting) >= search.limit or len(found) < take:
            return fitting[: search.limit], keys
        take *= 4


class _Question:
    """One model, and what is known of all layouts of adapters against it."""

    def __init__(self, sides: Sides, connection: Connection, side: ModelSide) -> None:
        self._sides = sides
        self._connection = connection
        self._side = side
        self._grades: dict[int, dict[str, str] | None] = {}
        self._names: dict[int, str] = {}
        self._arguments: dict[int, str] = {}
        self._targets: dict[int, frozenset[str]] = {}
        self._checked: dict[tuple[int | None, int | None], Finding | None] = {}
        self._configs: dict[int, AdapterConfig | None] = {}
        self._wanted: dict[tuple[object, ...], frozenset[str]] = {}
        form_id = ids_by_digest(connection, architecture, [side.form.digest]).get(side.form.digest)
        self._fits = {one.layout_id: one for one in layout_fits(connection, side.form, form_id)}
        fitting = {one.layout_id for one in self._fits.values() if one.fits}
        self.layouts = fitting
        self.excluded = {pair for pair in layout_bases(connection, fitting) if self._has_other_weights(*pair)}

    def read_configs(self, config_ids: Iterable[int | None]) -> None:
        """Makes these configurations known."""
        missing = {one for one in config_ids if one is not None and one not in self._configs}
        documents = config_documents(self._connection, missing)
        self._configs |= dict.fromkeys(missing)
        self._configs |= {
            one: read_adapter_config(document.encode(), "the configuration") for one, document in documents.items()
        }

    def fit(self, found: Found, key: Key) -> Fit:
        """One adapter with its verdict."""
        layout_id = found.record.layout_id or 0
        of_layout = self._fits.get(layout_id) or LayoutFit(layout_id, 0, 0, open=False)
        reason = self._reason(found, of_layout, key)
        verdict: Verdict = "fits" if reason is None else "does not fit" if reason.severity == "error" else "undecided"
        text = ""
        if reason is not None:
            text = f"{reason.code} {reason.subject}: {reason.message}" if reason.subject else reason.message
        return Fit(as_version(found), of_layout.matched, of_layout.total, verdict, text)

    def _reason(self, found: Found, of_layout: LayoutFit, key: Key) -> Finding | None:
        """What first speaks against an adapter, or is not known."""
        if found.record.findings:
            stored = [one for one in findings_of(self._connection, found.record.id) if one.severity == "error"]
            if stored:
                return stored[0]
        error = self.error_of_form(found.record.id, key)
        if error is not None:
            return error
        if not of_layout.fits:
            return Finding("C31", "undecided", "", "its targets are not compared with the model")
        return self._reason_of_weights(of_layout.layout_id, key[2])

    def _reason_of_weights(self, layout_id: int, base_id: int | None) -> Finding | None:
        if self._side.weights is None:
            return None
        if base_id is None:
            return Finding("C04", "undecided", "base", "with which weights it was trained is not recorded")
        grades = self._grades_of(base_id)
        if grades is None:
            return None
        if argument := self._other_argument(base_id):
            return Finding("C29", "error", argument, f"trained on a model with another value: {self._names[base_id]}")
        found = self._at_targets(layout_id, grades)
        if "different" in found:
            return Finding("C04", "error", "base", f"trained on other weights: {self._names[base_id]}")
        if "unknown" in found or not found:
            return Finding("C04", "undecided", "base", f"cannot be compared with {self._names[base_id]}")
        return None

    def error_of_form(self, version_id: int, key: Key) -> Finding | None:
        """The first error that all versions of this layout and configuration have; None also where SQL and the targets
        of the configuration leave no room for one."""
        form_key = key[:2]
        if form_key not in self._checked:
            self._checked[form_key] = None
            if not self._is_settled(*form_key):
                adapter = replace(self._sides.adapter(version_id), weights=None, form=None)
                errors = check_case(Case(adapter, replace(self._side, weights=None))).errors
                found = next((one for one in errors if one.code not in _OF_ONE_VERSION), None)
                self._checked[form_key] = found
        return self._checked[form_key]

    def _is_settled(self, layout_id: int | None, config_id: int | None) -> bool:
        """Whether all targets are there for certain, and the configuration targets no module besides."""
        fit = self._fits.get(layout_id or 0)
        if layout_id is None or fit is None or fit.open or not fit.fits:
            return False
        config = None if config_id is None else self._configs.get(config_id)
        if config is None:
            return True
        if config.layer_replication or config.target_parameters or config.trainable_token_indices or config.task_type:
            return False  # rules of their own
        if self._side.form.exact and Targeting(config).unsupported(self._side.form):
            return False
        return self._targeted(config) <= self._paths(layout_id)

    def _targeted(self, config: AdapterConfig) -> frozenset[str]:
        """Paths that a configuration targets in the model; once for all configurations that name the same."""
        key = (
            *(config.target_modules, config.exclude_modules, config.modules_to_save),
            *(config.layers_to_transform, config.layers_pattern),
        )
        if key not in self._wanted:
            found = Targeting(config).modules(self._side.form) or ()
            self._wanted[key] = frozenset(one.path for one in found)
        return self._wanted[key]

    def _has_other_weights(self, layout_id: int, base_id: int | None) -> bool:
        grades = None if base_id is None else self._grades_of(base_id)
        if base_id is None or grades is None:
            return False
        return "different" in self._at_targets(layout_id, grades) or bool(self._other_argument(base_id))

    def _other_argument(self, base_id: int) -> str:
        """The first argument in which the model that adapters were trained on is not this one; empty: there is none."""
        if base_id not in self._arguments:
            trained = self._sides.form(base_id)
            found = {} if trained is None else differing_arguments(trained, self._side.form)
            self._arguments[base_id] = min(found, default="")
        return self._arguments[base_id]

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
