"""What a merge says of itself: errors and unmoved weights by module, the versions it is made of, and the time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from registry.core.findings import Finding


@dataclass(frozen=True)
class ModuleReport:
    """One module of a result.

    Attributes:
        sources: how many sources change it.
        of_ranks: sum of their ranks.
        rank: of the result; None in a base.
        norm: Frobenius norm of the true weighted sum of the updates.
        error: of the difference of the result to it, before rounding into an adapter, after it in a base.
        unmoved: share of the weights of a base that rounding left as they were, of those that the update changes; None
            for an adapter.
    """

    path: str
    sources: int
    of_ranks: int
    rank: int | None
    norm: float
    error: float
    unmoved: float | None = None
    elements: int = 0

    @property
    def relative_error(self) -> float:
        """Of the true weighted sum; infinite where that is zero and the result is not."""
        if self.error == 0:
            return 0.0
        return self.error / self.norm if self.norm else math.inf


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        reference: of the version, `namespace/name@number`.
        created: False where the name had this very version already.
        found: the version that the same recipe had made before; then nothing was computed, and `modules` is empty.
        method: its name.
        sources: (reference, weight), in the order of computation.
        base: that the result is of, or that it was merged into.
        cross_terms: the method works on A and B apart, so most of its error is from cross terms.
        modules: in order of path.
        findings: what the compatibility rules said of the sources.
        seconds: without the push.
    """

    reference: str
    created: bool
    found: str | None
    method: str
    sources: tuple[tuple[str, float], ...]
    base: str | None
    into_base: bool
    cross_terms: bool
    modules: tuple[ModuleReport, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def relative_error(self) -> float | None:
        """||result - true weighted sum|| / ||true weighted sum||, over all modules; None where nothing was computed."""
        return relative_error(self.modules) if self.modules else None

    @property
    def unmoved(self) -> float | None:
        """Share of the weights of a base that rounding left as they were; None for an adapter."""
        counted = [one for one in self.modules if one.unmoved is not None]
        elements = sum(one.elements for one in counted)
        return sum((one.unmoved or 0.0) * one.elements for one in counted) / elements if elements else None

    def to_json(self) -> dict[str, Any]:
        """Plain data; infinite numbers as the registry spells them."""
        return {
            "reference": self.reference,
            "created": self.created,
            "found": self.found,
            "method": self.method,
            "sources": [{"reference": one, "weight": weight} for one, weight in self.sources],
            "base": self.base,
            "into_base": self.into_base,
            "relative_error": plain(self.relative_error),
            "cross_terms": self.cross_terms,
            "unmoved": self.unmoved,
            "seconds": self.seconds,
            "modules": [
                {
                    "module": one.path,
                    "sources": one.sources,
                    "of_ranks": one.of_ranks,
                    "rank": one.rank,
                    "norm": plain(one.norm),
                    "relative_error": plain(one.relative_error),
                    "unmoved": one.unmoved,
                }
                for one in self.modules
            ],
            "findings": [asdict(one) for one in self.findings],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Remerged:
    """A recipe computed once more, against the version that it made.

    Attributes:
        equal: tensors that are bit-equal.
        relative_difference: ||again - stored|| / ||stored|| over all tensors; 0 where all are bit-equal.
        worst: the tensor that is farthest off, with its relative difference; None where all are bit-equal.
        environment: what differs between the environment of then and now, as texts.
    """

    reference: str
    tensors: int
    equal: int
    relative_difference: float
    worst: tuple[str, float] | None
    environment: tuple[str, ...]
    seconds: float

    def __bool__(self) -> bool:
        return self.equal == self.tensors


def relative_error(modules: Iterable[ModuleReport]) -> float:
    """Over several modules together."""
    norm = error = 0.0
    for one in modules:
        norm, error = math.hypot(norm, one.norm), math.hypot(error, one.error)
    if error == 0:
        return 0.0
    return error / norm if norm else math.inf


def plain(number: float | None) -> float | str | None:
    """A number as JSON can hold it."""
    if number is None or math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
