"""For every kind of damage: it is found and named, and so is who suffers from it. A whole registry has no problems."""

from __future__ import annotations

import multiprocessing
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection

from registry import Registry
from registry.catalog import tables
from registry.catalog.dump import LEFT_OUT, LEFT_OUT_COLUMNS
from registry.core.errors import RegistryNotFound
from registry.operations import fsck
from registry.operations.histories import Histories
from registry.operations.holdings import Holdings
from registry.operations.problems import Problem
from registry.operations.replay import Replayed, replay
from tests.failures.support import photograph
from tests.operations import varied
from tests.operations.pushing import push_some

CHANGED = [
    (table.name, column.name)
    for table in tables.metadata.sorted_tables
    for column in table.columns
    if table.name not in LEFT_OUT and column.name not in LEFT_OUT_COLUMNS.get(table.name, ())
]
FILLED = [table.name for table in tables.metadata.sorted_tables if table.name != "registry_meta"]
ROWS = [table.name for table in tables.metadata.sorted_tables if table.name not in LEFT_OUT]


@pytest.fixture
def root(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "registry"))


def problems(root: Path, *, deep: bool = False) -> list[Problem]:
    return list(Registry.fsck(root, deep=deep).problems)


def only(root: Path, *, deep: bool = False) -> Problem:
    (found,) = problems(root, deep=deep)
    return found


def blob_path(root: Path, digest: str) -> Path:
    return root / "blobs" / "sha256" / digest[:2] / digest


def blob_of(root: Path, reference: str, role: str) -> str:
    with Registry.open(root) as registry:
        return next(blob for blob, its in registry.show(reference).contents.blobs if its == role)


def needing(root: Path, digest: str) -> tuple[str, ...]:
    """Every version that needs a blob."""
    with Registry.open(root) as registry:
        versions = [version.reference for version in registry.find()]
        return tuple(sorted(one for one in versions if digest in dict(registry.show(one).contents.blobs)))


def change(root: Path, *statements: str) -> None:
    """Damages rows as a failing disk or a hand would: nothing is checked."""
    with closing(sqlite3.connect(root / "catalog.sqlite", isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            connection.execute(statement)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_registry_has_no_problems_and_is_not_changed(root: Path, deep: bool) -> None:
    before = photograph(root)
    found = Registry.fsck(root, deep=deep)
    assert (found.problems, found.notes, found.whole, found.deep) == ((), (), True, deep)
    assert (found.names, found.versions) == (12, 14)
    stored = sum(path.stat().st_size for path in root.glob("blobs/sha256/*/*"))
    assert found.bytes_read >= stored if deep else found.bytes_read < stored / 10
    assert photograph(root) == before


def test_a_whole_registry_on_a_server_has_no_problems(tmp_path: Path, postgresql_url: str) -> None:
    (tmp_path / "source").mkdir()
    with Registry.init(postgresql_url, store=tmp_path / "store") as registry:
        varied.fill(registry, tmp_path / "source")
    assert Registry.fsck(postgresql_url, deep=True).problems == ()
    shutil.rmtree(tmp_path / "store" / "journal" / "walk" / "plain")
    (problem,) = Registry.fsck(postgresql_url).problems
    assert (problem.kind, problem.versions) == ("journal", ("walk/plain@1",))


def test_an_empty_registry_has_no_problems(tmp_path: Path) -> None:
    Registry.init(tmp_path / "registry").close()
    assert Registry.fsck(tmp_path / "registry", deep=True).whole
    with pytest.raises(RegistryNotFound):
        Registry.fsck(tmp_path / "nothing")


def test_a_registry_that_cannot_be_written_is_checked(root: Path) -> None:
    for path in (*root.rglob("*"), root):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert Registry.fsck(root, deep=True).problems == ()
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_it_has_no_problems_while_and_after_others_push(root: Path) -> None:
    context = multiprocessing.get_context("spawn")
    pushing = [context.Process(target=push_some, args=(root, number)) for number in range(2)]
    for process in pushing:
        process.start()
    while any(process.is_alive() for process in pushing):
        assert problems(root) == []
    for process in pushing:
        process.join()
        assert process.exitcode == 0
    found = Registry.fsck(root, deep=True)
    assert (found.problems, found.versions) == ((), 24)


# Blobs.


def test_a_flipped_byte_is_found_where_every_byte_is_read(root: Path) -> None:
    digest = blob_of(root, "run/model@1", "tensors")
    path = blob_path(root, digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    rewrite(path, bytes(data))
    assert problems(root) == []
    found = only(root, deep=True)
    assert (found.kind, found.subject) == ("blob", digest)
    assert found.found.endswith("other bytes in w1")
    assert found.versions == needing(root, digest) == ("run/full@1", "run/model@1", "run/model@2", "run/shards@1")
    assert "copy of the store" in found.mend


@pytest.mark.parametrize("deep", [False, True])
def test_a_truncated_blob_is_found(root: Path, deep: bool) -> None:
    digest = blob_of(root, "walk/perturb@1", "tensors")
    path = blob_path(root, digest)
    size = path.stat().st_size
    rewrite(path, path.read_bytes()[: size // 2])
    found = only(root, deep=deep)
    assert (found.kind, found.subject) == ("blob", digest)
    assert (found.expected, found.found) == (f"{size} bytes", f"{size // 2} bytes")
    assert found.versions == needing(root, digest)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("role", ["tensors", "file", "layout", "manifest"])
def test_a_blob_that_is_gone_is_found(root: Path, role: str, deep: bool) -> None:
    digest = blob_of(root, "walk/perturb@1", role)
    blob_path(root, digest).unlink()
    versions = needing(root, digest)
    found = only(root, deep=deep)
    assert (found.kind, found.subject) == (role if role in ("layout", "manifest") else "blob", digest)
    assert (found.found, found.versions) == ("no such blob", versions)


@pytest.mark.parametrize("role", ["header", "data"])
def test_a_part_of_a_file_that_is_gone_is_found(root: Path, role: str) -> None:
    digest = blob_of(root, "run/full@1", role)
    blob_path(root, digest).unlink()
    found = only(root)
    assert (found.subject, found.versions) == (digest, needing(root, digest))


def test_what_describes_a_version_is_looked_for(root: Path) -> None:
    with Registry.open(root) as registry:
        (event, *_) = [one for one in registry.events("run/full") if one.kind == "described"]
    digest = event.payload["blobs"]["probe"]
    blob_path(root, digest).unlink()
    found = only(root)
    assert (found.kind, found.subject, found.versions) == ("blob", digest, ("run/full@1",))


@pytest.mark.parametrize("role", ["manifest", "layout"])
def test_another_document_of_the_same_size_is_found(root: Path, role: str) -> None:
    digest = blob_of(root, "walk/base@1", role)
    path = blob_path(root, digest)
    rewrite(path, path.read_bytes().replace(b"q.weight", b"z.weight").replace(b'"base"', b'"bass"'))
    found = only(root)
    assert (found.kind, found.subject, found.versions) == (role, digest, needing(root, digest))


def test_a_header_that_says_something_else_is_found(root: Path) -> None:
    digest = blob_of(root, "walk/base@1", "tensors")
    path = blob_path(root, digest)
    rewrite(path, path.read_bytes().replace(b"q.weight", b"z.weight"))
    found = only(root)
    assert (found.kind, found.subject, found.versions) == ("blob", digest, needing(root, digest))


def test_something_else_than_a_file_is_found(root: Path) -> None:
    digest = blob_of(root, "walk/base@1", "tensors")
    blob_path(root, digest).unlink()
    blob_path(root, digest).mkdir()
    found = only(root)
    assert (found.subject, found.versions) == (digest, needing(root, digest))


def test_an_external_version_lacks_nothing(root: Path) -> None:
    digest = blob_of(root, "hub/stays@1", "external")
    assert not blob_path(root, digest).exists()
    assert problems(root) == []


def test_blobs_of_no_version_are_told_and_no_problem(root: Path) -> None:
    with Registry.open(root) as registry, registry._context.store.blobs.batch() as batch:
        put = batch.put([b"an orphan"])
        batch.commit()
    found = Registry.fsck(root)
    assert found.whole
    assert put.digest in found.notes[0]


# The journal and the folder.


@pytest.mark.parametrize("change", ["missing", "damaged", "of another registry", "another event"])
@pytest.mark.parametrize("seq", [1, 3, "newest"])
def test_a_journal_entry_that_cannot_be_believed_is_found(root: Path, seq: int | str, change: str) -> None:
    with Registry.open(root) as registry:
        events = registry.events("walk/perturb")
    seq = events[-1].seq if seq == "newest" else seq
    path = root / "journal" / "walk" / "perturb" / f"{seq}.json"
    event = events[int(seq) - 1]
    if change == "missing":
        path.unlink()
    elif change == "damaged":
        rewrite(path, path.read_bytes().replace(b'"actor":"', b'"actor":"x'))
    elif change == "of another registry":
        rewrite(path, event.document("0" * 32))
    else:
        rewrite(path, (path.parent.parent / "base" / "1.json").read_bytes())
    found = only(root)
    assert (found.kind, found.subject) == ("journal", f"journal/walk/perturb/{seq}.json")
    assert found.versions == (f"walk/perturb@{event.version}",)
    assert "the catalog still knows this event" in found.mend


def test_an_event_that_the_outbox_lost_too_is_a_problem(root: Path) -> None:
    """With its mark it would still be written."""
    (root / "journal" / "walk" / "base" / "2.json").unlink()
    assert only(root).subject == "journal/walk/base/2.json"
    change(root, "INSERT INTO outbox SELECT id, 2 FROM artifact WHERE namespace = 'walk' AND name = 'base'")
    found = Registry.fsck(root)
    assert found.whole
    assert "still to be written" in found.notes[0]
    Registry.open(root).close()
    assert Registry.fsck(root).notes == ()


def test_a_pending_event_that_the_journal_contradicts_does_not_keep_fsck_from_looking(root: Path) -> None:
    path = root / "journal" / "walk" / "base" / "2.json"
    rewrite(path, path.read_bytes().replace(b'"actor":"', b'"actor":"x'))
    change(root, "INSERT INTO outbox SELECT id, 2 FROM artifact WHERE namespace = 'walk' AND name = 'base'")
    assert only(root).subject == "journal/walk/base/2.json"


@pytest.mark.parametrize("identity", [None, b"{}", b'{"id":"%s","store_format":1}' % (b"0" * 32)])
def test_a_folder_that_is_not_the_registrys_is_found(root: Path, identity: bytes | None) -> None:
    path = root / "registry.json"
    path.unlink()
    if identity is not None:
        path.write_bytes(identity)
    assert only(root).kind == "store"


def test_without_its_catalog_the_store_is_checked_all_the_same(root: Path) -> None:
    digest = blob_of(root, "walk/base@1", "tensors")
    versions = needing(root, digest)
    blob_path(root, digest).unlink()
    (root / "catalog.sqlite").unlink()
    lost, blob = problems(root)
    assert (lost.kind, lost.mend) == ("catalog", "registry reindex")
    assert (blob.subject, blob.versions) == (digest, versions)
    (root / "catalog.sqlite").write_bytes(b"no database at all" * 400)
    assert [one.kind for one in problems(root)] == ["catalog", "blob"]


# Rows.

_rebuilt: dict[object, tuple[dict[str, list[tuple[object, ...]]], Replayed]] = {}


@pytest.fixture
def one_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only rows are damaged the catalog that follows from the store is worked out once, and copied: the same as
    long as all that the damaged one can tell the replay is the same."""

    def once(connection: Connection, histories: Histories, holdings: Holdings, *, check_content: bool) -> Replayed:
        told = (sorted(holdings._damaged), sorted(holdings._sizes.items()), check_content)
        journal = [(name, one.times, one.faults) for name, one in sorted(histories.names.items())]
        key = repr((told, journal))
        if key not in _rebuilt:
            done = replay(connection, histories, holdings, check_content=check_content)
            rows = {name: list(map(tuple, connection.exec_driver_sql(f"SELECT * FROM {name}"))) for name in FILLED}
            _rebuilt[key] = (rows, done)
        else:
            for name, rows in _rebuilt[key][0].items():
                if rows:
                    places = ", ".join("?" * len(rows[0]))
                    connection.exec_driver_sql(f"INSERT INTO {name} VALUES ({places})", rows)
        return _rebuilt[key][1]

    monkeypatch.setattr(fsck, "replay", once)


@pytest.mark.usefixtures("one_store")
@pytest.mark.parametrize(("table", "column"), CHANGED)
def test_one_changed_value_is_found_in_every_column(root: Path, table: str, column: str) -> None:
    with closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        kinds = {name: kind for _, name, kind, *_ in connection.execute(f"PRAGMA table_info({table})")}
        keys = [name for _, name, *_, key in connection.execute(f"PRAGMA table_info({table})") if key]
        row = connection.execute(
            f"SELECT {', '.join(keys)}, {column} FROM {table} ORDER BY {column} IS NULL, length({column}) DESC LIMIT 1"
        ).fetchone()
    new: object
    if isinstance(row[-1], bytes):
        new = row[-1][:-1] + bytes([row[-1][-1] ^ 1])
    elif isinstance(row[-1], str) or (row[-1] is None and kinds[column] == "TEXT"):
        new = (row[-1] or "") + "x"
    elif kinds[column] == "BOOLEAN":
        new = 0 if row[-1] else 1
    elif row[-1] is None and kinds[column].startswith("BLOB"):
        new = bytes(32)
    else:
        new = 2 * (row[-1] or 0) + 1000
    with closing(sqlite3.connect(root / "catalog.sqlite", isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        where = " AND ".join(f"{key} = ?" for key in keys)
        done = connection.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (new, *row[:-1]))
        assert done.rowcount == 1
    found = problems(root)
    assert found
    assert all(one.kind in ("row", "catalog", "store", "journal", "blob") for one in found)
    if table not in ("artifact", "registry_meta", "tag", "blob"):
        assert any(one.kind in ("row", "catalog") for one in found)


@pytest.mark.usefixtures("one_store")
@pytest.mark.parametrize("table", ROWS)
def test_a_row_that_is_gone_is_found_in_every_table(root: Path, table: str) -> None:
    with closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        keys = [name for _, name, *_, key in connection.execute(f"PRAGMA table_info({table})") if key]
    named = ", ".join(keys)
    change(root, f"DELETE FROM {table} WHERE ({named}) IN (SELECT {named} FROM {table} LIMIT 1)")
    if table == "registry_meta":
        assert [one.kind for one in problems(root)] == ["catalog"]
    else:
        assert any(one.kind in ("row", "catalog") for one in problems(root))


EXTRA = {
    "artifact": "INSERT INTO artifact VALUES (900, 'walk', 'extra', 0, 0, 1, 1)",
    "layout": "INSERT INTO layout VALUES (900, randomblob(32), 0, 0, 0)",
    "layout_tensor": "INSERT INTO layout_tensor SELECT id, 99, 'x', 'F32', '' FROM layout LIMIT 1",
    "target": "INSERT INTO target SELECT layout_id, 'x', kind, 1, 1, 1 FROM target LIMIT 1",
    "module": "INSERT INTO module SELECT id, 'x', 'linear', 1, 1, 0, NULL, 1, 1, 1 FROM architecture LIMIT 1",
    "lora_config": "INSERT INTO lora_config (id, digest, peft_type) VALUES (900, randomblob(32), 'LORA')",
    "lora_target": "INSERT INTO lora_target SELECT id, 'x' FROM lora_config LIMIT 1",
    "blob": "INSERT INTO blob VALUES (900, randomblob(32), 0, 'present', NULL, 1)",
    "tensor_index": "INSERT INTO tensor_index SELECT 12345, blob_id, 0 FROM tensor_index LIMIT 1",
    "tag": "INSERT INTO tag SELECT artifact_id, 'x', id, 0, 1 FROM version LIMIT 1",
    "lineage": "INSERT INTO lineage SELECT max(id), min(id), 'converted_from', NULL FROM version",
    "metadata": "INSERT INTO metadata SELECT id, 'x', 'y', NULL FROM version LIMIT 1",
    "metric": "INSERT INTO metric SELECT id, 'x', 1, 'finite', NULL, 1 FROM version LIMIT 1",
    "finding": "INSERT INTO finding SELECT id, 99, 'C01', 'error', '', 'x', '', '', '' FROM version LIMIT 1",
    "event": "INSERT INTO event SELECT artifact_id, seq + 1, 'note', version_id, NULL, at, actor, '{}' FROM event "
    "ORDER BY seq DESC LIMIT 1",
    "version_blob": "INSERT INTO version_blob SELECT version_id, 99, blob_id, role FROM version_blob LIMIT 1",
    "version_file": "INSERT INTO version_file SELECT version_id, 'x', sha256, size, NULL, blob_position, 1, NULL "
    "FROM version_file LIMIT 1",
    "described_blob": "INSERT INTO described_blob SELECT artifact_id, seq, 'x', blob_id FROM described_blob LIMIT 1",
}


@pytest.mark.usefixtures("one_store")
@pytest.mark.parametrize("table", EXTRA)
def test_a_row_too_many_is_found(root: Path, table: str) -> None:
    change(root, EXTRA[table])
    found = problems(root)
    if table == "event":  # it may be that the journal has lost it
        assert any(one.kind == "journal" for one in found)
    else:
        assert len([one for one in found if one.kind == "row" and one.subject.startswith(f"{table} ")]) == 1
    assert all(one.mend.startswith("registry reindex") for one in found if one.kind == "row")


def test_a_changed_row_names_all_who_share_it(root: Path) -> None:
    change(root, "UPDATE layout SET parameters = parameters + 1 WHERE id = (SELECT layout_id FROM target LIMIT 1)")
    found = only(root)
    assert (found.kind, found.mend) == ("row", "registry reindex")
    assert found.subject.endswith(": parameters")
    assert found.versions == ("walk/broken@1", "walk/perturb@1", "walk/perturb@2", "walk/plain@1")


def test_reindex_mends_every_row(root: Path) -> None:
    change(root, *(statement for table, statement in EXTRA.items() if table != "event"))
    change(root, "UPDATE version SET message = 'other', kind = 'base'", "DELETE FROM tag", "DELETE FROM tensor_index")
    assert problems(root)
    Registry.reindex(root)
    assert problems(root) == []
