"""`find_ids` against a model in plain Python, on both databases: the same versions in the same order, whatever is
asked. The model follows the text of docs and docstrings, not the SQL: a version that lacks a field satisfies no
condition on it; text compares by code point; `*` and `?` match, all else is literal; what is missing sorts last."""

from __future__ import annotations

import math
import operator
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert

from registry.catalog import search as searching
from registry.catalog import tables
from registry.catalog.conditions import version_order
from registry.catalog.engine import Database, open_database
from registry.catalog.search import Search, find_ids
from registry.core.digest import sha256_hex
from registry.core.query import FIELDS, SORTABLE, parse_sort, parse_where
from tests.catalog.fixtures import KINDS, Catalogs

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
VERSIONS = 90
NAMES = ("a/b", "a/bb", "a-b/c", "a.b/c", "ab/b", "z/a-b", "z/a.b")
TEXTS = (
    "",
    "a",
    "A",
    "b",
    "ab",
    "aXb",
    "a%b",
    "a_b",
    "a*b",
    "a?b",
    "[ab]",
    "[",
    "]",
    "\\",
    "a\\%",
    "ä",
    "é",
    "🙂",
    "ﬀ",
)
TEXTS += ("10", "9", "9.0", "1e1", "nan", "inf", "true", "a b", "'", "x and y", "it's", "a\nb", "NULL")
PEFT = ("0.9.0", "0.18.0", "0.18.1.dev0", "0.21.2", "1.0", "main")
TARGETS = ("q_proj", "v_proj", "fc%", "[fc]", ".*attn.*")
TAGS = ("prod", "Prod", "best", "v1.0")
NUMBERS = (0.0, 1.0, 2.5, -1.5, 8.0, 10.0, 1e17, -1e-300)
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass
class Version:
    """A version as the model knows it; `columns` by the names of the language."""

    id: int
    namespace: str
    short: str
    number: int
    present: bool
    columns: dict[str, Any]
    base: int | None
    tags: set[str] = field(default_factory=set)
    targets: set[str] = field(default_factory=set)
    meta: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.namespace}/{self.short}"


# ---------------------------------------------------------------- the same versions, in Python and in a database


def make_versions() -> list[Version]:
    rng = random.Random(23)

    def maybe(*choices: Any) -> Any:
        return rng.choice((None, *choices))

    numbers = dict.fromkeys(NAMES, 0)
    made: list[Version] = []
    for identifier in range(1, VERSIONS + 1):
        name = rng.choice(NAMES)
        numbers[name] += 1
        namespace, _, short = name.partition("/")
        adapter = rng.random() < 0.8
        columns: dict[str, Any] = {
            "kind": "adapter" if adapter else rng.choice(("base", "checkpoint")),
            "peft_version": maybe(*PEFT),
            "torch_version": maybe("2.6.0", "2.13.0"),
            "python_version": maybe("3.11.2"),
            "git_commit": maybe("abc", "ABC"),
            "git_dirty": maybe(True, False),
            "size": rng.choice((0, 7, 8, 9, 2**40)),
            "parameters": maybe(0, 10, 10**12),
            "created_at": NOON
            + timedelta(hours=rng.choice((-13, -12, 0, 11, 12, 36)), microseconds=rng.choice((0, 1))),
            "created_by": rng.choice(("me", "Me", "ä")),
            "message": maybe(*TEXTS),
        }
        if adapter:
            columns |= {
                "peft_type": rng.choice(("LORA", "IA3")),
                "r": maybe(1, 8, 9, 10),
                "lora_alpha": maybe(8.0, 8.5, 16.0),
                "lora_dropout": maybe(0.0, 0.1),
                "use_rslora": maybe(True, False),
                "use_dora": maybe(True, False),
                "lora_bias": maybe(True, False),
                "bias": maybe("none", "all"),
                "init_lora_weights": maybe("true", "pissa"),
                "task_type": maybe("CAUSAL_LM"),
                "base_model": maybe(*TEXTS),
            }
        version = Version(identifier, namespace, short, numbers[name], rng.random() < 0.93, columns, None)
        if made and rng.random() < 0.6:
            version.base = rng.choice(made[:20]).id
        if adapter:
            version.targets = set(rng.sample(TARGETS, rng.randint(0, 3)))
        for key in ("k", "task.name"):
            if rng.random() < 0.8:
                words, number = rng.choice(TEXTS), None
                if rng.random() < 0.4:
                    number = rng.choice(NUMBERS)
                    words = repr(number)
                version.meta[key] = words, number
        for key in ("m", "loss/x"):
            if rng.random() < 0.8:
                version.metrics[key] = rng.choice((*NUMBERS, math.nan, math.inf, -math.inf))
        made.append(version)
    for name in NAMES:
        of_name = [one for one in made if one.name == name]
        for tag in TAGS:
            if of_name and rng.random() < 0.6:
                rng.choice(of_name).tags.add(tag)
    return made


MODEL = make_versions()
BY_ID = {version.id: version for version in MODEL}
ADAPTER_COLUMNS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "bias"),
    *("init_lora_weights", "task_type", "base_model"),
}


def store(database: Database) -> None:
    with database.writing() as connection:
        for identifier, name in enumerate(NAMES, 1):
            namespace, _, short = name.partition("/")
            row = {"id": identifier, "namespace": namespace, "name": short, "last_event_at": NOON, "created_at": NOON}
            connection.execute(insert(tables.artifact).values(**row))
        for version in MODEL:
            store_version(connection, version)
        for version in MODEL:
            for tag in version.tags:
                row = {"artifact_id": NAMES.index(version.name) + 1, "name": tag, "version_id": version.id}
                connection.execute(insert(tables.tag).values(**row, moved_at=NOON))


def store_version(connection: Any, version: Version) -> None:
    columns = dict(version.columns)
    adapter = {name: columns.pop(name) for name in ADAPTER_COLUMNS if name in columns}
    parameters, peft = columns.pop("parameters"), columns["peft_version"]
    digest = sha256_hex(b"%d" % version.id)
    if parameters is not None:
        layout = {"id": version.id, "digest": digest, "tensors": 1, "parameters": parameters, "nbytes": 1}
        connection.execute(insert(tables.layout).values(**layout))
    if adapter:
        connection.execute(insert(tables.lora_config).values(id=version.id, digest=digest, **adapter))
        for target in version.targets:
            connection.execute(insert(tables.lora_target).values(lora_config_id=version.id, target=target))
    connection.execute(
        insert(tables.version).values(
            id=version.id,
            artifact_id=NAMES.index(version.name) + 1,
            number=version.number,
            manifest_digest=digest,
            content_digest=digest,
            state="present" if version.present else "removed",
            layout_id=None if parameters is None else version.id,
            lora_config_id=version.id if adapter else None,
            base_id=version.base,
            bytes_new=0,
            peft_order=None if peft in (None, "main") else version_order(peft),
            **columns,
        )
    )
    for key, (words, number) in version.meta.items():
        row = {"version_id": version.id, "key": key, "text_value": words, "number_value": number}
        connection.execute(insert(tables.version_metadata).values(**row))
    for key, value in version.metrics.items():
        finite = math.isfinite(value)
        row = {"version_id": version.id, "key": key, "value": value if finite else None, "at": NOON}
        connection.execute(insert(tables.metric).values(**row, kind="finite" if finite else str(value)))


# ---------------------------------------------------------------- what a question means


def matches(pattern: str, text: str) -> bool:
    expression = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    return re.fullmatch(expression, text, re.DOTALL) is not None


def compare_text(text: str | None, op: str, value: str) -> bool:
    if text is None:
        return False
    if op == "~":
        return matches(value if set(value) & set("*?") else f"*{value}*", text)
    return COMPARE[op](text, value)


def compare_number(number: float | None, op: str, value: float) -> bool:
    return number is not None and COMPARE[op](number, value)


def compare_metric(there: float, op: str, value: float) -> bool:
    if math.isnan(value):  # which can be asked for
        return op in ("=", "!=") and math.isnan(there) == (op == "=")
    return COMPARE[op](there, value)


def is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", text) is not None


def is_latest(version: Version) -> bool:
    return version.number == max(one.number for one in MODEL if one.name == version.name and one.present)


def satisfies(version: Version, name: str, op: str, value: str) -> bool:
    head, _, key = name.partition(".")
    if head == "metric":
        return key in version.metrics and compare_metric(version.metrics[key], op, float(value))
    if head == "meta":
        if key not in version.meta:
            return False
        words, number = version.meta[key]
        if op == "~" or not is_number(value):
            return compare_text(words, op, value)
        if number is not None:
            return COMPARE[op](number, float(value))
        return op in ("=", "!=") and COMPARE[op](words, value)
    if name == "name":
        return compare_text(version.name, op, value)
    if name == "version":
        return compare_number(version.number, op, float(value))
    if name == "tag":
        if value == "latest" and op in ("=", "!="):
            return is_latest(version) == (op == "=")
        if op == "!=":
            return value not in version.tags
        return any(compare_text(tag, op, value) for tag in version.tags)
    if name == "target":
        if op == "!=":
            return bool(version.targets) and value not in version.targets
        return any(compare_text(target, op, value) for target in version.targets)
    if name == "base":
        return version.base is not None and (version.base in base_ids(value)) == (op == "=")
    there = version.columns.get(name)
    if there is None:
        return False
    kind = FIELDS[name]
    if kind == "text":
        return compare_text(there, op, value)
    if kind == "boolean":
        return COMPARE[op](there, value == "true")
    if kind == "version":
        return there != "main" and COMPARE[op](numbers_of(there), numbers_of(value))
    if kind == "time":
        moment = datetime.fromisoformat(value).replace(tzinfo=UTC)
        if len(value) == 10 and op in ("=", "!="):
            return (there.date() == date.fromisoformat(value)) == (op == "=")
        return COMPARE[op](there, moment)
    return compare_number(there, op, float(value))


def numbers_of(version: str) -> list[int]:
    """The first three numbers of a version."""
    return [*map(int, re.findall(r"[0-9]+", version)[:3]), 0, 0][:3]


def base_ids(reference: str) -> set[int]:
    name, _, pin = reference.partition("@")
    return {one.id for one in MODEL if one.name == name and (not pin or one.number == int(pin))}


def sort_keys(version: Version, name: str) -> list[Any]:
    """None is what is missing."""
    head, _, key = name.partition(".")
    if head == "metric":
        value = version.metrics.get(key, math.nan)
        return [value if math.isfinite(value) else None]
    if head == "meta":
        words, number = version.meta.get(key, (None, None))
        return [number, words]
    if name == "name":
        return [version.namespace, version.short]
    if name == "version":
        return [version.number]
    if name == "base":
        base = None if version.base is None else BY_ID[version.base]
        return [None] * 3 if base is None else [base.namespace, base.short, base.number]
    there = version.columns.get(name)
    if name == "peft_version" and there is not None:
        return [None if there == "main" else numbers_of(there)]
    return [there]


def found_by_model(search: dict[str, Any]) -> list[int]:
    found = [version for version in MODEL if version.present]
    for name, op, value in search["where"]:
        found = [version for version in found if satisfies(version, name, op, value)]
    if search["tag"]:
        found = [version for version in found if satisfies(version, "tag", "=", search["tag"])]
    if search["kind"]:
        found = [version for version in found if version.columns["kind"] == search["kind"]]
    if search["base"]:
        found = [version for version in found if satisfies(version, "base", "=", search["base"])]
    if pattern := search["pattern"]:
        found = [version for version in found if matches_name(pattern, version)]
    found.sort(key=lambda version: (version.namespace, version.short, -version.number))
    if sort := search["sort"]:
        descending = sort.startswith("-")
        count = len(sort_keys(MODEL[0], sort.removeprefix("-")))
        for place in reversed(range(count)):
            keyed = [(sort_keys(version, sort.removeprefix("-"))[place], version) for version in found]
            there = sorted((pair for pair in keyed if pair[0] is not None), key=lambda p: p[0], reverse=descending)
            found = [version for _, version in there] + [version for key, version in keyed if key is None]
    return [version.id for version in found][: search["limit"]]


def matches_name(pattern: str, version: Version) -> bool:
    if "/" in pattern:
        namespace, _, short = pattern.partition("/")
        return matches(namespace, version.namespace) and matches(short, version.short)
    if set(pattern) & set("*?"):
        return matches(pattern, version.name)
    return pattern in (version.namespace, version.short)


# ---------------------------------------------------------------- questions


patterns = st.one_of(
    st.sampled_from((*TEXTS, "*", "?", "**", "a*", "*b", "a?b", "?%?", "*\\*", "[*", "*]", "a*b*", "?🙂", "*ä")),
    st.text("ab%_*?[]\\^-", max_size=4),
)
any_number = st.sampled_from(
    ("0", "1", "2.5", "8", "8.5", "9", "10", "-1.5", "1e17", "1e300", "7", "40", "1099511627776")
)
equality = st.sampled_from(("=", "!="))
ordering = st.sampled_from(tuple(COMPARE))
with_pattern = st.sampled_from((*COMPARE, "~"))
references = st.sampled_from(
    sorted({one.name for one in MODEL} | {f"{one.name}@{one.number}" for one in MODEL if one.present})
)


def operands(name: str) -> tuple[st.SearchStrategy[str], st.SearchStrategy[str]]:
    """Operators and values of a field."""
    head = name.partition(".")[0]
    if head == "metric":
        return ordering, st.one_of(any_number, st.sampled_from(("nan", "inf", "-inf")))
    if head == "meta" or name == "message":
        return with_pattern, st.one_of(patterns, any_number)
    kind = FIELDS[name]
    if kind == "text":
        return with_pattern, st.one_of(patterns, st.sampled_from((*NAMES, "LORA", "me", "2.6.0", "none", "adapter")))
    if kind == "tag":
        return with_pattern, st.one_of(patterns, st.sampled_from((*TAGS, "latest")))
    if kind == "target":
        return st.sampled_from(("=", "!=", "~")), st.one_of(patterns, st.sampled_from(TARGETS))
    if kind == "boolean":
        return equality, st.sampled_from(("true", "false"))
    if kind == "base":
        return equality, references
    if kind == "version":
        return ordering, st.sampled_from(("0.9", "0.18", "0.18.1", "0.21.2", "1", "0"))
    if kind == "time":
        return ordering, st.sampled_from(
            ("2026-11-22", "2026-11-23", "2026-11-24T00:00", "2026-11-23T12:00:00.000001", "2026-11-25", "9999-12-31")
        )
    return ordering, any_number


@st.composite
def where(draw: st.DrawFn) -> tuple[str, str, str]:
    name = draw(st.sampled_from((*FIELDS, "meta.k", "meta.task.name", "meta.none", "metric.m", "metric.loss/x")))
    ops, values = operands(name)
    value = draw(values.filter(lambda text: not ("'" in text and '"' in text)))
    return name, draw(ops), value


searches = st.fixed_dictionaries(
    {
        "where": st.lists(where(), max_size=3),
        "pattern": st.none() | st.sampled_from((*NAMES, "a", "b", "a*", "*/b*", "z/*", "?/b", "*-b/*", "a%", "a_b")),
        "tag": st.none() | st.sampled_from((*TAGS, "latest")),
        "kind": st.none() | st.sampled_from(("adapter", "base", "checkpoint")),
        "base": st.none() | references,
        "sort": st.none()
        | st.builds(
            operator.add,
            st.sampled_from(("", "-")),
            st.sampled_from((*sorted(SORTABLE), "meta.k", "meta.none", "metric.m", "metric.loss/x")),
        ),
        "limit": st.none() | st.integers(0, 12),
    }
)


def quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


@pytest.fixture(scope="module", params=KINDS)
def database(request: pytest.FixtureRequest, catalogs: Catalogs) -> Iterator[Database]:
    made = open_database(catalogs.database(request.param))
    store(made)
    yield made
    made.close()


def agree(database: Database, search: dict[str, Any], walked: bool) -> None:
    texts = [f"{name} {op} {quoted(value)}" for name, op, value in search["where"]]
    sort = None if search["sort"] is None else parse_sort(search["sort"])
    asked = Search(**{**search, "where": parse_where(texts), "sort": sort})
    with pytest.MonkeyPatch.context() as patch, database.reading() as connection:
        patch.setattr(searching, "_expected", lambda *_: math.inf if walked else 0)
        found = find_ids(connection, asked)
    assert found == found_by_model(search), (texts, search)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(search=searches, walked=st.booleans())
def test_any_search_finds_what_the_model_finds(database: Database, search: dict[str, Any], walked: bool) -> None:
    """`walked` chooses between the two forms of the statement."""
    agree(database, search, walked)


NOTHING: dict[str, Any] = dict.fromkeys(("pattern", "tag", "kind", "base", "sort", "limit")) | {"where": []}


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(condition=where(), walked=st.booleans())
def test_any_single_condition_finds_what_the_model_finds(
    database: Database, condition: tuple[str, str, str], walked: bool
) -> None:
    agree(database, {**NOTHING, "where": [condition]}, walked)


@pytest.mark.parametrize("name", [*sorted(SORTABLE), "meta.k", "meta.none", "metric.m", "metric.none"])
def test_every_field_sorts_both_ways(database: Database, name: str) -> None:
    for direction in ("", "-"):
        for limit in (None, 0, 1, 30, 1000):
            for walked in (False, True):
                agree(database, {**NOTHING, "sort": direction + name, "limit": limit}, walked)
