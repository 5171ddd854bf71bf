"""`fsck`: a registry is looked through and nothing is changed. The catalog is made again from the store, beside, and
the two are compared row by row; blobs are held against what names them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select, text

from registry.catalog import tables
from registry.catalog.dump import Dump, IndexRow, dump, index_rows
from registry.catalog.engine import create_sqlite, open_database
from registry.catalog.rows import batches
from registry.core.errors import Corrupt, RegistryNotFound
from registry.core.event import Event, read_payload
from registry.operations.checked_blobs import BlobCheck, file_problems, tensor_problems, wanted_blobs
from registry.operations.compared_rows import Comparison, holders
from registry.operations.context import now
from registry.operations.discover import Location, Unchanged, open_unchanged, write_meta
from registry.operations.histories import Histories, read_histories, seqs_beyond
from registry.operations.holdings import Holdings
from registry.operations.problems import COPY, REINDEX, Fsck, Problem
from registry.operations.replay import Replayed, replay
from registry.store import open_store
from registry.store.interface import Store

STALE = timedelta(hours=1)


def fsck(location: Location, *, deep: bool = False) -> Fsck:
    """Looks a registry through; see `Registry.fsck`."""
    opened = open_unchanged(location)
    try:
        return _Fsck(opened, location.url if location.is_path else opened.what, deep=deep).run()
    finally:
        if opened.database is not None:
            opened.database.close()


class _Fsck:
    def __init__(self, opened: Unchanged, registry: str, *, deep: bool) -> None:
        self._opened = opened
        self._registry = registry
        self._deep = deep
        self._problems: list[Problem] = []
        self._notes: list[str] = []
        self._replayed = Replayed()
        self._blobs: BlobCheck | None = None

    def run(self) -> Fsck:
        store = self._store()
        if store is not None:
            with ExitStack() as stack:
                live = None
                if self._opened.database is None:
                    self._problem("catalog", self._opened.what, "a catalog", self._opened.fault, mend=REINDEX)
                else:
                    # Before the journal is read: what is committed later is not missed, then.
                    connection = stack.enter_context(self._opened.database.reading())
                    live = self._live(connection)
                self._check(store, live)
        blobs = self._blobs
        return Fsck(
            registry=self._registry,
            deep=self._deep,
            problems=tuple(self._problems),
            notes=tuple(dict.fromkeys(self._notes)),
            names=self._replayed.names,
            versions=self._replayed.versions,
            events=self._replayed.events,
            blobs=0 if blobs is None else len(blobs.seen),
            bytes_read=0 if blobs is None else blobs.bytes_read,
        )

    def _problem(
        self, kind: Any, subject: str, expected: str, found: str, versions: Iterable[str] = (), *, mend: str
    ) -> None:
        self._problems.append(Problem(kind, subject, expected, found, tuple(sorted(versions)), mend))

    def _store(self) -> Store | None:
        """The store, where it is one of this registry's."""
        url = self._opened.store_url
        try:
            store = open_store(url)
        except (RegistryNotFound, Corrupt) as error:
            self._problem("store", f"{url}/registry.json", "the registry's identity", str(error), mend=COPY)
            return None
        expected = self._opened.registry_id
        if expected is not None and store.registry_id != expected:
            mend = f"{COPY}, or put the catalog beside its own store"
            self._problem("store", f"{url}/registry.json", f"id {expected}", f"id {store.registry_id}", mend=mend)
            return None
        return store

    def _live(self, connection: Connection) -> _Live | None:
        try:
            if connection.dialect.name == "sqlite":
                for line in connection.execute(text("PRAGMA integrity_check(20)")).scalars():
                    if line != "ok":
                        self._problem("catalog", self._opened.what, "a whole database", str(line), mend=REINDEX)
                for table, *_ in connection.execute(text("PRAGMA foreign_key_check")).fetchmany(20):
                    found = "a reference to a row that is not there"
                    self._problem("catalog", f"table {table}", "whole references", found, mend=REINDEX)
            live = _Live(connection)
        except (Corrupt, ValueError, TypeError, OverflowError) as error:
            self._problem("catalog", self._opened.what, "rows that can be read", str(error)[:300], mend=REINDEX)
            return None
        return live

    def _check(self, store: Store, live: _Live | None) -> None:
        self._blobs = blobs = BlobCheck(store.blobs, {} if live is None else live.holders, deep=self._deep)
        if live is None:
            histories = read_histories(store)
        else:
            self._problems += blobs.problems(wanted_blobs(live.rows, live.holders))
            histories = read_histories(store, instead=live.event, last=live.last)
        self._journal(histories, live)
        holdings = Holdings(store, damaged=blobs.damaged, sizes=blobs.sizes)
        with _scratch(store.registry_id) as connection:
            self._replayed = replay(connection, histories, holdings, check_content=True)
            rebuilt = dump(connection)
            its_holders = holders(rebuilt)
            # Blobs that the catalog does not know, or not any more.
            rest = BlobCheck(store.blobs, its_holders, deep=self._deep)
            rest.seen, rest.tensors, rest.bytes_read = blobs.seen, blobs.tensors, blobs.bytes_read
            self._problems += rest.problems(wanted_blobs(rebuilt, its_holders))
            blobs.bytes_read = rest.bytes_read
            blobs.damaged |= rest.damaged
            stopped = self._stops(histories, blobs)
            comparison = Comparison(
                rebuilt,
                live.rows if live is not None else rebuilt,
                histories,
                stopped=stopped,
                damaged=blobs.damaged,
            )
            self._problems += comparison.tensor_problems()
            if live is not None:
                self._problems += comparison.problems()
                if not stopped:
                    self._problems += comparison.index_problems(index_rows(connection), live.index)
            self._notes += comparison.notes
            if self._deep:
                self._problems += tensor_problems(rebuilt, blobs.tensors)
                suffering = {one for problem in self._problems for one in problem.versions}
                self._problems += file_problems(connection, store.blobs, suffering)
        if live is not None:
            self._later(store, live, blobs.missing | rest.missing)
        self._leftovers(store, set(its_holders) | ({key[0] for key in live.rows["blob"]} if live else set()))

    def _journal(self, histories: Histories, live: _Live | None) -> None:
        """Entries that are missing or damaged; what the outbox still has to write is only told."""
        pending = 0
        for history in histories.names.values():
            for fault in history.faults:
                at = (fault.reference, fault.seq)
                if live is not None and fault.kind == "missing" and at in live.pending:
                    pending += 1
                    continue
                version = None if live is None else live.version_of(at)
                mend = (
                    f"{COPY} (the catalog still knows this event)" if live is not None and at in live.events else COPY
                )
                expected = f"event {fault.seq} of {fault.reference}"
                self._problem("journal", fault.entry, expected, fault.found, [version] if version else (), mend=mend)
        if pending:
            self._notes.append(f"{pending} events are still to be written to the journal; opening the registry does it")

    def _stops(self, histories: Histories, blobs: BlobCheck) -> set[str]:
        """Names that could not be followed to their end; a problem where nothing told so far is the reason."""
        for stop in self._replayed.stops:
            self._notes.append(f"of {stop.name} no more was looked at than its events up to {stop.seq - 1}")
            faults = histories.names[stop.name].faults
            known = stop.blamed is not None or (faults and faults[-1].seq == stop.seq)
            if not known and not any(digest in stop.why for digest in blobs.damaged):
                subject = f"journal/{stop.name}/{stop.seq}.json"
                versions = () if stop.version is None else (f"{stop.name}@{stop.version}",)
                expected = "an event that follows from those before it, and from its manifest"
                self._problem("event", subject, expected, stop.why, versions, mend=COPY)
        return {stop.name for stop in self._replayed.stops}

    def _later(self, store: Store, live: _Live, missing: set[str]) -> None:
        """What only seems to be wrong because others went on meanwhile is taken back."""
        database = self._opened.database
        assert database is not None
        beyond = seqs_beyond(store, live.last)
        if not beyond and not missing:
            return
        with database.reading() as connection:
            last = _last(connection)
            needed = _needed(connection, missing)
        self._problems = [one for one in self._problems if one.subject not in missing or one.subject in needed]
        for reference, seqs in sorted(beyond.items()):
            known = last.get(reference, 0)
            if (newest := max(seqs)) > known:
                expected, found = f"its events up to {newest}, as the journal", f"its events up to {known}"
                self._problem("catalog", reference, expected, found, mend=f"{REINDEX} (an older catalog was put back)")

    def _leftovers(self, store: Store, known: set[str]) -> None:
        orphans = [digest for digest in store.blobs.digests() if digest not in known]
        if orphans:
            self._notes.append(
                f"{len(orphans)} blobs are of no version, {orphans[0]} for one: of pushes that are at work or were "
                "killed; 'registry gc' takes old ones away"
            )
        if stale := store.stale_temporaries(now() - STALE):
            self._notes.append(
                f"{len(stale)} temporary files are old, {stale[0].name} for one; 'registry gc' takes them"
            )


class _Live:
    """The catalog as it stands, from one snapshot.

    Attributes:
        last: seq of the newest event by name.
        pending: events that are to be written to the journal, by name and seq.
        holders: versions by blob.
    """

    def __init__(self, connection: Connection) -> None:
        self.rows: Dump = dump(connection)
        self.index: set[IndexRow] = index_rows(connection)
        self.holders = holders(self.rows)
        self.events: dict[Any, dict[str, Any]] = self.rows["event"]
        self.last = {f"{namespace}/{name}": 0 for namespace, name in self.rows["artifact"]}
        for reference, seq in self.events:
            self.last[reference] = max(self.last.get(reference, 0), seq)
        # Of a row whose name is not there nothing can be followed; that it is there is told by the comparison.
        self.last = {reference: seq for reference, seq in self.last.items() if reference.count("/") == 1}
        artifact, outbox = tables.artifact, tables.outbox
        self.pending = {
            (f"{row.namespace}/{row.name}", row.seq)
            for row in connection.execute(
                select(artifact.c.namespace, artifact.c.name, outbox.c.seq).join(
                    outbox, outbox.c.artifact_id == artifact.c.id
                )
            )
        }

    def version_of(self, at: tuple[str, int]) -> str | None:
        """The version that an event is about."""
        found: str | None = self.events.get(at, {}).get("version_id")
        return found

    def event(self, reference: str, seq: int) -> Event | None:
        """An event as its row has it."""
        row = self.events.get((reference, seq))
        if row is None:
            return None
        namespace, name = reference.split("/")
        version = None if row["version_id"] is None else row["version_id"].rpartition("@")[2]
        try:
            return Event(
                namespace,
                name,
                seq,
                row["kind"],
                None if version is None else int(version),
                row["tag"],
                row["at"],
                row["actor"],
                read_payload(row["payload"]),
            )
        except ValueError:  # a damaged row, which the comparison tells
            return None


def _last(connection: Connection) -> dict[str, int]:
    artifact, event = tables.artifact, tables.event
    rows = connection.execute(
        select(artifact.c.namespace, artifact.c.name, func.max(event.c.seq).label("last"))
        .join(event, event.c.artifact_id == artifact.c.id)
        .group_by(artifact.c.namespace, artifact.c.name)
    )
    return {f"{row.namespace}/{row.name}": row.last for row in rows}


def _needed(connection: Connection, digests: Iterable[str]) -> set[str]:
    """Those of these blobs that a version still needs."""
    blob = tables.blob
    found: set[str] = set()
    for batch in batches(sorted(digests)):
        for table in (tables.version_blob, tables.described_blob):
            rows = connection.scalars(
                select(blob.c.digest)
                .join(table, table.c.blob_id == blob.c.id)
                .where(blob.c.digest.in_(batch), blob.c.state != "deleting")
            )
            found.update(rows)
    return found


@contextmanager
def _scratch(registry_id: str) -> Iterator[Connection]:
    """An empty catalog in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="registry-fsck-") as folder:
        path = Path(folder) / "catalog.sqlite"
        create_sqlite(path)
        database = open_database(str(path))
        try:
            with database.writing() as connection:
                tables.metadata.create_all(connection)
                write_meta(connection, registry_id, None)
                yield connection
        finally:
            database.close()
