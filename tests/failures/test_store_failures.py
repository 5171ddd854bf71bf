"""The local store when the disk is full, read-only or lying, when a process is killed in the middle, and when
many write at once. Real parts where there are some; calls are replaced only for what cannot be had otherwise."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from registry.core.errors import Corrupt, NoSpace, ReadOnly, StorageError
from registry.store import create_store, durable, local_blobs, open_store
from registry.store.local import LocalStore

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore.create(tmp_path / "store", uuid4().hex)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="registry-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        if os.geteuid() != 0:
            pytest.skip("only root can mount a small disk; RLIMIT_FSIZE covers a part of this without root")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"root may not mount here: {done.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


def child(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script of its own process to its end; `-1`-like return codes are signals."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def succeeds(script: str, *arguments: object) -> None:
    done = child(script, *arguments)
    assert done.returncode == 0, done.stderr


def push(store: LocalStore, *contents: Iterable[bytes]) -> None:
    with store.blobs.batch() as batch:
        for content in contents:
            batch.put(content)
        batch.commit()


def nothing_left(store: LocalStore) -> None:
    assert list(store.blobs.digests()) == []
    assert list(store.journal.names()) == []
    assert os.listdir(store.root / "tmp") == []


def replaced(monkeypatch: pytest.MonkeyPatch, **calls: object) -> None:
    """Replaces calls of `os` for the modules that write, and for nobody else in this process."""
    system = SimpleNamespace(**{**vars(os), **calls})
    monkeypatch.setattr(durable, "os", system)
    monkeypatch.setattr(local_blobs, "os", system)


class TestAFullDisk:
    def test_stores_nothing_and_can_be_used_again_when_there_is_room(self, mounted: Callable[[str], Path]) -> None:
        disk = mounted("size=4m")
        store = LocalStore.create(disk / "store", uuid4().hex)
        with pytest.raises(NoSpace, match=r"cannot write \d+ bytes at offset \d+ of .*/store/tmp/") as caught:
            push(store, [b"small"], (os.urandom(MIB) for _ in range(8)))
        assert caught.value.errno == errno.ENOSPC
        assert isinstance(caught.value.__cause__, OSError)
        nothing_left(store)
        with store.blobs.batch() as batch:
            blob = batch.put(os.urandom(MIB) for _ in range(2))
            batch.commit()
        store.blobs.verify(blob.digest)

    def test_takes_no_journal_entry_and_no_store(self, mounted: Callable[[str], Path]) -> None:
        disk = mounted("size=1m")
        store = LocalStore.create(disk / "store", uuid4().hex)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096 and shutil.disk_usage(disk).free:
                pass
        with pytest.raises(NoSpace):
            store.journal.append("walk", "perturb", 1, b"{}" * 4096)
        with pytest.raises(NoSpace):
            create_store(disk / "second", uuid4().hex)
        nothing_left(store)
        assert not (disk / "second" / "registry.json").exists()
        filler.unlink()
        store.journal.append("walk", "perturb", 1, b"{}" * 4096)

    def test_of_which_only_the_inodes_are_used_up_is_one_too(self, mounted: Callable[[str], Path]) -> None:
        store = LocalStore.create(mounted("nr_inodes=20") / "store", uuid4().hex)
        with pytest.raises(NoSpace, match="cannot create"):
            push(store, *([b"%d" % number] for number in range(30)))
        nothing_left(store)

    def test_is_also_a_limit_on_the_size_of_files(self, store: LocalStore) -> None:
        succeeds(
            """
            import errno, os, resource, sys
            from registry.core.errors import NoSpace
            from registry.store import open_store
            store = open_store(sys.argv[1])
            resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
            try:
                with store.blobs.batch() as batch:
                    batch.put([os.urandom(2_000_000)])
                    batch.put(os.urandom(500_000) for _ in range(10))
            except NoSpace as error:
                assert error.errno == errno.EFBIG, error.errno
                assert type(error.__cause__) is OSError
                assert "bytes at offset 3000000 of " + sys.argv[1] in str(error), error
            else:
                raise AssertionError("nothing was raised")
            """,
            store.root,
        )
        nothing_left(store)


class TestAReadOnlyStore:
    SCRIPT = """
        import os, sys
        from pathlib import Path
        import concurrent.futures.thread
        from registry.core.errors import ReadOnly
        from registry.store import create_store, open_store
        root, digest = sys.argv[1:]
        if os.geteuid() == 0:  # root ignores modes
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        store = open_store(root)
        assert not store.writable
        assert store.blobs.open(digest).read() == b"readable"
        store.blobs.verify(digest)
        assert store.journal.read("walk", "perturb", 1) == b"{}"
        def put(data):
            with store.blobs.batch() as batch:
                batch.put([data])
                batch.commit()
        for attempt in (
            lambda: put(b"new"),
            lambda: put(b"readable"),
            lambda: store.blobs.delete(digest),
            lambda: store.journal.append("walk", "perturb", 2, b"{}"),
            lambda: store.journal.append("walk", "carry", 1, b"{}"),
            lambda: create_store(Path(root) / "inner", "0" * 32),
        ):
            try:
                attempt()
            except ReadOnly as error:
                assert error.errno and isinstance(error.__cause__, OSError)
                assert root in str(error)
            else:
                raise AssertionError("nothing was raised")
        """

    @pytest.fixture
    def filled(self, open_folder: Path) -> LocalStore:
        store = LocalStore.create(open_folder / "store", uuid4().hex)
        with store.blobs.batch() as batch:
            batch.put([b"readable"])
            batch.commit()
        store.journal.append("walk", "perturb", 1, b"{}")
        return store

    def test_is_read_and_refuses_every_write(self, filled: LocalStore) -> None:
        folders = [filled.root, *(path for path in filled.root.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        succeeds(self.SCRIPT, filled.root, hashlib.sha256(b"readable").hexdigest())
        for folder in folders:
            folder.chmod(0o755)
        filled.blobs.verify(hashlib.sha256(b"readable").hexdigest())
        assert filled.journal.sequence("walk", "perturb") == [1]

    def test_on_a_read_only_medium_is_one_for_root_too(self, mounted: Callable[[str], Path]) -> None:
        disk = mounted("size=4m")
        store = LocalStore.create(disk / "store", uuid4().hex)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        opened = open_store(disk / "store")
        assert not opened.writable
        with pytest.raises(ReadOnly) as caught:
            push(store, [b"new"])
        assert caught.value.errno == errno.EROFS
        with pytest.raises(ReadOnly):
            opened.journal.append("walk", "perturb", 1, b"{}")


class TestAnErrorOfTheSystem:
    KINDS = (
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EFBIG, NoSpace),
        (errno.EROFS, ReadOnly),
        (errno.EACCES, ReadOnly),
        (errno.EPERM, ReadOnly),
        (errno.EIO, StorageError),
    )

    @pytest.mark.parametrize("call", ["open", "write", "fsync", "rename", "mkdir"])
    @pytest.mark.parametrize(("number", "kind"), KINDS, ids=[errno.errorcode[number] for number, _ in KINDS])
    def test_in_a_batch_is_translated_and_leaves_nothing(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type[StorageError]
    ) -> None:
        def failing(*_: Any) -> None:
            raise OSError(number, "injected")

        with monkeypatch.context() as patch:
            replaced(patch, **{call: failing})
            with pytest.raises(kind) as caught:
                push(store, [b"first"], [os.urandom(2 * MIB)])
        assert type(caught.value) is kind
        assert caught.value.errno == number
        assert str(store.root) in str(caught.value)
        assert caught.value.__cause__ is not None
        assert "injected" in str(caught.value.__cause__)
        nothing_left(store)

    @pytest.mark.parametrize("call", ["open", "write", "fsync", "link", "mkdir"])
    def test_in_the_journal_leaves_nothing(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        def failing(*_: Any) -> None:
            raise OSError(errno.EIO, "injected")

        with monkeypatch.context() as patch:
            replaced(patch, **{call: failing})
            with pytest.raises(StorageError) as caught:
                store.journal.append("walk", "perturb", 1, b"{}")
        assert caught.value.errno == errno.EIO
        nothing_left(store)
        store.journal.append("walk", "perturb", 1, b"{}")

    def test_while_cleaning_up_is_noted_on_the_first_one(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(*_: Any) -> None:
            raise OSError(errno.EIO, "injected")

        def interrupted() -> Iterator[bytes]:
            yield b"some"
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            replaced(patch, unlink=failing)
            with pytest.raises(KeyboardInterrupt) as caught:
                push(store, interrupted())
        assert "left behind: cannot remove" in caught.value.__notes__[0]
        assert len(store.stale_temporaries(datetime.now(UTC) + timedelta(hours=1))) == 1

    def test_that_is_no_error_but_a_zero_does_not_loop_for_ever(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replaced(monkeypatch, write=lambda *_: 0)
        with pytest.raises(StorageError):
            push(store, [b"some"])


class TestShortWrites:
    @pytest.mark.parametrize("most", [1000, 70_001, MIB - 1])
    def test_are_continued(self, store: LocalStore, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        replaced(monkeypatch, write=lambda descriptor, data: os.write(descriptor, data[:most]))
        data = os.urandom(3 * MIB + 5)
        with store.blobs.batch() as batch:
            blob = batch.put([data])
            batch.commit()
        store.journal.append("walk", "perturb", 1, data)
        assert blob.digest == hashlib.sha256(data).hexdigest()
        store.blobs.verify(blob.digest)
        assert store.journal.read("walk", "perturb", 1) == data


class TestAFileSystemWithoutHardLinks:
    @pytest.fixture(params=[errno.EPERM, errno.ENOTSUP, errno.ENOSYS], ids=lambda number: errno.errorcode[number])
    def linkless(
        self, request: pytest.FixtureRequest, store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> LocalStore:
        def no_links(*_: Any) -> None:
            raise OSError(request.param, "injected")

        replaced(monkeypatch, link=no_links)
        return store

    def test_still_has_a_create_only_journal(self, linkless: LocalStore) -> None:
        for _ in range(2):
            linkless.journal.append("walk", "perturb", 1, b"first")
        with pytest.raises(Corrupt, match="another document"):
            linkless.journal.append("walk", "perturb", 1, b"second")
        assert linkless.journal.read("walk", "perturb", 1) == b"first"
        assert os.listdir(linkless.root / "tmp") == []

    def test_looks_and_renames_under_one_lock(self, linkless: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
        refused = []

        def rename(source: Path, target: Path) -> None:
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(target.name)
            finally:
                os.close(folder)
            os.rename(source, target)

        monkeypatch.setattr(durable.os, "rename", rename)
        linkless.journal.append("walk", "perturb", 1, b"first")
        assert refused == ["1.json"]

    def test_still_has_one_winner_among_processes(self, store: LocalStore) -> None:
        succeeds(
            """
            import errno, os, sys
            from concurrent.futures import ThreadPoolExecutor
            from registry.core.errors import Corrupt
            from registry.store import open_store
            store = open_store(sys.argv[1])
            def no_links(*_):
                raise OSError(errno.EPERM, "injected")
            os.link = no_links
            go, start = os.pipe()
            children = []
            for number in range(6):
                if (pid := os.fork()) == 0:
                    won = 0
                    os.close(start)
                    os.read(go, 1)
                    for seq in range(20):
                        try:
                            store.journal.append("walk", "perturb", seq, b"writer %d" % number)
                            won += 1
                        except Corrupt:
                            pass
                    os._exit(won)
                children.append(pid)
            os.close(start)
            won = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
            assert sum(won) == 20, won
            """,
            store.root,
        )
        assert store.journal.sequence("walk", "perturb") == list(range(20))


class TestAKilledProcess:
    def test_between_put_and_commit_shows_nothing(self, store: LocalStore) -> None:
        done = child(
            """
            import os, signal, sys
            from registry.store import open_store
            with open_store(sys.argv[1]).blobs.batch() as batch:
                batch.put([os.urandom(2_000_000)])
                os.kill(os.getpid(), signal.SIGKILL)
            """,
            store.root,
        )
        assert done.returncode == -9
        assert list(store.blobs.digests()) == []
        assert len(store.stale_temporaries(datetime.now(UTC) + timedelta(hours=1))) == 1
        with store.blobs.batch() as batch:
            batch.put([b"next"])
            batch.commit()

    def test_at_any_step_leaves_only_whole_blobs_and_entries(self, tmp_path: Path) -> None:
        succeeds(
            """
            import os, signal, sys
            from hashlib import sha256
            from pathlib import Path
            from registry.core.errors import RegistryNotFound
            from registry.store import create_store, open_store

            names = ("open", "write", "fsync", "mkdir", "rename", "link", "unlink", "close")
            contents = [bytes([number]) * 300_000 for number in range(3)]
            document = b"{}" * 1000

            def work(root):
                store = create_store(root, "0" * 32)
                with store.blobs.batch() as batch:
                    for content in contents:
                        batch.put([content])
                    batch.commit()
                store.journal.append("walk", "perturb", 1, document)

            def killed_at(step, root):
                calls = 0
                def counted(call):
                    def wrapper(*arguments, **options):
                        nonlocal calls
                        calls += 1
                        if calls == step:
                            if call is real_write:  # the last write is a torn one
                                call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                            os.kill(os.getpid(), signal.SIGKILL)
                        return call(*arguments, **options)
                    return wrapper
                real_write = os.write
                for name in names:
                    setattr(os, name, counted(getattr(os, name)))
                work(root)

            killed = 0
            for step in range(1, 500):
                root = Path(sys.argv[1]) / str(step)
                if (pid := os.fork()) == 0:
                    try:
                        killed_at(step, root)
                    except BaseException:
                        os._exit(1)
                    os._exit(0)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                assert code in (0, -signal.SIGKILL), (step, code)
                killed += code != 0
                try:
                    store = open_store(root)
                except RegistryNotFound:
                    assert code != 0
                else:
                    found = set(store.blobs.digests())
                    assert found <= {sha256(content).hexdigest() for content in contents}
                    for digest in found:
                        store.blobs.verify(digest)
                    if store.journal.sequence("walk", "perturb"):
                        assert store.journal.read("walk", "perturb", 1) == document
                        assert len(found) == 3
                work(root)  # whatever was left, the same work can be done again
                assert len(list(open_store(root).blobs.digests())) == 3
                if code == 0:
                    break
            assert 30 < killed < 400, killed
            """,
            tmp_path,
        )


class TestManyProcesses:
    def test_that_put_the_same_blobs_at_once_do_no_harm(self, store: LocalStore) -> None:
        succeeds(
            """
            import os, random, sys
            from registry.store import open_store
            store = open_store(sys.argv[1])
            contents = [random.Random(seed).randbytes(1_500_000) for seed in range(3)]
            go, start = os.pipe()
            children = []
            for number in range(8):
                if (pid := os.fork()) == 0:
                    try:
                        os.close(start)
                        os.read(go, 1)
                        with store.blobs.batch() as batch:
                            for content in contents:
                                batch.put([content])
                            batch.put([b"%d" % number])
                            batch.commit()
                        store.journal.append("walk", "perturb", 1, b"the same of all")
                    except BaseException as error:
                        print(repr(error), file=sys.stderr, flush=True)
                        os._exit(1)
                    os._exit(0)
                children.append(pid)
            os.close(start)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
            assert codes == [0] * 8, codes
            """,
            store.root,
        )
        found = list(store.blobs.digests())
        assert len(found) == 3 + 8
        for digest in found:
            store.blobs.verify(digest)
        assert store.journal.read("walk", "perturb", 1) == b"the same of all"
        assert os.listdir(store.root / "tmp") == []

    def test_a_forked_child_does_not_take_its_parents_batch_away(self, store: LocalStore) -> None:
        succeeds(
            """
            import os, sys
            from registry.store import open_store
            store = open_store(sys.argv[1])
            with store.blobs.batch() as batch:
                blob = batch.put([b"of the parent"])
                if (pid := os.fork()) == 0:
                    try:
                        batch.commit()
                    except RuntimeError:
                        sys.exit(7)  # unwinds through the batch
                    sys.exit(1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
                assert batch.path(blob).read_bytes() == b"of the parent"
                batch.commit()
            store.blobs.verify(blob.digest)
            """,
            store.root,
        )
        assert len(list(store.blobs.digests())) == 1

    def test_that_fork_and_thread_share_one_store(self, store: LocalStore) -> None:
        succeeds(
            """
            import os, sys
            from concurrent.futures import ThreadPoolExecutor
            from registry.store import open_store
            store = open_store(sys.argv[1])
            def put(number):
                with store.blobs.batch() as batch:
                    batch.put([bytes([number]) * 2_000_000])
                    batch.commit()
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(put, range(3)))
            children = []
            for number in range(3, 6):
                if (pid := os.fork()) == 0:
                    put(number)
                    os._exit(0)
                children.append(pid)
            assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
            """,
            store.root,
        )
        assert len(list(store.blobs.digests())) == 6


class TestAnInterrupt:
    def test_by_a_real_signal_in_the_middle_of_a_put_leaves_nothing(self, store: LocalStore) -> None:
        done = child(
            """
            import os, signal, sys
            from registry.store import open_store
            def chunks():
                for number in range(20):
                    if number == 10:
                        os.kill(os.getpid(), signal.SIGINT)
                    yield os.urandom(1_000_000)
            with open_store(sys.argv[1]).blobs.batch() as batch:
                batch.put([b"before"])
                batch.put(chunks())
                batch.commit()
            """,
            store.root,
        )
        assert "KeyboardInterrupt" in done.stderr
        assert done.returncode == -2
        nothing_left(store)
