"""What is particular to the store in a local folder: its layout, how it is opened, and strangers in its folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest

from registry.core.errors import (
    Conflict,
    Corrupt,
    DigestMismatch,
    InvalidInput,
    RegistryNotFound,
    SchemaOutOfDate,
    StorageError,
)
from registry.store import create_store, durable, open_store
from registry.store.interface import Temporary
from registry.store.local import LocalStore

ID = "0123456789abcdef0123456789abcdef"
DATA = b"some tensors"
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore.create(tmp_path / "store", ID)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def put(store: LocalStore, data: bytes = DATA) -> Path:
    with store.blobs.batch() as batch:
        blob = batch.put([data])
        batch.commit()
    return store.root / "blobs" / "sha256" / blob.digest[:2] / blob.digest


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


class TestLayout:
    def test_is_what_docs_format_says(self, store: LocalStore) -> None:
        put(store)
        store.journal.append("walk", "perturb", 12, b"{}")
        assert files_below(store.root) == {
            "registry.json",
            f"blobs/sha256/{DIGEST[:2]}/{DIGEST}",
            "journal/walk/perturb/12.json",
        }
        assert json.loads((store.root / "registry.json").read_bytes()) == {"id": ID, "store_format": 1}
        assert {path.name for path in store.root.iterdir()} == {"registry.json", "blobs", "journal", "tmp"}

    @pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o444), (0o027, 0o440), (0o077, 0o400)])
    def test_files_are_read_only_and_follow_the_umask(
        self, store: LocalStore, umask: Callable[[int], int], mask: int, mode: int
    ) -> None:
        umask(mask)
        path = put(store)
        store.journal.append("walk", "perturb", 1, b"{}")
        for file in (path, store.root / "journal/walk/perturb/1.json"):
            assert stat.S_IMODE(file.stat().st_mode) == mode

    def test_temporary_files_are_in_tmp_and_their_names_tell_nothing(self, store: LocalStore) -> None:
        with store.blobs.batch() as batch:
            blob = batch.put([DATA])
            path = batch.path(blob)
            assert path.parent == store.root / "tmp"
            assert blob.digest[:4] not in path.name
            batch.commit()
        assert os.listdir(store.root / "tmp") == []

    @pytest.mark.parametrize("place", [Path.symlink_to, Path.hardlink_to])
    def test_a_file_that_stands_where_a_temporary_is_made_is_not_written_to(
        self, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[[Path, Path], None]
    ) -> None:
        target = tmp_path / "target"
        target.write_bytes(b"mine")
        place(store.root / "tmp" / "guessed", target)
        monkeypatch.setattr(durable, "new_temporary", lambda folder: folder / "guessed")
        with pytest.raises(StorageError), store.blobs.batch() as batch:
            batch.put([DATA])
        assert target.read_bytes() == b"mine"


class TestCreating:
    def test_gives_an_empty_store_that_opens(self, tmp_path: Path) -> None:
        created = create_store(tmp_path / "new" / "deep", ID)
        opened = open_store(tmp_path / "new" / "deep")
        assert created.registry_id == opened.registry_id == ID
        assert opened.writable
        assert list(opened.blobs.digests()) == []

    def test_leaves_what_is_in_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "catalog.sqlite").write_bytes(b"rows")
        create_store(tmp_path, ID)
        assert (tmp_path / "catalog.sqlite").read_bytes() == b"rows"

    def test_the_same_again_opens_it(self, store: LocalStore) -> None:
        put(store)
        again = create_store(store.root, ID)
        assert again.blobs.contains(DIGEST)

    def test_another_in_the_same_folder_is_refused(self, store: LocalStore) -> None:
        with pytest.raises(Conflict, match=ID):
            create_store(store.root, uuid4().hex)
        assert open_store(store.root).registry_id == ID

    @pytest.mark.parametrize(
        "registry_id", ["", "x" * 32, ID.upper(), ID + "\n", "01234567-89ab-cdef-0123-456789abcdef"]
    )
    def test_wants_a_plain_id(self, tmp_path: Path, registry_id: str) -> None:
        with pytest.raises(InvalidInput, match="32 lower-case hex"):
            create_store(tmp_path / "store", registry_id)
        assert not (tmp_path / "store").exists()

    def test_that_was_cut_off_left_no_store_and_can_be_repeated(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "injected")

        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", SimpleNamespace(**{**vars(os), "link": full}))
            with pytest.raises(StorageError):
                create_store(tmp_path / "store", ID)
        with pytest.raises(RegistryNotFound):
            open_store(tmp_path / "store")
        assert files_below(tmp_path) == set()
        assert create_store(tmp_path / "store", ID).registry_id == ID


class TestOpening:
    def test_takes_paths_and_file_urls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = tmp_path / "a b#c"
        create_store(root, ID)
        monkeypatch.chdir(tmp_path)
        escaped = str(root).replace(" ", "%20").replace("#", "%23")
        for place in (root, str(root), "a b#c", f"file://{escaped}", f"FILE://localhost{escaped}"):
            found = open_store(place)
            assert isinstance(found, LocalStore)
            assert found.root == root

    def test_at_a_relative_path_survives_a_change_of_folder(
        self, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(store)
        monkeypatch.chdir(tmp_path)
        opened = open_store("store")
        monkeypatch.chdir("/")
        assert opened.blobs.contains(DIGEST)

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("s3://bucket/prefix", "not supported yet"),
            ("s3://key:secret@bucket", "not supported yet"),
            ("https://user:secret@host/x", "https://"),
            ("file://host/x", "file:///path"),
            ("file://", "file:///path"),
            ("file://[", "file:///path"),
            ("file:///x?y", "%3F"),
            ("file:///x%00", "NUL"),
            ("", "empty"),
        ],
    )
    def test_of_another_url_is_refused_without_showing_secrets(self, url: str, said: str) -> None:
        with pytest.raises(InvalidInput, match=said) as caught:
            open_store(url)
        assert "secret" not in str(caught.value)

    def test_where_nothing_is_says_how_to_make_one(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        for place in (tmp_path, tmp_path / "missing"):
            with pytest.raises(RegistryNotFound, match="registry init"):
                open_store(place)
        with pytest.raises(RegistryNotFound, match="not a folder"):
            open_store(tmp_path / "file")
        assert files_below(tmp_path) == {"file"}

    def test_of_a_newer_format_says_so(self, store: LocalStore) -> None:
        identity = store.root / "registry.json"
        identity.unlink()
        identity.write_text(json.dumps({"id": {"new": "form"}, "store_format": 2, "more": []}))
        with pytest.raises(SchemaOutOfDate, match="store format 2"):
            open_store(store.root)

    @pytest.mark.parametrize(
        "document",
        [
            "",
            "{",
            "[]",
            "null",
            "[" * 50_000,
            "\xff",
            f'{{"id":"{ID}"}}',
            '{"store_format":1}',
            f'{{"id":"{ID}","store_format":0}}',
            f'{{"id":"{ID}","store_format":true}}',
            f'{{"id":"{ID}","store_format":"1"}}',
            f'{{"id":"{ID}","store_format":1.0}}',
            f'{{"id":"{ID}","store_format":1,"store_format":1}}',
            f'{{"id":"{ID}","store_format":1,"more":1}}',
            f'{{"id":"{ID.upper()}","store_format":1}}',
            '{"id":7,"store_format":1}',
            f'{{"id":"{ID}","store_format":1}}' + " " * 70_000,
        ],
    )
    def test_with_a_damaged_registry_json_is_refused(self, store: LocalStore, document: str) -> None:
        identity = store.root / "registry.json"
        identity.unlink()
        identity.write_bytes(document.encode("latin-1"))
        with pytest.raises(Corrupt, match=r"registry\.json"):
            open_store(store.root)

    def test_with_a_folder_as_registry_json_is_refused(self, store: LocalStore) -> None:
        (store.root / "registry.json").unlink()
        (store.root / "registry.json").mkdir()
        with pytest.raises(Corrupt, match="a folder"):
            open_store(store.root)

    def test_of_a_copy_without_its_empty_folders_works(self, store: LocalStore) -> None:
        for folder in ("tmp", "blobs/sha256", "blobs", "journal"):
            (store.root / folder).rmdir()
        opened = open_store(store.root)
        assert opened.writable
        assert list(opened.blobs.digests()) == list(opened.journal.names()) == []
        assert isinstance(opened, LocalStore)
        put(opened)
        opened.journal.append("walk", "perturb", 1, b"{}")
        opened.blobs.verify(DIGEST)


@pytest.mark.usefixtures("synced")
class TestDurability:
    """The order of calls is the guarantee, and no test without a power cut can see it otherwise."""

    @pytest.fixture
    def calls(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        fsync, rename, link = os.fsync, os.rename, os.link

        def traced_fsync(descriptor: int) -> None:
            found.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def traced_rename(source: Path, target: Path) -> None:
            found.append(("rename", f"{source} {target}"))
            rename(source, target)

        def traced_link(source: Path, target: Path) -> None:
            found.append(("link", f"{source} {target}"))
            link(source, target)

        monkeypatch.setattr(os, "fsync", traced_fsync)
        monkeypatch.setattr(os, "rename", traced_rename)
        monkeypatch.setattr(os, "link", traced_link)
        return found

    def test_put_syncs_nothing(self, store: LocalStore, calls: list[tuple[str, str]]) -> None:
        with store.blobs.batch() as batch:
            batch.put([DATA])
            assert calls == []

    @pytest.mark.parametrize("folders_are_there", [False, True])
    def test_files_are_synced_then_renamed_then_folders_synced_once(
        self, store: LocalStore, calls: list[tuple[str, str]], folders_are_there: bool
    ) -> None:
        put(store, b"was there")
        for number in range(256 if folders_are_there else 0):
            (store.root / "blobs" / "sha256" / f"{number:02x}").mkdir(exist_ok=True)
        calls.clear()
        with store.blobs.batch() as batch:
            found = [batch.put([bytes([number])]) for number in range(5)]
            temporaries = {str(batch.path(blob)) for blob in found}
            old = batch.put([b"was there"])
            batch.commit()
        folder = store.root / "blobs" / "sha256"
        assert {what for call, what in calls[:5] if call == "fsync"} == temporaries
        assert [call for call, _ in calls[5:10]] == ["rename"] * 5
        folders = [what for call, what in calls[10:] if call == "fsync"]
        expected = {str(folder), *(str(folder / blob.digest[:2]) for blob in (*found, old))}
        assert sorted(folders) == sorted(expected)

    def test_a_journal_entry_is_synced_then_linked_then_its_folders_synced(
        self, store: LocalStore, calls: list[tuple[str, str]]
    ) -> None:
        journal = store.root / "journal"
        for turn in range(2):
            calls.clear()
            store.journal.append("walk", "perturb", turn, b"{}")
            assert [call for call, _ in calls[:2]] == ["fsync", "link"]
            folders = sorted(what for call, what in calls[2:] if call == "fsync")
            assert folders == [str(journal), str(journal / "walk"), str(journal / "walk" / "perturb")]

    def test_a_batch_of_many_blobs_holds_few_descriptors(self, store: LocalStore, calls: list[tuple[str, str]]) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with store.blobs.batch() as batch:
            for number in range(150):
                batch.put([b"%d" % number])
                assert len(os.listdir("/proc/self/fd")) <= before + 64
            batch.commit()
            assert len(os.listdir("/proc/self/fd")) == before
        assert sum(call == "fsync" and "/tmp/" in what and what.endswith(".tmp") for call, what in calls) == 150
        assert len(list(store.blobs.digests())) == 150


class TestAStrangerInPlaceOfABlob:
    @pytest.fixture(params=["symlink", "dangling symlink", "folder", "pipe"])
    def stranger(self, request: pytest.FixtureRequest, store: LocalStore, tmp_path: Path) -> Path:
        path = put(store)
        path.unlink()
        (tmp_path / "elsewhere").write_bytes(DATA)
        if request.param == "symlink":
            path.symlink_to(tmp_path / "elsewhere")
        elif request.param == "dangling symlink":
            path.symlink_to(tmp_path / "nowhere")
        elif request.param == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
        return path

    @pytest.mark.parametrize("method", ["size", "open", "local_path", "verify", "delete"])
    def test_is_corrupt(self, store: LocalStore, stranger: Path, method: str) -> None:
        with pytest.raises(Corrupt, match="expected a regular file"):
            getattr(store.blobs, method)(DIGEST)
        assert os.path.lexists(stranger)

    def test_is_not_counted_as_the_blob(self, store: LocalStore, stranger: Path) -> None:
        assert not store.blobs.contains(DIGEST)
        assert list(store.blobs.digests()) == []

    def test_is_replaced_by_the_next_put_unless_it_is_a_folder(
        self, store: LocalStore, stranger: Path, tmp_path: Path
    ) -> None:
        if stranger.is_dir():
            with pytest.raises(Corrupt, match="a folder"):
                put(store)
            assert os.listdir(store.root / "tmp") == []
            return
        put(store)
        store.blobs.verify(DIGEST)
        assert not stranger.is_symlink()
        assert (tmp_path / "elsewhere").read_bytes() == DATA


class TestDamage:
    def test_a_flipped_bit_is_found_by_verify(self, store: LocalStore) -> None:
        path = put(store, data := os.urandom(3 << 20))
        digest = path.name
        path.chmod(0o644)
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(DigestMismatch) as caught:
            store.blobs.verify(digest)
        assert caught.value.expected == digest
        assert caught.value.actual == hashlib.sha256(flipped).hexdigest()

    def test_a_torn_blob_is_found_by_verify_and_mended_by_the_next_put(self, store: LocalStore) -> None:
        path = put(store)
        path.chmod(0o644)
        path.write_bytes(DATA[:5])
        with pytest.raises(DigestMismatch):
            store.blobs.verify(DIGEST)
        with store.blobs.batch() as batch:
            assert batch.put([DATA]).created
            batch.commit()
        store.blobs.verify(DIGEST)

    def test_strangers_in_the_folders_are_not_listed(self, store: LocalStore) -> None:
        put(store)
        store.journal.append("walk", "perturb", 1, b"{}")
        blobs, journal = store.root / "blobs" / "sha256", store.root / "journal"
        (blobs / DIGEST[:2] / "notes.txt").write_bytes(b"")
        (blobs / "stray").write_bytes(b"")
        (blobs / "00").mkdir()
        (blobs / "00" / DIGEST).write_bytes(DATA)
        for stray in ("walk/perturb/01.json", "walk/perturb/2.json~", "walk/stray", "Stray"):
            (journal / stray).write_bytes(b"")
        (journal / "walk" / "UPPER").mkdir()
        (journal / "walk" / "UPPER" / "1.json").write_bytes(b"")
        (journal / "empty" / "name").mkdir(parents=True)
        assert list(store.blobs.digests()) == [DIGEST]
        assert list(store.journal.names()) == [("walk", "perturb")]
        assert store.journal.sequence("walk", "perturb") == [1]

    def test_a_symlink_in_place_of_a_journal_entry_is_corrupt(self, store: LocalStore, tmp_path: Path) -> None:
        store.journal.append("walk", "perturb", 1, b"{}")
        (tmp_path / "elsewhere").write_bytes(b"{}")
        (store.root / "journal/walk/perturb/2.json").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(Corrupt, match="a symlink"):
            store.journal.read("walk", "perturb", 2)
        with pytest.raises(Corrupt, match="a symlink"):
            store.journal.append("walk", "perturb", 2, b"{}")


class TestStaleTemporaries:
    def test_are_those_that_nobody_wrote_to_for_so_long(self, store: LocalStore) -> None:
        old, new = store.root / "tmp" / "old.tmp", store.root / "tmp" / "new.tmp"
        for path in (old, new):
            path.write_bytes(b"left")
        os.utime(old, (0, 0))
        hour = timedelta(hours=1)
        assert store.stale_temporaries(datetime.now(UTC) - hour) == [Temporary("old.tmp", 4)]
        assert {one.name for one in store.stale_temporaries(datetime.now(UTC) + hour)} == {"old.tmp", "new.tmp"}

    def test_are_removed_by_their_names_and_nothing_outside_of_their_folder_is(self, store: LocalStore) -> None:
        (store.root / "tmp" / "old.tmp").write_bytes(b"left")
        store.remove_temporary("old.tmp")
        assert store.stale_temporaries(datetime.now(UTC) + timedelta(hours=1)) == []
        store.remove_temporary("../registry.json")
        assert (store.root / "registry.json").is_file()
