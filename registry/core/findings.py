"""A finding: one thing that a rule noticed about a version, alone or against a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "undecided", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a rule.

    Attributes:
        code: `C01` to `C27` are the conditions of docs/compatibility.md; later rules go on from there.
        severity: an `error` means that the version does not fit, or will load wrongly; `undecided` that something is
            missing which would tell (only a comparison says it, no version keeps it).
        subject: the tensor, module or key that it is about; empty for the version as a whole.
        message: one sentence.
        expected: what had to be there, as text; empty where that does not apply.
        found: what was there, as text.
        mend: what the user can do.
    """

    code: str
    severity: Severity
    subject: str
    message: str
    expected: str = ""
    found: str = ""
    mend: str = ""

    def __str__(self) -> str:
        text = f"{self.code} {self.severity}: "
        text += f"{self.subject}: {self.message}" if self.subject else self.message
        if self.expected or self.found:
            text += f" (expected {self.expected or 'nothing'}, found {self.found or 'nothing'})"
        return f"{text}; {self.mend}" if self.mend else text
