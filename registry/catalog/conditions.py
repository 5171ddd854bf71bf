"""One `--where` condition, pattern or base as SQL over `version` joined with `artifact`. How a search puts them
together is in `search.py`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    CompoundSelect,
    Connection,
    Double,
    FromClause,
    Select,
    Table,
    and_,
    exists,
    false,
    func,
    literal,
    or_,
    select,
    union_all,
)

from registry.catalog.names import name_id
from registry.catalog.tables import artifact, layout, lora_config, lora_target, metric, tag, version, version_metadata
from registry.catalog.versions import resolve
from registry.core.annotations import MetadataValue, check_text, parse_metadata_text
from registry.core.errors import InvalidInput, InvalidQuery, InvalidReference
from registry.core.query import FIELDS, Condition, Operator
from registry.core.reference import parse_artifact, parse_moment, parse_reference, shown

COLUMNS: dict[str, Column[Any]] = {
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
}
"""What a field reads, where it is one column. `name`, `base`, `tag` and `target` are not."""

SHARED: dict[FromClause, Column[Any]] = {lora_config: version.c.lora_config_id, layout: version.c.layout_id}
"""Tables with a row for many versions, and the column that leads there."""

MAX_VALUE = 1000
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_VERSION = re.compile(r"([0-9]{1,6})(?:\.([0-9]{1,6}))?(?:\.([0-9]{1,6}))?(?![0-9])")


@dataclass(frozen=True)
class Clause:
    """One condition.

    Attributes:
        asked: of one version.
        hits: the versions that satisfy it, as an index has them; None where none has.
        listed: the same condition where its hits are to be found first.
        on_name: it is decided for a whole name at once.
    """

    asked: ColumnElement[bool]
    hits: Select[int] | CompoundSelect[int] | None = None
    listed: ColumnElement[bool] | None = None
    on_name: bool = False

    def count(self, connection: Connection, *, most: int) -> int | None:
        """Hits, and `most` for more; None where only a walk through all versions would tell."""
        if self.hits is None:
            return None
        some = self.hits.limit(most).subquery()
        found: int = connection.execute(select(func.count()).select_from(some)).scalar_one()
        return found


def check_texts(*texts: str) -> None:
    """
    Raises:
        InvalidQuery: one that no row can hold, or too long to look for.
    """
    try:
        for text in texts:
            check_text(text, f"query '{shown(text)}'", MAX_VALUE)
    except InvalidInput as error:
        raise InvalidQuery(str(error)) from error


def clause_of(connection: Connection, condition: Condition) -> Clause:
    """
    Raises:
        InvalidQuery: a value of the wrong type for its field, or an operator that it does not have.
    """
    check_texts(condition.value, condition.key)
    dialect = connection.dialect.name
    if condition.field == "metric":
        return _metric(condition)
    if condition.field == "meta":
        return _metadata(condition, dialect)
    kind = FIELDS[condition.field]
    if kind == "tag":
        if condition.value == "latest" and condition.op in ("=", "!="):
            return latest() if condition.op == "=" else Clause(~latest().asked, on_name=True)
        if condition.op == "!=":
            return Clause(~tagged(tag.c.name == condition.value).asked)
        return tagged(_compare_text(tag.c.name, condition, dialect))
    if kind == "target":
        return _has_target(condition, dialect)
    if kind == "base":
        if condition.op not in ("=", "!="):
            raise InvalidQuery(f"'{condition}': base is a reference; use = or !=")
        based = on_base(connection, condition.value)
        return based if condition.op == "=" else Clause(~based.asked)
    if condition.field == "name":
        return Clause(_name(condition, dialect), on_name=True)
    column = COLUMNS[condition.field]
    matching = _compare_column(column, condition, dialect)
    for table, reference in SHARED.items():
        if column.table is table:
            return _indexed(reference.in_(select(table.c.id).where(matching)))
    return _indexed(matching) if column is version.c.kind else Clause(matching)


def _indexed(matching: ColumnElement[bool]) -> Clause:
    """A condition on a column of `version` that has an index."""
    return Clause(matching, select(version.c.id).where(matching))


def _compare_column(column: Column[Any], condition: Condition, dialect: str) -> ColumnElement[bool]:
    kind = FIELDS[condition.field]
    if kind == "text":
        return _compare_text(column, condition, dialect)
    if condition.op == "~":
        raise InvalidQuery(f"'{condition}': '~' compares text, and {condition.field} is a {kind}")
    if kind == "boolean":
        return _compare_boolean(column, condition)
    if kind == "version":
        return _compare(column, condition.op, literal(version_order(condition.value, condition), BigInteger))
    if kind == "time":
        return _compare_time(column, condition)
    number = _number(condition)
    if isinstance(number, float) and math.isnan(number):
        raise InvalidQuery(f"'{condition}': nothing compares with NaN; only a metric can be it")
    # With a type of its own: as the column's, PostgreSQL would round 8.5 to 8 and refuse 1e12.
    return _compare(column, condition.op, literal(number, BigInteger if isinstance(number, int) else Double))


def matches(pattern: str, dialect: str) -> Clause:
    """`namespace/name` with `*` and `?`; without a `/` it is matched against both halves."""
    check_texts(pattern)
    namespace, slash, name = pattern.partition("/")
    if slash:
        halves = _glob(artifact.c.namespace, namespace, dialect), _glob(artifact.c.name, name, dialect)
        return Clause(and_(*halves), on_name=True)
    if set(pattern) & set("*?"):
        return Clause(_glob(artifact.c.namespace + "/" + artifact.c.name, pattern, dialect), on_name=True)
    return Clause(or_(artifact.c.namespace == pattern, artifact.c.name == pattern), on_name=True)


def of_kind(kind: str) -> Clause:
    return _indexed(version.c.kind == kind)


def tagged(matching: ColumnElement[bool]) -> Clause:
    hits = select(tag.c.version_id).where(matching)
    return Clause(version.c.id.in_(hits), hits)


def latest() -> Clause:
    """The highest number of its name that is not removed."""
    later = version.alias("later")
    newest = (
        select(func.max(later.c.number))
        .where(later.c.artifact_id == artifact.c.id, later.c.state == "present")
        .correlate(artifact)
    )
    return Clause(version.c.number == newest.scalar_subquery(), on_name=True)


def on_base(connection: Connection, text: str) -> Clause:
    """Versions on a base: `ns/name` means any version of it, a pin or tag just one. Without a base it is unknown.

    Raises:
        InvalidReference, NotFound
    """
    reference = parse_reference(text)
    if text.removeprefix("registry://") != reference.artifact:
        return _indexed(version.c.base_id == resolve(connection, reference).id)
    base = version.alias("base")
    of_name = base.c.artifact_id == name_id(connection, *parse_artifact(reference.artifact))
    return _indexed(version.c.base_id.in_(select(base.c.id).where(of_name)))


def version_order(text: str, condition: Condition | None = None) -> int:
    """A version number such as `0.18` or `0.18.2.dev0` as one integer that sorts as versions do.

    Raises:
        InvalidQuery
    """
    match = _VERSION.match(text)
    if match is None:
        raise InvalidQuery(f"'{condition or text}': '{shown(text)}' is not a version such as 0.18")
    major, minor, patch = (int(part or 0) for part in match.groups())
    return (major * 1_000_000 + minor) * 1_000_000 + patch


def _name(condition: Condition, dialect: str) -> ColumnElement[bool]:
    if condition.op == "=":  # by the halves, which have an index
        namespace, _, name = condition.value.partition("/")
        return and_(artifact.c.namespace == namespace, artifact.c.name == name)
    return _compare_text(artifact.c.namespace + "/" + artifact.c.name, condition, dialect)


def _glob(column: ColumnElement[Any], pattern: str, dialect: str) -> ColumnElement[bool]:
    """`*` and `?` match; all else is literal; upper and lower case differ."""
    if not set(pattern) & set("*?"):
        return column == pattern
    if dialect == "sqlite":
        return column.op("GLOB", is_comparison=True, return_type=None)(pattern.replace("[", "[[]"))
    escaped = re.sub(r"([\\%_])", r"\\\1", pattern).replace("*", "%").replace("?", "_")
    return column.like(escaped, escape="\\")


def _compare(column: ColumnElement[Any], op: Operator, value: ColumnElement[Any] | str) -> ColumnElement[bool]:
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
    return column == value if condition.op == "=" else column != value


def _compare_time(column: ColumnElement[Any], condition: Condition) -> ColumnElement[bool]:
    try:
        moment = parse_moment(condition.value, str(condition))
    except InvalidReference as error:
        raise InvalidQuery(
            f"'{condition}': {shown(condition.value)} is not a date or time such as 2026-11-01"
        ) from error
    if condition.op in ("=", "!=") and _is_date(condition.value):
        within = column >= moment
        if moment.date() < date.max:
            within = and_(within, column < moment + timedelta(days=1))
        return within if condition.op == "=" else ~within
    return _compare(column, condition.op, literal(moment, column.type))


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _number(condition: Condition) -> int | float:
    if _INTEGER.fullmatch(condition.value):
        return int(condition.value)
    try:
        return float(condition.value)
    except ValueError:
        field = f"{condition.field}.{condition.key}" if condition.key else condition.field
        raise InvalidQuery(f"'{condition}': {field} is a number, '{shown(condition.value)}' is not") from None


def _has_target(condition: Condition, dialect: str) -> Clause:
    if condition.op not in ("=", "!=", "~"):
        raise InvalidQuery(f"'{condition}': target is one of a version's target modules; use =, != or ~")
    if condition.op == "!=":
        of_config = lora_target.c.lora_config_id == version.c.lora_config_id
        others = exists().where(of_config).correlate(version)  # an adapter without a configuration has no targets
        return Clause(
            and_(others, ~exists().where(of_config, lora_target.c.target == condition.value).correlate(version))
        )
    matching = _compare_text(lora_target.c.target, condition, dialect)
    return _indexed(version.c.lora_config_id.in_(select(lora_target.c.lora_config_id).where(matching)))


def _said(table: Table, key: str, *alternatives: ColumnElement[bool]) -> Clause:
    """A condition on what was said of versions: rows of `metadata` or `metric` with this key that satisfy one of the
    alternatives. No row satisfies two of them, and an index of the table finds the rows of each."""
    own = and_(table.c.version_id == version.c.id, table.c.key == key, or_(*alternatives))
    asked = select(table.c.version_id).where(own).correlate(version).exists()
    # One SELECT for each: an OR between them would keep SQLite from the index.
    hits = union_all(*(select(table.c.version_id).where(table.c.key == key, one) for one in alternatives))
    return Clause(asked, hits, version.c.id.in_(hits))


def _metric(condition: Condition) -> Clause:
    if condition.op == "~":
        raise InvalidQuery(f"'{condition}': '~' compares text, and a metric is a number")
    number = float(_number(condition))
    alternatives: tuple[ColumnElement[bool], ...]
    nan, plus, minus, finite = (metric.c.kind == kind for kind in ("nan", "inf", "-inf", "finite"))
    if math.isnan(number):
        alternatives = {"=": (nan,), "!=": (metric.c.kind != "nan",)}.get(condition.op, (false(),))
    elif math.isinf(number):
        same, below, above = (plus, (finite, minus), ()) if number > 0 else (minus, (), (finite, plus))
        both = {"<": below, "<=": (*below, same), ">": above, ">=": (*above, same)}
        alternatives = {"=": (same,), "!=": (~same,), **both}[condition.op] or (false(),)
    else:
        alternatives = (and_(finite, _compare(metric.c.value, condition.op, literal(number, Double))),)
        beyond = {"<": minus, "<=": minus, ">": plus, ">=": plus, "!=": ~finite}
        if condition.op in beyond:
            alternatives += (beyond[condition.op],)
    return _said(metric, condition.key, *alternatives)


def _metadata(condition: Condition, dialect: str) -> Clause:
    """As numbers where both are numbers; else as text, and then `<` and `>` see only text beside text."""
    given = parse_metadata_text(condition.value)
    alternatives: tuple[ColumnElement[bool], ...]
    alternatives = (_compare_text(version_metadata.c.text_value, condition, dialect),)
    if isinstance(given, MetadataValue) and condition.op != "~":
        number = version_metadata.c.number_value
        as_number = _compare(number, condition.op, literal(given.number, Double))
        if condition.op in ("=", "!="):
            alternatives = (as_number, and_(number.is_(None), *alternatives))
        else:
            alternatives = (as_number,)
    return _said(version_metadata, condition.key, *alternatives)
