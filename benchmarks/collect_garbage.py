"""How long `gc` takes on a catalog of many versions of which one in a hundred is removed: purging (a transaction and a
journal object each), looking for other places of their tensors in the packed digests of all blobs, deleting the rows.

Run: PYTHONPATH=. python benchmarks/collect_garbage.py [VERSIONS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import func, insert, select, update

from benchmarks.synthetic_catalog import fill
from registry import Registry
from registry.catalog import garbage, tables

VERSIONS = 10_000


def main() -> None:
    versions = int(sys.argv[1]) if len(sys.argv) > 1 else VERSIONS
    with tempfile.TemporaryDirectory() as folder, Registry.init(Path(folder) / "registry") as registry:
        with registry._context.writing() as connection:
            fill(connection, versions)
        say_removed(registry)
        with registry._context.reading() as connection:
            blobs: int = connection.execute(select(func.count()).select_from(tables.blob)).scalar_one()
        started = time.perf_counter()
        planned = registry.gc(dry_run=True)
        print(f"{versions} versions, {blobs} blobs, {len(planned.purged)} removed")
        print(f"  dry run          {time.perf_counter() - started:7.3f} s")
        print(f"  one scan for other places {scan(registry):.3f} s")
        started = time.perf_counter()
        done = registry.gc()
        seconds = time.perf_counter() - started
        print(f"  gc               {seconds:7.3f} s, {1000 * seconds / len(done.purged):.1f} ms a purged version")
        started = time.perf_counter()
        registry.gc()
        print(f"  nothing to do    {time.perf_counter() - started:7.3f} s")


def say_removed(registry: Registry) -> None:
    """Gives the versions that `fill` left removed their events, a month ago."""
    at = datetime.now(UTC) - timedelta(days=30)
    with registry._context.writing() as connection:
        rows = connection.execute(select(tables.artifact.c.id, tables.artifact.c.last_seq)).all()
        seqs: dict[int, int] = {row.id: row.last_seq for row in rows}
        removed = select(tables.version.c.id, tables.version.c.artifact_id).where(tables.version.c.state == "removed")
        for version_id, artifact_id in connection.execute(removed).all():
            seqs[artifact_id] += 1
            row = {"artifact_id": artifact_id, "seq": seqs[artifact_id], "kind": "removed", "version_id": version_id}
            connection.execute(insert(tables.event).values(**row, at=at, actor="somebody", payload='{"why":null}'))
        for artifact_id, seq in seqs.items():
            connection.execute(update(tables.artifact).where(tables.artifact.c.id == artifact_id).values(last_seq=seq))


def scan(registry: Registry) -> float:
    """Seconds to look through the tensors of all blobs once."""
    with registry._context.reading() as connection:
        ids = set(connection.scalars(select(tables.blob.c.id).limit(100)))
        prefixes = garbage.indexed_prefixes(connection, ids)
        started = time.perf_counter()
        after: int | None = 0
        while after is not None:
            _, after = garbage.other_places(connection, prefixes, ids, after=after)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
