"""From a question to version ids: patterns, tags, bases and `--where` conditions as SQL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, false, func, literal, or_, select

from registry.catalog.names import name_id
from registry.catalog.tables import artifact, layout, lora_config, lora_target, metric, tag, version, version_metadata
from registry.catalog.versions import resolve
from registry.core.errors import InvalidQuery
from registry.core.query import FIELDS, Condition, Operator, SortKey
from registry.core.reference import parse_artifact, parse_moment, parse_reference, shown

_COLUMNS: dict[str, ColumnElement[Any]] = {
    "name": artifact.c.namespace + "/" + artifact.c.name,
    "version": version.c.number,
    "kind": version.c.kind,
    "base_model": lora_config.c.base_model,
    "peft_type": lora_config.c.peft_type,
    "r": lora_config.c.r,
    "lora_alpha": lora_config.c.lora_alpha,
    "lora_dropout": lora_config.c.lora_dropout,
    "use_rslora": lora_config.c.use_rslora,
    "use_dora": lora_config.c.use_dora,
    "lora_bias": lora_config.c.lora_bias,
    "bias": lora_config.c.bias,
    "init_lora_weights": lora_config.c.init_lora_weights,
    "task_type": lora_config.c.task_type,
    "peft_version": version.c.peft_order,
    "torch_version": version.c.torch_version,
    "python_version": version.c.python_version,
    "git_commit": version.c.git_commit,
    "git_dirty": version.c.git_dirty,
    "size": version.c.size,
    "parameters": layout.c.parameters,
    "created_at": version.c.created_at,
    "created_by": version.c.created_by,
    "message": version.c.message,
    "base": version.c.base_id,
}


@dataclass(frozen=True)
class Search:
    """A question.

    Attributes:
        pattern: `namespace/name`, with `*` and `?`; without a `/` it is matched against both halves.
        base_ids: row ids of the versions that count as the base, see `base_ids`.
        sort: either way, versions that lack the field and metrics that are not finite come last.
    """

    pattern: str | None = None
    base_ids: tuple[int, ...] | None = None
    tag: str | None = None
    kind: str | None = None
    where: tuple[Condition, ...] = ()
    sort: SortKey | None = None
    limit: int | None = None


def find_ids(connection: Connection, search: Search) -> list[int]:
    """Row ids of the present versions that satisfy all of the search, sorted.

    The default order is by name, newest version first.

    Raises:
        InvalidQuery: a value of the wrong type for its field.
    """
    dialect = connection.dialect.name
    statement = (
        select(version.c.id)
        .join(artifact, artifact.c.id == version.c.artifact_id)
        .outerjoin(lora_config, lora_config.c.id == version.c.lora_config_id)
        .outerjoin(layout, layout.c.id == version.c.layout_id)
        .where(version.c.state == "present")
    )
    if search.pattern is not None:
        statement = statement.where(_matches(search.pattern, dialect))
    if search.kind is not None:
        statement = statement.where(version.c.kind == search.kind)
    if search.tag is not None:
        statement = statement.where(_has_tag(tag.c.name == search.tag, search.tag, "="))
    if search.base_ids is not None:
        statement = statement.where(version.c.base_id.in_(search.base_ids))
    for condition in search.where:
        statement = statement.where(_condition(connection, condition, dialect))
    statement = _sorted(statement, search.sort)
    if search.limit is not None:
        statement = statement.limit(search.limit)
    return list(connection.scalars(statement))


def _sorted(statement: Select[int], sort: SortKey | None) -> Select[int]:
    by_name = (artifact.c.namespace, artifact.c.name, version.c.number.desc())
    if sort is None:
        return statement.order_by(*by_name)
    if sort.field == "metric":
        statement = statement.outerjoin(metric, and_(metric.c.version_id == version.c.id, metric.c.key == sort.key))
        keys: list[ColumnElement[Any]] = [metric.c.value]
    elif sort.field == "meta":
        statement = statement.outerjoin(
            version_metadata,
            and_(version_metadata.c.version_id == version.c.id, version_metadata.c.key == sort.key),
        )
        keys = [version_metadata.c.number_value, version_metadata.c.text_value]
    else:
        keys = [_COLUMNS[sort.field]]
    ordered = [(key.desc() if sort.descending else key.asc()).nulls_last() for key in keys]
    return statement.order_by(*ordered, *by_name)


def _matches(pattern: str, dialect: str) -> ColumnElement[bool]:
    namespace, slash, name = pattern.partition("/")
    if slash:
        return and_(_glob(artifact.c.namespace, namespace, dialect), _glob(artifact.c.name, name, dialect))
    if set(pattern) & set("*?"):
        return _glob(_COLUMNS["name"], pattern, dialect)
    return or_(artifact.c.namespace == pattern, artifact.c.name == pattern)


def _glob(column: ColumnElement[Any], pattern: str, dialect: str) -> ColumnElement[bool]:
    """`*` and `?` match; all else is literal; upper and lower case differ."""
    if not set(pattern) & set("*?"):
        return column == pattern
    if dialect == "sqlite":
        return column.op("GLOB", is_comparison=True, return_type=None)(pattern.replace("[", "[[]"))
    escaped = re.sub(r"([\\%_])", r"\\\1", pattern).replace("*", "%").replace("?", "_")
    return column.like(escaped, escape="\\")


def _condition(connection: Connection, condition: Condition, dialect: str) -> ColumnElement[bool]:
    if condition.field == "metric":
        return _metric(condition)
    if condition.field == "meta":
        return _metadata(condition, dialect)
    kind = FIELDS[condition.field]
    if kind == "tag":
        return _has_tag(_compare_text(tag.c.name, condition, dialect), condition.value, condition.op)
    if kind == "target":
        return _has_target(condition, dialect)
    if kind == "base":
        return _base(connection, condition)
    column = _COLUMNS[condition.field]
    if kind == "text":
        return _compare_text(column, condition, dialect)
    if condition.op == "~":
        raise InvalidQuery(f"'{condition}': '~' compares text, and {condition.field} is a {kind}")
    if kind == "boolean":
        return _compare_boolean(column, condition)
    if kind == "version":
        return _compare(column, condition.op, version_order(condition.value, condition))
    if kind == "time":
        return _compare_time(column, condition)
    return _compare(column, condition.op, _number(condition))


def _compare(column: ColumnElement[Any], op: Operator, value: object) -> ColumnElement[bool]:
    comparisons = {
        "=": column == value,
        "!=": column != value,
        "<": column < value,
        "<=": column <= value,
        ">": column > value,
        ">=": column >= value,
    }
    return comparisons[op]


def _compare_text(column: ColumnElement[Any], condition: Condition, dialect: str) -> ColumnElement[bool]:
    if condition.op != "~":
        return _compare(column, condition.op, condition.value)
    pattern = condition.value if set(condition.value) & set("*?") else f"*{condition.value}*"
    return _glob(column, pattern, dialect)


def _compare_boolean(column: ColumnElement[Any], condition: Condition) -> ColumnElement[bool]:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    value = words.get(condition.value.lower())
    if value is None or condition.op not in ("=", "!="):
        raise InvalidQuery(f"'{condition}': {condition.field} is true or false, compared by = and !=")
    return _compare(column, condition.op, value)


def _compare_time(column: ColumnElement[Any], condition: Condition) -> ColumnElement[bool]:
    moment = parse_moment(condition.value, str(condition))
    if condition.op in ("=", "!=") and len(condition.value) == len("2026-11-01"):
        within = and_(column >= moment, column < moment + timedelta(days=1))
        return within if condition.op == "=" else ~within
    return _compare(column, condition.op, moment)


def _number(condition: Condition) -> float:
    try:
        return float(condition.value)
    except ValueError:
        raise InvalidQuery(f"'{condition}': {condition.field} is a number, {shown(condition.value)!r} is not") from None


def version_order(text: str, condition: Condition | None = None) -> int:
    """A version number such as `0.18` or `0.18.2.dev0` as one integer that sorts as versions do.

    Raises:
        InvalidQuery
    """
    match = re.match(r"(\d{1,6})(?:\.(\d{1,6}))?(?:\.(\d{1,6}))?", text)
    if match is None:
        raise InvalidQuery(f"'{condition}': {shown(text)!r} is not a version such as 0.18")
    major, minor, patch = (int(part or 0) for part in match.groups())
    return (major * 1_000_000 + minor) * 1_000_000 + patch


def _has_tag(matching: ColumnElement[bool], value: str, op: str) -> ColumnElement[bool]:
    if value == "latest" and op in ("=", "!="):
        newest = (
            select(func.max(version.c.number))
            .where(version.c.state == "present", version.c.artifact_id == artifact.c.id)
            .correlate(artifact)
            .scalar_subquery()
        )
        return version.c.number == newest if op == "=" else version.c.number != newest
    if op == "!=":
        return version.c.id.not_in(select(tag.c.version_id).where(tag.c.name == value))
    return version.c.id.in_(select(tag.c.version_id).where(matching))


def _has_target(condition: Condition, dialect: str) -> ColumnElement[bool]:
    if condition.op not in ("=", "!=", "~"):
        raise InvalidQuery(f"'{condition}': target is one of a version's target modules; use =, != or ~")
    if condition.op == "!=":
        having = select(lora_target.c.lora_config_id).where(lora_target.c.target == condition.value)
        return and_(version.c.lora_config_id.is_not(None), version.c.lora_config_id.not_in(having))
    matching = _compare_text(lora_target.c.target, condition, dialect)
    return version.c.lora_config_id.in_(select(lora_target.c.lora_config_id).where(matching))


def _base(connection: Connection, condition: Condition) -> ColumnElement[bool]:
    if condition.op not in ("=", "!="):
        raise InvalidQuery(f"'{condition}': base is a reference; use = or !=")
    ids = base_ids(connection, condition.value)
    return version.c.base_id.in_(ids) if condition.op == "=" else version.c.base_id.not_in(ids)


def base_ids(connection: Connection, text: str) -> tuple[int, ...]:
    """Row ids of the versions that a base names: `ns/name` means every version of it, a pin or tag just one.

    Raises:
        InvalidReference, NotFound
    """
    reference = parse_reference(text)
    if text.removeprefix("registry://") == reference.artifact:
        namespace, name = parse_artifact(reference.artifact)
        artifact_id = name_id(connection, namespace, name)
        return tuple(connection.execute(select(version.c.id).where(version.c.artifact_id == artifact_id)).scalars())
    return (resolve(connection, reference).id,)


def _metric(condition: Condition) -> ColumnElement[bool]:
    if condition.op == "~":
        raise InvalidQuery(f"'{condition}': '~' compares text, and a metric is a number")
    number = _number(condition)
    of_key = metric.c.key == condition.key
    nan, plus, minus = (metric.c.kind == kind for kind in ("nan", "inf", "-inf"))
    if number != number:
        kinds: dict[str, ColumnElement[bool]] = {"=": nan, "!=": ~nan}
        matching = kinds.get(condition.op, false())
    elif number in (float("inf"), float("-inf")):
        same = plus if number > 0 else minus
        below = and_(~nan, ~plus) if number > 0 else false()
        above = false() if number > 0 else and_(~nan, ~minus)
        table = {"=": same, "!=": ~same, "<": below, "<=": or_(below, same), ">": above, ">=": or_(above, same)}
        matching = table[condition.op]
    else:
        matching = _compare(metric.c.value, condition.op, number)
        beyond = {"<": minus, "<=": minus, ">": plus, ">=": plus, "!=": metric.c.kind != "finite"}
        if condition.op in beyond:
            matching = or_(matching, beyond[condition.op])
    return version.c.id.in_(select(metric.c.version_id).where(of_key, matching))


def _metadata(condition: Condition, dialect: str) -> ColumnElement[bool]:
    try:
        number: float | None = float(condition.value)
    except ValueError:
        number = None
    text_matches = _compare_text(version_metadata.c.text_value, condition, dialect)
    if condition.op == "~" or number is None or number != number:
        matching = text_matches
    elif condition.op in ("=", "!="):
        as_number = _compare(version_metadata.c.number_value, condition.op, literal(number))
        unset = version_metadata.c.number_value.is_(None)
        matching = or_(as_number, and_(unset, text_matches))
    else:
        matching = _compare(version_metadata.c.number_value, condition.op, literal(number))
    of_key = version_metadata.c.key == condition.key
    return version.c.id.in_(select(version_metadata.c.version_id).where(of_key, matching))
