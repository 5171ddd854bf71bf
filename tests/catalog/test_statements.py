"""The hot statements use an index, on SQLite and without statistics: ANALYZE is maintenance that a user may never run.
`benchmarks/catalog_queries.py` has their times at 100,000 versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, event

from benchmarks.synthetic_catalog import START, digest, fill, name_of
from registry.catalog import annotation_rows, blobs, journal_rows, lineage, names, tags, versions
from registry.catalog import search as searching
from registry.catalog.contents import findings_of, read_contents
from registry.catalog.engine import open_database
from registry.catalog.search import Search
from registry.core.errors import Corrupt
from registry.core.query import parse_sort, parse_where
from registry.core.reference import parse_reference
from tests.catalog.fixtures import Catalogs

VERSIONS = 3000
NAMESPACE, SHORT = name_of(5)
NAME = f"{NAMESPACE}/{SHORT}"


@pytest.fixture(scope="module")
def connection(catalogs: Catalogs) -> Iterator[Connection]:
    database = open_database(catalogs.database("sqlite"))
    with database.writing() as opened:
        fill(opened, VERSIONS)
    with database.reading() as opened:
        assert opened.exec_driver_sql("SELECT name FROM sqlite_master WHERE name LIKE 'sqlite_stat%'").all() == []
        yield opened
    database.close()


def plans(connection: Connection, call: Callable[[Connection], object]) -> list[list[str]]:
    """The steps of each statement that a call executes."""
    executed: list[tuple[str, Any]] = []

    def note(_c: object, _cursor: object, statement: str, parameters: Any, _context: object, _many: bool) -> None:
        executed.append((statement, parameters))

    event.listen(connection, "before_cursor_execute", note)
    try:
        call(connection)
    finally:
        event.remove(connection, "before_cursor_execute", note)
    driver = connection.connection.driver_connection
    assert executed
    assert driver is not None
    return [
        [row[3] for row in driver.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()]
        for statement, parameters in executed
    ]


def scans(found: list[list[str]]) -> list[str]:
    """Steps that read a whole table or index. What a subquery has made is not a table."""
    small = ("SCAN anon_1", "SCAN reached", "SCAN CONSTANT ROW", "SCAN outbox")
    return [step for steps in found for step in steps if step.startswith("SCAN") and not step.startswith(small)]


def find(
    *where: str, sort: str | None = None, limit: int | None = None, **options: Any
) -> Callable[[Connection], object]:
    search = Search(where=parse_where(where), sort=None if sort is None else parse_sort(sort), limit=limit, **options)
    return lambda connection: searching.find_ids(connection, search)


def resolve(reference: str) -> Callable[[Connection], versions.VersionKey]:
    return lambda connection: versions.resolve(connection, parse_reference(reference))


def by_digest(connection: Connection) -> None:
    key = resolve(f"{NAME}@7")(connection)
    assert resolve(f"{NAME}@sha256:{key.digest[:8]}")(connection) == key
    assert versions.version_by_digest(connection, key.artifact_id, key.digest) == key


def locked(connection: Connection) -> names.LockedName:
    return names.lock_name(connection, NAMESPACE, SHORT, at=START)


def contents(connection: Connection) -> None:
    with pytest.raises(Corrupt):  # at the end: synthetic layouts have synthetic digests
        read_contents(connection, 500)


LOOKUPS: dict[str, Callable[[Connection], object]] = {
    "latest": resolve(NAME),
    "tag": resolve(f"{NAME}:prod"),
    "tag at a time": resolve(f"{NAME}:prod@{{2999-01-01}}"),
    "number": resolve(f"{NAME}@7"),
    "digest and its prefix": by_digest,
    "records": lambda c: versions.records(c, [500, 501]),
    "tags of versions": lambda c: versions.tags_of(c, [500, 501]),
    "same content": lambda c: versions.same_content(c, 5, digest("content", 500), 1000),
    "metadata": lambda c: annotation_rows.metadata_of(c, [500, 501]),
    "metrics": lambda c: annotation_rows.metrics_of(c, [500, 501]),
    "contents": contents,
    "findings": lambda c: findings_of(c, 500),
    "find tensors": lambda c: blobs.find_tensors(c, [digest("tensor", v, 4) for v in range(100, 200)]),
    "tensors of a version": lambda c: blobs.tensors_of_version(c, 500),
    "outbox": journal_rows.has_pending,
    "pending events": lambda c: journal_rows.pending_events(c, 1000),
    "history of a name": lambda c: journal_rows.events_of(c, NAMESPACE, SHORT),
    "history of a tag": lambda c: journal_rows.events_of(c, NAMESPACE, SHORT, tag="prod"),
    "history of a version": lambda c: journal_rows.events_of(c, NAMESPACE, SHORT, version_id=500),
    "ancestors": lambda c: lineage.walk(c, 1500, up=True),
    "descendants": lambda c: lineage.walk(c, 3, up=False),
    "lock": locked,
    "current tag": lambda c: tags.current(locked(c), "prod"),
}


@pytest.mark.parametrize("question", LOOKUPS)
def test_a_lookup_reads_no_whole_table(connection: Connection, question: str) -> None:
    assert scans(plans(connection, LOOKUPS[question])) == []


SEARCHES: dict[str, Callable[[Connection], object]] = {
    "metadata text": find("meta.run = " + digest("run", 999)[:12]),
    "metadata number": find("meta.seed > 990"),
    "metadata number equal": find("meta.seed = 7"),
    "common metadata": find("meta.task = walk"),
    "metric": find("metric.reward > 999"),
    "metric not finite": find("metric.reward = nan"),
    "metric in both directions": find("metric.reward <= 1 and metric.loss >= 1"),
    "base": find(base="bases/base-1@1"),
    "any version of a base": find(base="bases/base-1"),
    "base in a condition": find("base = bases/base-2@1"),
    "tag": find(tag="prod"),
    "tag in a condition": find("tag = best"),
    "r": find("r = 8"),
    "target": find("target = fc1"),
    "kind": find(kind="base"),
    "name": find(f"name = {NAME}"),
    "exact pattern": find(pattern=NAME),
    "everything together": find(
        "r = 8", "target = q_proj", "metric.reward > 900", "meta.task = walk", base="bases/base-1@1"
    ),
}


@pytest.mark.parametrize("question", SEARCHES)
def test_a_search_reads_no_whole_table(connection: Connection, question: str) -> None:
    assert scans(plans(connection, SEARCHES[question])) == []


WALKS: dict[str, tuple[Callable[[Connection], object], str]] = {
    "everything": (find(limit=9), "SCAN artifact USING COVERING INDEX"),
    "everything by name": (find(sort="name", limit=9), "SCAN artifact USING COVERING INDEX"),
    "everything, last name first": (find(sort="-name", limit=9), "SCAN artifact USING COVERING INDEX"),
    "newest": (find(sort="-created_at", limit=9), "SCAN version USING INDEX ix_version_created_at"),
    "oldest": (find(sort="created_at", limit=9), "SCAN version USING INDEX ix_version_created_at"),
    "a namespace": (find(pattern=f"{NAMESPACE}/*", limit=9), "SEARCH artifact USING COVERING INDEX"),
    "latest": (find(tag="latest", limit=9), "SCAN artifact USING COVERING INDEX"),
    "highest metric": (find(sort="-metric.reward", limit=9), "SEARCH metric USING COVERING INDEX"),
    "lowest metric": (find(sort="metric.reward", limit=9), "SEARCH metric USING COVERING INDEX"),
    "what most are": (find("r >= 4", kind="adapter", limit=9), "SCAN artifact USING COVERING INDEX"),
    "common metadata": (find("meta.task = walk", limit=9), "SCAN artifact USING COVERING INDEX"),
    "common metrics": (find("metric.reward > 10 and metric.loss > 10", limit=9), "SCAN artifact USING COVERING INDEX"),
    "newest of many": (
        find("metric.reward > 10", sort="-created_at", limit=9),
        "SCAN version USING INDEX ix_ver",
    ),
}


@pytest.mark.parametrize("question", WALKS)
def test_a_limited_list_of_much_follows_an_index_and_stops(connection: Connection, question: str) -> None:
    """Nothing is sorted, so that the limit ends it early."""
    call, begins = WALKS[question]
    last = plans(connection, call)[-1]
    assert last[0].startswith(begins)
    assert [step for step in last if "TEMP B-TREE FOR ORDER BY" in step] == []


@pytest.mark.parametrize("question", ["common metadata", "common metrics", "newest of many"])
def test_a_walk_asks_each_version_by_its_key(connection: Connection, question: str) -> None:
    """The index of values, which SQLite might prefer without statistics, would be read once for each version."""
    steps = plans(connection, WALKS[question][0])[-1]
    asked = [step for step in steps if step.startswith(("SEARCH metric", "SEARCH metadata"))]
    assert asked
    assert all("USING PRIMARY KEY (version_id=? AND key=?)" in step for step in asked)


def test_a_search_for_little_does_not_depend_on_the_names(connection: Connection) -> None:
    run = digest("run", 999)[:12]
    last = plans(connection, find(f"meta.run = {run}", f"name ~ {NAMESPACE[:2]}", limit=9))[-1]
    assert last[0] == "SEARCH version USING INTEGER PRIMARY KEY (rowid=?)"
