"""The language of `--where` and `--sort`: `field op value`, joined by `and`. Parsed here into values;
the catalog turns them into SQL. A version that lacks a field satisfies no condition on it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from registry.core.errors import InvalidQuery
from registry.core.reference import shown

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "~"]
FieldType = Literal["text", "number", "boolean", "version", "time", "base", "tag", "target"]

FIELDS: dict[str, FieldType] = {
    "name": "text",
    "version": "number",
    "kind": "text",
    "tag": "tag",
    "base": "base",
    "base_model": "text",
    "peft_type": "text",
    "r": "number",
    "lora_alpha": "number",
    "lora_dropout": "number",
    "use_rslora": "boolean",
    "use_dora": "boolean",
    "lora_bias": "boolean",
    "bias": "text",
    "init_lora_weights": "text",
    "task_type": "text",
    "target": "target",
    "peft_version": "version",
    "torch_version": "text",
    "python_version": "text",
    "git_commit": "text",
    "git_dirty": "boolean",
    "size": "number",
    "parameters": "number",
    "created_at": "time",
    "created_by": "text",
    "message": "text",
}
"""Typed columns and how they compare. `meta.KEY` and `metric.KEY` come beside them."""

SORTABLE = frozenset(FIELDS) - {"tag", "target"}
_OPERATORS = ("!=", "<=", ">=", "=", "<", ">", "~")
_CONDITION = re.compile(
    r"""\s*(?P<field>[A-Za-z_][A-Za-z0-9_./-]*)\s*(?P<op>!=|<=|>=|==|=|<|>|~)\s*
        (?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^\s"'=<>!~][^\s"']*))\s*""",
    re.VERBOSE,
)
_AND = re.compile(r"and\b", re.IGNORECASE)
MAX_CONDITIONS = 50


@dataclass(frozen=True, slots=True)
class Condition:
    """One `field op value`. For `meta.k` and `metric.k`, `field` is `meta` or `metric` and `key` is k."""

    field: str
    op: Operator
    value: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.field}{'.' + self.key if self.key else ''} {self.op} {self.value}"


@dataclass(frozen=True, slots=True)
class SortKey:
    """One field to sort by, descending where the user wrote `-field`."""

    field: str
    descending: bool
    key: str = ""


def parse_where(texts: Iterable[str]) -> tuple[Condition, ...]:
    """Reads conditions; several texts are joined by `and` too.

    Raises:
        InvalidQuery: says where; an unknown field lists the known ones and the nearest.
    """
    found: list[Condition] = []
    for text in texts:
        position = 0
        while True:
            match = _CONDITION.match(text, position)
            if match is None:
                raise InvalidQuery(
                    f"cannot read '{shown(text[position:].strip())}' in '{shown(text)}': expected "
                    f"'field op value' with an operator of {' '.join(_OPERATORS)}, for instance 'r >= 8'"
                )
            field, key = _field(match["field"])
            value = next(v for v in (match["double"], match["single"], match["bare"]) if v is not None)
            op: Operator = "=" if match["op"] == "==" else match["op"]  # type: ignore[assignment]  # the regex lists them
            found.append(Condition(field, op, value, key))
            position = match.end()
            if position == len(text):
                break
            joint = _AND.match(text, position)
            if joint is None:
                raise InvalidQuery(
                    f"expected 'and' before '{shown(text[position:])}' in '{shown(text)}' "
                    "(a value with spaces goes in quotes; 'or' is not part of the language)"
                )
            position = joint.end()
    if len(found) > MAX_CONDITIONS:
        raise InvalidQuery(f"{len(found)} conditions; {MAX_CONDITIONS} is the most")
    return tuple(found)


def parse_sort(text: str) -> SortKey:
    """Reads `field` or `-field`.

    Raises:
        InvalidQuery
    """
    descending = text.startswith("-")
    field, key = _field(text.removeprefix("-"))
    if not key and field not in SORTABLE:
        raise InvalidQuery(f"cannot sort by {field}: a version has several; sortable are {', '.join(sorted(SORTABLE))}")
    return SortKey(field, descending, key)


def _field(text: str) -> tuple[str, str]:
    head, dot, key = text.partition(".")
    if head in ("meta", "metric") and dot:
        if not key:
            raise InvalidQuery(f"{text!r} needs a key, for instance {head}.reward")
        return head, key
    if text in FIELDS:
        return text, ""
    near = difflib.get_close_matches(text, [*FIELDS, "meta.KEY", "metric.KEY"], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise InvalidQuery(f"unknown field '{shown(text)}'{hint} Known: {', '.join(FIELDS)}, meta.KEY, metric.KEY")
