"""The answer to a compatibility question: a verdict, and the findings that it follows from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from registry.compat.case import Purpose
from registry.core.findings import Finding

Verdict = Literal["fits", "does not fit", "undecided"]
_ORDER = {"error": 0, "undecided": 1, "warning": 2, "info": 3}


@dataclass(frozen=True)
class Compatibility:
    """Whether an adapter fits a model. True in a condition unless it does not fit.

    Attributes:
        adapter: reference of the adapter.
        model: reference of the base version, or the name of the model's class; None: the adapter by itself.
        peft: version of PEFT that was asked about.
        findings: errors first.
        matched: targets that the model has a module for, in its sizes.
        total: targets of the adapter.
    """

    adapter: str
    model: str | None
    peft: str
    purpose: Purpose
    findings: tuple[Finding, ...]
    matched: int
    total: int

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.severity == "error")

    @property
    def undecided(self) -> tuple[Finding, ...]:
        """What is missing that would tell."""
        return tuple(one for one in self.findings if one.severity == "undecided")

    @property
    def verdict(self) -> Verdict:
        if self.errors:
            return "does not fit"
        return "undecided" if self.undecided else "fits"

    def __str__(self) -> str:
        """The verdict and a table of the findings."""
        against = f" into {self.model}" if self.model else ""
        lines = [f"{self.adapter}{against}, to {self.purpose} with PEFT {self.peft}: {self.verdict}"]
        if self.total and self.model:
            lines.append(f"{self.matched} of {self.total} targets are there")
        where = max((len(one.subject) for one in self.findings), default=0)
        lines += [
            f"{one.code}  {one.severity:9}  {one.subject:{min(where, 40)}}  {replace(one, subject='')}".rstrip()
            for one in self.findings
        ]
        return "\n".join(lines)

    def __bool__(self) -> bool:
        return self.verdict != "does not fit"


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then by code; each once."""
    return tuple(sorted(dict.fromkeys(findings), key=lambda one: (_ORDER[one.severity], one.code)))
