"""A registry that this user may not write, on a disk that may or may not be writable: everything that reads works and
changes nothing, everything that writes says ReadOnly in one line."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from registry import Registry
from registry.core.errors import NoSpace, ReadOnly, StorageError
from tests.failures.support import (
    REPOSITORY,
    as_nobody,
    model_tensors,
    open_folder,
    peft_folder,
    photograph,
    succeeds_alone,
    tensor_file,
    warm_up,
)


@contextmanager
def read_only(root: Path) -> Iterator[None]:
    """Takes the write permission away from every folder and file."""
    paths = [root, *root.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield
    for path, mode in modes.items():
        path.chmod(mode)


def reads(root: Path, out: Path, *, new: bool = True, load: bool = False) -> None:
    """All that reads, on a registry with `walk/base@1` and, if `new`, `walk/new@1`.

    Args:
        load: which needs torch, two seconds of a new process.
    """
    with Registry.open(root) as registry:
        names = ["walk/base", "walk/new"] if new else ["walk/base"]
        assert [version.name for version in registry.find()] == names
        for name in names:
            assert registry.get(name).version == 1
            assert registry.show(name).contents.files
            assert registry.log(name)
            assert [event.seq for event in registry.events(name)]
            registry.pull(name, out / name.replace("/", "-"))
            if load:
                assert registry.load(name)
        assert registry.resolve("walk/base:v1") == "walk/base@1"
        assert registry.export(*names, to=out / "bundle.tar").blobs


def refuses_every_write(root: Path, source: Path) -> None:
    with Registry.open(root) as registry:
        writes: Mapping[str, Callable[[], object]] = {
            "push": lambda: registry.push(source, "walk/other"),
            "push of what is there": lambda: registry.push(source, "walk/base"),
            "tag": lambda: registry.tag("walk/base@1", "prod"),
            "untag": lambda: registry.delete_tag("walk/base", "v1"),
            "protect": lambda: registry.protect_tag("walk/base", "v1"),
            "import": lambda: registry.import_(source),
            "annotate": lambda: registry.annotate("walk/base", metadata={"a": 1}),
        }
        for what, write in writes.items():
            with pytest.raises(ReadOnly) as caught:
                write()
            assert str(caught.value).isprintable(), what
            assert str(root) in str(caught.value), what


def as_another_user(template: str, scratch: str) -> None:
    warm_up(Path(scratch) / "warm-up", torch=True)
    with open_folder() as place:
        source = tensor_file(place / "other.safetensors", model_tensors(seed=70))
        root = Path(shutil.copytree(template, place / "registry"))
        with Registry.open(root) as registry:
            registry.push(peft_folder(place / "adapter"), "walk/new", base="walk/base")
        out = place / "out"
        out.mkdir()
        out.chmod(0o777)
        with read_only(root):
            before = files_of(root)
            as_nobody(lambda: reads(root, out, load=True))
            as_nobody(lambda: refuses_every_write(root, source))
            assert files_of(root) == before


def reindexed_by_another_user(template: str, scratch: str) -> None:
    warm_up(Path(scratch) / "warm-up")
    with open_folder() as place:
        root = Path(shutil.copytree(template, place / "registry"))
        Registry.reindex(root)  # all that it imports

        def refused() -> None:
            with pytest.raises(ReadOnly):
                Registry.reindex(root)

        for lost in (False, True):
            if lost:
                (root / "catalog.sqlite").unlink()
            with read_only(root):
                before = files_of(root)
                as_nobody(refused)
                assert files_of(root) == before


def test_a_registry_that_another_user_may_not_write_is_not_reindexed(template: Path, tmp_path: Path) -> None:
    succeeds_alone(reindexed_by_another_user, template, tmp_path)


def files_of(root: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, the catalog's included."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def test_another_user_reads_everything_and_writes_nothing(template: Path, tmp_path: Path) -> None:
    succeeds_alone(as_another_user, template, tmp_path)


def beside_a_writer(template: str, scratch: str) -> None:
    """The writer has the catalog open, so what was written last stands in its WAL alone."""
    warm_up(Path(scratch) / "warm-up")
    with open_folder() as place:
        source = tensor_file(place / "other.safetensors", model_tensors(seed=70))
        root = Path(shutil.copytree(template, place / "registry"))
        for path in (place, root):
            path.chmod(0o755)
        out = place / "out"
        out.mkdir()
        out.chmod(0o777)
        # A process of its own: SQLite's locks of one process do not keep its own connections apart across a fork.
        script = (
            "import sys; from registry import Registry; registry = Registry.open(sys.argv[1]);"
            "registry.push(sys.argv[2], 'walk/new', base='walk/base'); print('pushed', flush=True); sys.stdin.read();"
            "registry.push(sys.argv[3], 'walk/base')"
        )
        writer = subprocess.Popen(
            [sys.executable, "-c", script, root, peft_folder(place / "adapter"), source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "pushed\n"
            assert (root / "catalog.sqlite-wal").stat().st_size > 0
            as_nobody(lambda: reads(root, out))
            as_nobody(lambda: refuses_every_write(root, source))
        finally:
            writer.communicate("")
        assert writer.returncode == 0
        with Registry.open(root) as registry:
            assert registry.get("walk/base").version == 2


def test_another_user_reads_what_a_writer_has_in_its_wal(template: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: it takes root to become a second user")
    succeeds_alone(beside_a_writer, template, tmp_path)


def after_a_crash(template: str, scratch: str) -> None:
    """The writer was killed: its WAL and the index of it stay, and nobody can write them."""
    warm_up(Path(scratch) / "warm-up")
    with open_folder() as place:
        root = Path(shutil.copytree(template, place / "registry"))
        crashed(root, peft_folder(place / "adapter"))
        out = place / "out"
        out.mkdir()
        out.chmod(0o777)
        with read_only(root):
            before = files_of(root)
            as_nobody(lambda: reads(root, out))
            assert files_of(root) == before
        # Without the index only a writer can read the WAL; what stands in the file alone would be out of date.
        (root / "catalog.sqlite-shm").unlink()

        def refused() -> None:
            with pytest.raises(StorageError) as caught:
                Registry.open(root).find()
            assert str(caught.value).isprintable()

        with read_only(root):
            as_nobody(refused)
        reads(root, place)


def crashed(root: Path, source: Path) -> None:
    """Pushes in a process that dies with the catalog open."""
    script = (
        "import os, signal, sys; from registry import Registry; registry = Registry.open(sys.argv[1]);"
        "registry.push(sys.argv[2], 'walk/new', base='walk/base'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, root, source], cwd=REPOSITORY, check=False)
    assert done.returncode == -9
    assert (root / "catalog.sqlite-wal").stat().st_size > 0


def test_another_user_reads_what_a_crashed_writer_left_in_its_wal(template: Path, tmp_path: Path) -> None:
    succeeds_alone(after_a_crash, template, tmp_path)


class TestAReadOnlyMedium:
    """Root too can only read it."""

    @pytest.fixture
    def medium(self, template: Path, tmp_path: Path, mounted: Callable[[str], Path]) -> Path:
        disk = mounted("size=16m")
        root = Path(shutil.copytree(template, disk / "registry"))
        with Registry.open(root) as registry:
            registry.push(peft_folder(tmp_path / "adapter"), "walk/new", base="walk/base")
        return root

    def remount(self, root: Path) -> None:
        subprocess.run(["mount", "-o", "remount,ro", root.parent], check=True)

    def test_is_read_and_says_so_to_writers(self, medium: Path, tmp_path: Path) -> None:
        self.remount(medium)
        before = files_of(medium)
        reads(medium, tmp_path)
        source = tensor_file(tmp_path / "other.safetensors", model_tensors(seed=70))
        refuses_every_write(medium, source)
        assert files_of(medium) == before

    def test_with_a_wal_is_read_to_its_end(
        self, template: Path, tmp_path: Path, mounted: Callable[[str], Path]
    ) -> None:
        root = Path(shutil.copytree(template, mounted("size=16m") / "registry"))
        crashed(root, peft_folder(tmp_path / "adapter"))
        self.remount(root)
        reads(root, tmp_path)

    def test_makes_no_registry(self, medium: Path, tmp_path: Path) -> None:
        self.remount(medium)
        with pytest.raises(ReadOnly):
            Registry.init(medium.parent / "new")
        assert not (medium.parent / "new").exists()

    def test_takes_no_pull(self, template: Path, medium: Path) -> None:
        self.remount(medium)
        with Registry.open(template) as registry, pytest.raises(ReadOnly):
            registry.pull("walk/base", medium.parent / "out")


def with_one_part_of_each(template: str, scratch: str) -> None:
    warm_up(Path(scratch) / "warm-up")
    with open_folder() as place:
        source = tensor_file(place / "other.safetensors", model_tensors(seed=70))
        for number, part in enumerate(("catalog.sqlite", "blobs/sha256", "journal", "tmp", ".")):
            root = Path(shutil.copytree(template, place / f"registry{number}"))
            for path in [root, *root.rglob("*")]:
                path.chmod(0o777 if path.is_dir() else 0o666)
            (root / part).chmod(0o555 if (root / part).is_dir() else 0o444)
            out = place / f"out{number}"
            out.mkdir()
            out.chmod(0o777)
            before = photograph(root)
            as_nobody(partial(reads, root, out, new=False))
            as_nobody(partial(refuses_every_write, root, source))
            assert photograph(root) == before, part


def test_a_part_that_cannot_be_written_makes_the_whole_registry_read_only(template: Path, tmp_path: Path) -> None:
    succeeds_alone(with_one_part_of_each, template, tmp_path)


class TestAnOutboxThatCannotBeWritten:
    def unjournaled(self, root: Path) -> Path:
        """Takes the last entry out of the journal and puts its event back into the outbox."""
        entries = sorted((root / "journal" / "walk" / "base").iterdir())
        with closing(sqlite3.connect(root / "catalog.sqlite")) as catalog, catalog:
            catalog.execute("INSERT INTO outbox SELECT artifact_id, seq FROM event WHERE seq = ?", (len(entries),))
        entries[-1].unlink()
        return entries[-1]

    def test_does_not_keep_a_full_disk_from_being_read(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        entry = self.unjournaled(root)
        with monkeypatch.context() as patch:
            from registry.store.local_journal import LocalJournal

            def full(*_: Any) -> None:
                raise NoSpace("cannot write: no space left on device")

            patch.setattr(LocalJournal, "append", full)
            with Registry.open(root) as registry:
                assert registry.get("walk/base").version == 1
            assert not entry.exists()
        Registry.open(root).close()
        assert entry.exists()

    def test_waits_for_the_next_one_who_may_write(
        self, root: Path, tmp_path: Path, mounted: Callable[[str], Path]
    ) -> None:
        disk = mounted("size=16m")
        moved = Path(shutil.copytree(root, disk / "registry"))
        entry = self.unjournaled(moved)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        reads(moved, tmp_path, new=False)
        assert not entry.exists()
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        Registry.open(moved).close()
        assert entry.exists()
