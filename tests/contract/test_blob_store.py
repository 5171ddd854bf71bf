"""What every `BlobStore` must do. A further implementation is one more entry of IMPLEMENTATIONS."""

from __future__ import annotations

import array
import hashlib
import mmap
import random
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from registry.core.errors import BlobNotFound, InvalidReference
from registry.store import create_store, open_store
from registry.store.interface import BlobStore, Buffer, Store, StoredBlob

IMPLEMENTATIONS: dict[str, tuple[Callable[[Path], Store], Callable[[Path], Store]]] = {
    "local": (lambda folder: create_store(folder / "store", uuid4().hex), lambda folder: open_store(folder / "store")),
}

MIB = 1 << 20
ABSENT = "0" * 64
MALFORMED = {
    "empty": "",
    "short": "ab" * 31,
    "long": "ab" * 33,
    "upper case": "AB" * 32,
    "not hex": "zz" * 32,
    "line feed": "ab" * 32 + "\n",
    "with its algorithm": "sha256:" + "ab" * 32,
    "path": "../" * 21 + "a",
    "NUL": "ab" * 31 + "a\0",
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(implementation: str, tmp_path: Path) -> Store:
    return IMPLEMENTATIONS[implementation][0](tmp_path)


@pytest.fixture
def blobs(store: Store) -> BlobStore:
    return store.blobs


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(blobs: BlobStore, *contents: bytes) -> list[StoredBlob]:
    with blobs.batch() as batch:
        found = [batch.put([content]) for content in contents]
        batch.commit()
    return found


def read(blobs: BlobStore, digest: str) -> bytes:
    with blobs.open(digest) as file:
        return file.read()


class TestWhatIsPut:
    @pytest.mark.parametrize("size", [0, 1, 4096, 200_000, MIB - 1, MIB, MIB + 1, 11 * MIB + 7])
    def test_is_named_by_its_sha256_and_read_back(self, blobs: BlobStore, size: int) -> None:
        data = noise(size)
        [blob] = stored(blobs, data)
        assert blob == StoredBlob(digest_of(data), size, created=True)
        assert blobs.size(blob.digest) == size
        assert blobs.contains(blob.digest)
        assert read(blobs, blob.digest) == data
        assert blobs.local_path(blob.digest).read_bytes() == data
        blobs.verify(blob.digest)

    @pytest.mark.parametrize("step", [1000, 4096, 150_000, MIB, 5 * MIB])
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_does_not_depend_on_its_chunks(self, blobs: BlobStore, step: int, kind: Callable[[bytes], Buffer]) -> None:
        data = noise(3 * MIB + 12_345)
        with blobs.batch() as batch:
            blob = batch.put(kind(data[start : start + step]) for start in range(0, len(data), step))
            batch.commit()
        assert blob.digest == digest_of(data)
        assert read(blobs, blob.digest) == data

    def test_may_come_in_large_and_small_chunks_in_turn(self, blobs: BlobStore) -> None:
        sizes = [10, 2 * MIB, 0, 3000, 127 * 1024, MIB, 1, 5 * MIB, 129 * 1024, 7]
        chunks = [noise(size, seed) for seed, size in enumerate(sizes)]
        for kind in (bytes, bytearray):
            with blobs.batch() as batch:
                blob = batch.put(kind(chunk) for chunk in chunks)
                batch.commit()
            assert blob.digest == digest_of(b"".join(chunks))
            assert read(blobs, blob.digest) == b"".join(chunks)

    @pytest.mark.parametrize("size", [1000, 300_000, 2 * MIB])
    def test_may_come_in_one_buffer_that_is_filled_again(self, blobs: BlobStore, size: int) -> None:
        buffer = bytearray(size)
        contents = [noise(size, seed) for seed in range(5)]

        def refilled() -> Iterator[memoryview]:
            for content in contents:
                buffer[:] = content
                yield memoryview(buffer)
                buffer[:] = bytes(size)

        with blobs.batch() as batch:
            blob = batch.put(refilled())
            batch.commit()
        assert blob.digest == digest_of(b"".join(contents))
        assert read(blobs, blob.digest) == b"".join(contents)

    def test_may_come_from_a_map_that_is_closed_at_once(self, blobs: BlobStore, tmp_path: Path) -> None:
        data = noise(3 * MIB)
        (tmp_path / "source").write_bytes(data)

        def mapped() -> Iterator[memoryview]:
            with (
                (tmp_path / "source").open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
                memoryview(view) as whole,
            ):
                yield whole

        with blobs.batch() as batch:
            blob = batch.put(mapped())
            batch.commit()
        assert blob.digest == digest_of(data)

    def test_may_be_of_wider_items_and_more_dimensions(self, blobs: BlobStore) -> None:
        numbers = array.array("d", range(600))
        table = memoryview(numbers).cast("B").cast("d", (20, 30))
        empty = memoryview(array.array("d"))
        with blobs.batch() as batch:
            blob = batch.put([table, empty, memoryview(b"").cast("B"), table])
            batch.commit()
        assert read(blobs, blob.digest) == numbers.tobytes() * 2

    def test_opens_as_a_seekable_file(self, blobs: BlobStore) -> None:
        [blob] = stored(blobs, b"0123456789")
        with blobs.open(blob.digest) as file:
            file.seek(-3, 2)
            assert file.read() == b"789"
            file.seek(2)
            assert file.read(2) == b"23"

    def test_is_there_when_the_store_is_opened_again(
        self, implementation: str, tmp_path: Path, store: Store, blobs: BlobStore
    ) -> None:
        [blob] = stored(blobs, b"kept")
        again = IMPLEMENTATIONS[implementation][1](tmp_path)
        assert again.registry_id == store.registry_id
        assert again.writable
        assert read(again.blobs, blob.digest) == b"kept"


class TestABatch:
    def test_shows_nothing_before_its_commit(self, blobs: BlobStore) -> None:
        with blobs.batch() as batch:
            blob = batch.put([b"not yet"])
            assert not blobs.contains(blob.digest)
            assert list(blobs.digests()) == []
            with pytest.raises(BlobNotFound):
                blobs.open(blob.digest)
            batch.commit()
            assert blobs.contains(blob.digest)

    def test_shows_all_its_blobs_after_its_commit(self, blobs: BlobStore) -> None:
        contents = [noise(100, seed) for seed in range(100)]
        found = stored(blobs, *contents)
        assert {blob.digest for blob in found} == set(blobs.digests()) == set(map(digest_of, contents))

    def test_that_is_left_without_commit_stores_nothing(self, blobs: BlobStore) -> None:
        with blobs.batch() as batch:
            blob = batch.put([b"dropped"])
            path = batch.path(blob)
        assert not path.exists()
        assert list(blobs.digests()) == []

    def test_may_be_empty(self, blobs: BlobStore) -> None:
        with blobs.batch() as batch:
            batch.commit()
        assert list(blobs.digests()) == []

    def test_says_that_a_blob_was_there(self, blobs: BlobStore) -> None:
        [first] = stored(blobs, b"twice")
        [second] = stored(blobs, b"twice")
        assert first.created
        assert second == StoredBlob(first.digest, first.size, created=False)
        assert list(blobs.digests()) == [first.digest]

    def test_stores_what_it_is_given_twice_once(self, blobs: BlobStore) -> None:
        first, second = stored(blobs, b"twice", b"twice")
        assert (first.created, second.created) == (True, False)
        assert list(blobs.digests()) == [first.digest]
        assert read(blobs, first.digest) == b"twice"

    def test_gives_a_path_before_and_after_its_commit(self, blobs: BlobStore) -> None:
        [old] = stored(blobs, b"old")
        with blobs.batch() as batch:
            new, again = batch.put([b"new"]), batch.put([b"old"])
            assert batch.path(new).read_bytes() == b"new"
            assert batch.path(again).read_bytes() == b"old"
            assert batch.path(old) == batch.path(again)
            batch.commit()
            assert batch.path(new).read_bytes() == b"new"

    def test_gives_no_path_for_a_stranger(self, blobs: BlobStore) -> None:
        [blob] = stored(blobs, b"of another batch")
        with blobs.batch() as batch:
            with pytest.raises(BlobNotFound):
                batch.path(blob)
            with pytest.raises(BlobNotFound):
                batch.discard(blob)

    def test_commits_without_what_was_discarded(self, blobs: BlobStore) -> None:
        with blobs.batch() as batch:
            kept, dropped = batch.put([b"kept"]), batch.put([b"dropped"])
            path = batch.path(dropped)
            batch.discard(dropped)
            assert not path.exists()
            batch.commit()
        assert list(blobs.digests()) == [kept.digest]

    def test_keeps_a_blob_of_two_puts_until_both_are_discarded(self, blobs: BlobStore) -> None:
        for discards, left in ((1, 1), (2, 0)):
            with blobs.batch() as batch:
                found = [batch.put([b"shared"]), batch.put([b"shared"])]
                for blob in found[:discards]:
                    batch.discard(blob)
                batch.commit()
            assert len(list(blobs.digests())) == left
            blobs.delete(digest_of(b"shared"))

    def test_does_not_discard_what_was_in_the_store(self, blobs: BlobStore) -> None:
        [old] = stored(blobs, b"old")
        with blobs.batch() as batch:
            batch.discard(batch.put([b"old"]))
            batch.commit()
        assert list(blobs.digests()) == [old.digest]

    def test_takes_a_blob_again_after_it_was_discarded(self, blobs: BlobStore) -> None:
        with blobs.batch() as batch:
            batch.discard(batch.put([b"back"]))
            assert batch.put([b"back"]).created
            batch.commit()
        assert read(blobs, digest_of(b"back")) == b"back"

    @pytest.mark.parametrize("error", [ValueError("bad tensor"), OSError(5, "bad source"), KeyboardInterrupt()])
    def test_whose_source_fails_stores_nothing_and_says_why(self, blobs: BlobStore, error: BaseException) -> None:
        def failing() -> Iterator[bytes]:
            yield noise(2 * MIB)
            raise error

        paths = []

        def push() -> None:
            with blobs.batch() as batch:
                paths.append(batch.path(batch.put([b"before"])))
                batch.put(failing())

        with pytest.raises(type(error)) as caught:
            push()
        assert caught.value is error
        assert not paths[0].exists()
        assert list(blobs.digests()) == []

    def test_whose_put_failed_cannot_be_committed(self, blobs: BlobStore) -> None:
        with blobs.batch() as batch:
            batch.put([b"half of what was meant"])
            with pytest.raises(ZeroDivisionError):
                batch.put(bytes(1 // divisor) for divisor in (1, 0))
            with pytest.raises(RuntimeError):
                batch.commit()
        assert list(blobs.digests()) == []

    def test_ends_with_its_commit(self, blobs: BlobStore) -> None:
        with blobs.batch() as batch:
            blob = batch.put([b"once"])
            batch.commit()
            for call in (lambda: batch.put([b"late"]), lambda: batch.discard(blob), batch.commit):
                with pytest.raises(RuntimeError):
                    call()
        assert list(blobs.digests()) == [blob.digest]

    def test_keeps_what_was_committed_when_its_body_fails_later(self, blobs: BlobStore) -> None:
        def push() -> None:
            with blobs.batch() as batch:
                batch.put([b"committed"])
                batch.commit()
                raise KeyError

        with pytest.raises(KeyError):
            push()
        assert read(blobs, digest_of(b"committed")) == b"committed"

    def test_is_one_of_many_in_as_many_threads(self, blobs: BlobStore) -> None:
        start = threading.Barrier(8)
        failures = []

        def work(number: int) -> None:
            try:
                start.wait()
                for turn in range(5):
                    stored(blobs, noise(400_000, turn), b"thread %d turn %d" % (number, turn))
            except BaseException as error:  # noqa: BLE001 (shown by the assertion below)
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        found = list(blobs.digests())
        assert len(found) == 5 + 8 * 5
        for digest in found:
            blobs.verify(digest)


class TestADigest:
    @pytest.mark.parametrize("method", ["size", "open", "local_path", "verify", "modified_at"])
    def test_that_nobody_stored_is_not_found(self, blobs: BlobStore, method: str) -> None:
        with pytest.raises(BlobNotFound, match=ABSENT):
            getattr(blobs, method)(ABSENT)
        assert not blobs.contains(ABSENT)

    @pytest.mark.parametrize("digest", MALFORMED.values(), ids=MALFORMED)
    @pytest.mark.parametrize("method", ["size", "contains", "open", "local_path", "verify", "delete", "modified_at"])
    def test_that_is_malformed_is_refused(self, blobs: BlobStore, method: str, digest: str) -> None:
        with pytest.raises(InvalidReference, match="64 lower-case hex"):
            getattr(blobs, method)(digest)

    def test_that_is_deleted_is_gone_and_alone(self, blobs: BlobStore) -> None:
        gone, kept = stored(blobs, b"gone", b"kept")
        blobs.delete(gone.digest)
        assert list(blobs.digests()) == [kept.digest]
        assert not blobs.contains(gone.digest)
        [again] = stored(blobs, b"gone")
        assert again.created

    def test_that_is_not_there_can_be_deleted(self, blobs: BlobStore) -> None:
        blobs.delete(ABSENT)

    def test_that_was_just_stored_was_modified_now(self, blobs: BlobStore) -> None:
        minute = timedelta(minutes=1)  # a clock of the store's own may differ
        before = datetime.now(UTC)
        [blob] = stored(blobs, b"new")
        assert before - minute <= blobs.modified_at(blob.digest) <= datetime.now(UTC) + minute


class TestTemporaries:
    def test_are_not_left_by_what_came_to_an_end(self, store: Store) -> None:
        stored(store.blobs, b"one", noise(3 * MIB))
        with store.blobs.batch() as batch:
            batch.put([b"dropped"])
        assert store.stale_temporaries(datetime.now(UTC) + timedelta(hours=1)) == []

    def test_of_a_writer_at_work_are_not_stale(self, store: Store) -> None:
        with store.blobs.batch() as batch:
            batch.put([noise(3 * MIB)])
            assert store.stale_temporaries(datetime.now(UTC) - timedelta(hours=1)) == []

    def test_that_are_not_there_can_be_removed(self, store: Store) -> None:
        store.remove_temporary("0" * 32 + ".tmp")
