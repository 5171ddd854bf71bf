"""The catalog's questions at 100,000 versions, against the fewest steps that a bare `sqlite3` connection can answer
them in.

    python benchmarks/catalog_queries.py [--versions 100000] [--seconds 0.3] [--catalog FILE]

Both run on held connections, warm, without ANALYZE. The bare statements are written by hand for the data that
`synthetic_catalog.py` makes, and each gives the very rows that the catalog gives: what the ratio leaves is SQLAlchemy
(0.1 ms a statement) and not knowing beforehand how many versions a condition fits. `--catalog` keeps the database that
is made, or uses the one that is there.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.synthetic_catalog import BASES, digest, fill, name_of
from registry.catalog import annotation_rows, blobs, journal_rows, lineage, versions
from registry.catalog.engine import create_sqlite, open_database
from registry.catalog.schema import upgrade
from registry.catalog.search import Search, find_ids
from registry.core.digest import index_prefix
from registry.core.query import parse_sort, parse_where
from registry.core.reference import parse_reference

NAMESPACE, SHORT = name_of(5)
NAME = f"{NAMESPACE}/{SHORT}"
IN_ORDER = "SELECT v.id FROM artifact a CROSS JOIN version v ON v.artifact_id = a.id WHERE v.state = 'present'"
BY_ID = "JOIN version v ON v.id = x.version_id JOIN artifact a ON a.id = v.artifact_id WHERE v.state = 'present'"
ALL = "SELECT v.id FROM version v JOIN artifact a ON a.id = v.artifact_id"
BY_NAME = "ORDER BY a.namespace, a.name, v.number DESC LIMIT 100"
OF_NAME = f"JOIN artifact a ON a.id = v.artifact_id WHERE a.namespace = '{NAMESPACE}' AND a.name = '{SHORT}'"


@dataclass(frozen=True)
class Question:
    """What is asked, how the catalog answers, and the bare statement with its parameters."""

    text: str
    ours: Callable[[Connection], Any]
    bare: str
    parameters: tuple[Any, ...] = ()


def find(*where: str, sort: str | None = None, **options: Any) -> Callable[[Connection], list[int]]:
    search = Search(where=parse_where(where), sort=None if sort is None else parse_sort(sort), limit=100, **options)
    return lambda connection: find_ids(connection, search)


def resolve(suffix: str) -> Callable[[Connection], int]:
    reference = parse_reference(NAME + suffix)
    return lambda connection: versions.resolve(connection, reference).id


def listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids))


def questions(prefix: str, newest: list[int]) -> list[Question]:
    """
    Args:
        prefix: of the digest of NAME@7.
        newest: ids of 100 versions.
    """
    base = "bases/base-1@1"
    tensors = [digest("tensor", version, ordinal) for version in range(100, 149) for ordinal in range(0, 16, 4)]
    prefixes = listed([index_prefix(tensor) for tensor in tensors])
    run = digest("run", 999 if BASES < 999 else BASES)[:12]
    return [
        Question("latest", resolve(""), f"SELECT v.id FROM version v {OF_NAME} ORDER BY v.number DESC LIMIT 1"),
        Question(
            "tag", resolve(":prod"), f"SELECT t.version_id FROM tag t {OF_NAME.replace('v.', 't.')} AND t.name = 'prod'"
        ),
        Question("number", resolve("@7"), f"SELECT v.id FROM version v {OF_NAME} AND v.number = 7"),
        Question(
            "digest prefix",
            resolve(f"@sha256:{prefix}"),
            f"SELECT v.id FROM version v {OF_NAME} AND v.manifest_digest BETWEEN ? AND ?",
            (bytes.fromhex(prefix.ljust(64, "0")), bytes.fromhex(prefix.ljust(64, "f"))),
        ),
        Question("list", find(), f"{IN_ORDER} {BY_NAME}"),
        Question(
            "list NAMESPACE/*", find(pattern=f"{NAMESPACE}/*"), f"{IN_ORDER} AND a.namespace = '{NAMESPACE}' {BY_NAME}"
        ),
        Question("list NAME", find(pattern=SHORT), f"{IN_ORDER} AND (a.name = '{SHORT}') {BY_NAME}"),
        Question(
            "newest",
            find(sort="-created_at"),
            "SELECT id FROM version WHERE state = 'present' ORDER BY created_at DESC LIMIT 100",
        ),
        Question(
            "highest metric",
            find(sort="-metric.reward"),
            "SELECT v.id FROM metric x JOIN version v ON v.id = x.version_id WHERE v.state = 'present' "
            "AND x.key = 'reward' AND x.kind = 'finite' ORDER BY x.value DESC LIMIT 100",
        ),
        Question(
            "meta, 1 fits",
            find(f"meta.run = {run}"),
            f"SELECT v.id FROM metadata x {BY_ID} AND x.key = 'run' AND x.text_value = '{run}' {BY_NAME}",
        ),
        Question(
            "meta, 1 % fits",
            find("meta.seed > 989"),
            f"SELECT v.id FROM metadata x {BY_ID} AND x.key = 'seed' AND x.number_value > 989 {BY_NAME}",
        ),
        Question(
            "meta, 10 % fits",
            find("meta.task = walk"),
            f"{IN_ORDER} AND EXISTS (SELECT 1 FROM metadata x WHERE x.version_id = v.id AND x.key = 'task' AND x.text_value = 'walk') {BY_NAME}",
        ),
        Question(
            "metric, 0.1 % fits",
            find("metric.reward > 999"),
            f"SELECT v.id FROM metric x {BY_ID} AND x.key = 'reward' AND x.kind = 'finite' AND x.value > 999 {BY_NAME}",
        ),
        Question(
            "metric, 10 % fits",
            find("metric.reward > 900"),
            f"{IN_ORDER} AND EXISTS (SELECT 1 FROM metric x WHERE x.version_id = v.id AND x.key = 'reward' AND x.value + 0 > 900) {BY_NAME}",
        ),
        Question(
            "metric, 99 % fits",
            find("metric.reward > 10"),
            f"{IN_ORDER} AND EXISTS (SELECT 1 FROM metric x WHERE x.version_id = v.id AND x.key = 'reward' AND x.value + 0 > 10) {BY_NAME}",
        ),
        Question(
            "metric, newest",
            find("metric.reward > 900", sort="-created_at"),
            "SELECT v.id FROM version v WHERE v.state = 'present' AND EXISTS (SELECT 1 FROM metric x WHERE x.version_id = v.id AND x.key = 'reward' AND x.value + 0 > 900) ORDER BY v.created_at DESC LIMIT 100",
        ),
        Question(
            "r, 20 % fits",
            find("r = 8"),
            f"{IN_ORDER} AND v.lora_config_id IN (SELECT id FROM lora_config WHERE r = 8) {BY_NAME}",
        ),
        Question(
            "r and DoRA",
            find("r = 8 and use_dora = true"),
            f"{IN_ORDER} AND v.lora_config_id IN (SELECT id FROM lora_config WHERE r = 8 AND use_dora = 1) {BY_NAME}",
        ),
        Question(
            "target",
            find("target = fc1"),
            f"{IN_ORDER} AND v.lora_config_id IN (SELECT lora_config_id FROM lora_target WHERE target = 'fc1') {BY_NAME}",
        ),
        Question("base", find(base=base), f"{IN_ORDER} AND v.base_id = 1 {BY_NAME}"),
        Question(
            "base, r, target and metric",
            find("r = 8", "target = q_proj", "metric.reward > 900", base=base),
            f"{ALL} WHERE v.state = 'present' AND v.base_id = 1 "
            "AND v.lora_config_id IN (SELECT id FROM lora_config JOIN lora_target ON lora_config_id = id WHERE r = 8 AND target = 'q_proj') "
            f"AND EXISTS (SELECT 1 FROM metric x WHERE x.version_id = v.id AND x.key = 'reward' AND x.value + 0 > 900) {BY_NAME}",
        ),
        Question(
            "tag = prod",
            find("tag = prod"),
            f"{IN_ORDER} AND v.id IN (SELECT version_id FROM tag WHERE name = 'prod') {BY_NAME}",
        ),
        Question(
            "tag = latest",
            find("tag = latest"),
            f"{IN_ORDER} AND v.number = (SELECT max(l.number) FROM version l WHERE l.artifact_id = a.id AND l.state = 'present') {BY_NAME}",
        ),
        Question(
            "peft_version < 0.18", find("peft_version < 0.18"), f"{IN_ORDER} AND v.peft_order < 18000000 {BY_NAME}"
        ),
        Question(
            "size, 0.1 % fits", find("size > 999000"), f"{ALL} WHERE v.state = 'present' AND v.size > 999000 {BY_NAME}"
        ),
        Question(
            "100 records",
            lambda c: versions.records(c, newest),
            f"SELECT v.*, a.*, l.*, b.number, d.name FROM version v JOIN artifact a ON a.id = v.artifact_id LEFT JOIN lora_config l ON l.id = v.lora_config_id LEFT JOIN version b ON b.id = v.base_id LEFT JOIN artifact d ON d.id = b.artifact_id WHERE v.id IN ({listed(newest)})",
        ),
        Question(
            "their metadata",
            lambda c: annotation_rows.metadata_of(c, newest),
            f"SELECT * FROM metadata WHERE version_id IN ({listed(newest)})",
        ),
        Question(
            "196 tensors",
            lambda c: blobs.find_tensors(c, tensors),
            f"SELECT t.prefix, t.ordinal, b.digest, d.digests FROM tensor_index t JOIN blob b ON b.id = t.blob_id JOIN blob_tensors d ON d.blob_id = b.id WHERE t.prefix IN ({prefixes})",
        ),
        Question("outbox", journal_rows.has_pending, "SELECT seq FROM outbox LIMIT 1"),
        Question(
            "history of a name",
            lambda c: journal_rows.events_of(c, NAMESPACE, SHORT),
            f"SELECT v.* FROM event v {OF_NAME}",
        ),
        Question(
            "descendants, 5 %",
            lambda c: lineage.walk(c, 3, up=False),
            "WITH RECURSIVE r(id) AS (SELECT 3 UNION SELECT child_id FROM lineage JOIN r ON parent_id = r.id) SELECT * FROM lineage WHERE parent_id IN r",
        ),
    ]


def median_ms(call: Callable[[], object], seconds: float) -> float:
    call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or (time.perf_counter() < end and len(taken) < 1000):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each way of each question")
    parser.add_argument("--catalog", type=Path, help="where the database is, or is to be")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="catalog-queries-") as folder:
        measure(options.catalog or Path(folder) / "catalog.sqlite", options.versions, options.seconds)


def measure(path: Path, count: int, seconds: float) -> None:
    if not path.exists():
        begin = time.perf_counter()
        create_sqlite(path)
        database = open_database(str(path))
        with database.writing() as connection:
            upgrade(connection)
        with database.writing() as connection:
            fill(connection, count)
        database.close()
        print(f"{count} versions made in {time.perf_counter() - begin:.0f} s, {path.stat().st_size / 1e6:.0f} MB")
    database = open_database(str(path))
    bare = sqlite3.connect(path)
    print(f"SQLite {sqlite3.sqlite_version}; median ms on a held connection\n")
    print(f"{'':28}{'catalog':>9}{'bare':>9}{'ratio':>7}{'rows':>7}")
    with database.reading() as connection:
        prefix = versions.resolve(connection, parse_reference(f"{NAME}@7")).digest[:8]
        newest = find(sort="-created_at")(connection)
        for question in questions(prefix, newest):
            rows = bare.execute(question.bare, question.parameters).fetchall()
            answer = question.ours(connection)
            if isinstance(answer, list) and answer and isinstance(answer[0], int):
                assert answer == [row[0] for row in rows], question.text
            elif isinstance(answer, int) and not isinstance(answer, bool):
                assert [answer] == [row[0] for row in rows], question.text
            ours = median_ms(lambda q=question: q.ours(connection), seconds)
            least = median_ms(lambda q=question: bare.execute(q.bare, q.parameters).fetchall(), seconds)
            print(f"{question.text:28}{ours:9.3f}{least:9.3f}{ours / least:7.1f}{len(rows):7}", flush=True)
    bare.close()
    database.close()


if __name__ == "__main__":
    main()
