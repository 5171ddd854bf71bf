"""All rules in the order of their codes, and the two questions that are asked of them: does an adapter fit a model, and
what is to be said of an adapter alone."""

from __future__ import annotations

from collections.abc import Iterable

from registry.compat import rules_complete, rules_config, rules_content, rules_model, rules_targets
from registry.compat.case import AdapterSide, Case
from registry.compat.compatibility import Compatibility, in_order
from registry.compat.rule import Rule
from registry.core.adapter_config import some_of_each
from registry.core.findings import Finding

RULES: tuple[Rule, ...] = tuple(
    sorted(
        (
            one
            for module in (rules_complete, rules_config, rules_content, rules_model, rules_targets)
            for one in vars(module).values()
            if isinstance(one, Rule)
        ),
        key=lambda one: one.code,
    )
)


def check_case(case: Case) -> Compatibility:
    """Runs every rule; where the behaviour probe was run, nothing is left undecided."""
    findings = run(case)
    if case.proof is not None:
        findings = tuple(one for one in findings if one.severity != "undecided")
    return Compatibility(
        adapter=case.adapter.reference,
        model=None if case.model is None else case.model.reference,
        peft=case.peft,
        purpose=case.purpose,
        findings=findings,
        matched=case.placing.matched,
        total=len(case.adapter.targets),
    )


def run(case: Case) -> tuple[Finding, ...]:
    """What all rules find, errors first; of one code and severity at most twenty and a count of the rest."""
    return in_order(some_of_each(found for one in RULES for found in one.function(case)))


def adapter_findings(adapter: AdapterSide) -> Iterable[Finding]:
    """What is to be said of an adapter without a model, as its version keeps it."""
    return (one for one in run(Case(adapter)) if one.severity != "undecided")
