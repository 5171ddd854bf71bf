"""What a rule is: a function of a case with a code and a title. Its docstring is its paragraph in
docs/compatibility.md, so it is written for users: what goes wrong, what PEFT does, and what is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from registry.compat.case import Case
from registry.core.findings import Finding

Function = Callable[[Case], Iterable[Finding]]


@dataclass(frozen=True)
class Rule:
    """One condition.

    Attributes:
        code: like `C05`; its findings all have it.
        title: the condition in a few words.
        severity: of its findings, in words where it depends.
    """

    code: str
    title: str
    severity: str
    function: Function


def rule(code: str, title: str, severity: str) -> Callable[[Function], Rule]:
    """Makes a rule of a function."""

    def decorate(function: Function) -> Rule:
        return Rule(code, title, severity, function)

    return decorate
