"""Finding, making and opening a registry where something else stands, half of one stands, or two belong together
that do not; and the outbox, which every opening empties."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from registry import Registry
from registry.core.errors import (
    Conflict,
    Corrupt,
    InvalidInput,
    NoSpace,
    RegistryError,
    RegistryNotFound,
    SchemaOutOfDate,
    StorageError,
    WrongStore,
)
from registry.operations import context, discover
from registry.operations.context import Context
from tests.failures.stages import killed_at_every_stage
from tests.failures.support import (
    as_nobody,
    at_once,
    model_tensors,
    open_folder,
    peft_folder,
    pending_events,
    photograph,
    quick_folder,
    succeeds_alone,
    tensor_file,
    warm_up,
    whole,
)


@contextmanager
def refused(error: type[RegistryError], match: str | None = None) -> Iterator[None]:
    """The body raises this error, in one printable line."""
    with pytest.raises(error, match=match) as caught:
        yield
    assert str(caught.value).isprintable()


class TestOpeningWhatIsNoRegistry:
    @pytest.mark.parametrize("kind", ["nothing", "empty folder", "other files", "catalog is a folder"])
    def test_says_that_there_is_none_and_makes_nothing(self, tmp_path: Path, kind: str) -> None:
        place = tmp_path / "place"
        if kind != "nothing":
            place.mkdir()
        if kind == "other files":
            (place / "notes.txt").write_text("mine")
        if kind == "catalog is a folder":
            (place / "catalog.sqlite").mkdir()
        before = sorted(tmp_path.rglob("*"))
        with refused(RegistryNotFound, "registry init"):
            Registry.open(place)
        assert sorted(tmp_path.rglob("*")) == before

    def test_says_that_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        for make in (Registry.open, Registry.init):
            with refused(InvalidInput, "is a file"):
                make(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize(
        "url", ["", "a\0b", "~nobody-of-this-name/registry", "file://host/path", "ftp://x/y", "://"]
    )
    def test_says_that_this_is_no_place(self, url: str) -> None:
        for make in (Registry.open, Registry.init):
            with refused(InvalidInput):
                make(url)

    @pytest.mark.parametrize("path", ["x" * 300, "y/" * 3000])
    def test_says_that_a_path_is_too_long(self, tmp_path: Path, path: str) -> None:
        for make in (Registry.open, Registry.init):
            with refused(StorageError):
                make(tmp_path / path)

    def test_says_so_of_a_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "loop").symlink_to("loop")
        with refused(RegistryError):
            Registry.open(tmp_path / "loop")
        with refused(RegistryError):
            Registry.init(tmp_path / "loop")

    @pytest.mark.parametrize("data", [b"", b"SQLite format 3\0" + bytes(84), b"not a database" * 100], ids=len)
    def test_says_that_the_catalog_is_none(self, root: Path, data: bytes) -> None:
        (root / "catalog.sqlite").write_bytes(data)
        with refused(RegistryError, r"catalog\.sqlite"):
            Registry.open(root)

    def test_in_a_folder_that_nobody_may_enter_is_told(self, template: Path, tmp_path: Path) -> None:
        succeeds_alone(in_a_closed_folder, template, tmp_path)


def in_a_closed_folder(template: str, scratch: str) -> None:
    warm_up(Path(scratch) / "warm-up")
    with open_folder() as place:
        closed = place / "closed"
        closed.mkdir()
        shutil.copytree(template, closed / ".registry")
        (closed / "below").mkdir()
        here = place / "here"
        here.mkdir()

        def opened() -> None:
            with refused(StorageError, "closed"):
                Registry.open(closed / ".registry")
            with refused(StorageError, "closed"):
                Registry.init(closed / "new")
            # The nearest registry upward may be there: going past it would find another one.
            (here / ".registry").symlink_to(closed / ".registry")
            os.chdir(here)
            with refused(StorageError, "here"):
                Registry.open()

        closed.chmod(0)
        here.chmod(0o777)
        as_nobody(opened)


class TestInit:
    def test_opens_what_is_there(self, root: Path) -> None:
        before = photograph(root)
        with Registry.init(root) as registry:
            assert registry.get("walk/base").version == 1
        assert photograph(root) == before

    def test_does_not_move_in_with_somebody_elses_files(self, tmp_path: Path) -> None:
        (tmp_path / "line\nbreak").write_text("mine")
        with refused(Conflict, "other files"):
            Registry.init(tmp_path)
        assert os.listdir(tmp_path) == ["line\nbreak"]

    def test_does_not_take_over_a_store_that_lost_its_catalog(self, root: Path) -> None:
        (root / "catalog.sqlite").unlink()
        before = sorted(root.rglob("*"))
        with refused(Conflict, "catalog is not here"):
            Registry.init(root)
        assert sorted(root.rglob("*")) == before

    def test_makes_the_folders_above_as_well(self, tmp_path: Path) -> None:
        Registry.init(tmp_path / "a" / "b" / "c").close()
        Registry.open(tmp_path / "a" / "b" / "c").close()

    def test_leaves_no_temporary_file(self, tmp_path: Path) -> None:
        Registry.init(tmp_path / "registry").close()
        assert sorted(os.listdir(tmp_path / "registry")) == [
            "blobs",
            "catalog.sqlite",
            "journal",
            "registry.json",
            "tmp",
        ]
        assert os.listdir(tmp_path / "registry" / "tmp") == []

    def test_on_a_file_system_without_links_works(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import errno

        def no_links(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
        with Registry.init(tmp_path / "registry") as registry:
            assert registry.push(tensor_file(tmp_path / "model.safetensors"), "walk/new").created
        assert os.listdir(tmp_path / "registry" / "tmp") == []

    @pytest.mark.exhaustive
    def test_that_was_killed_at_any_stage_can_be_done_again(self) -> None:
        print(succeeds_alone(killed_inits))

    def test_by_many_at_once_makes_one_registry(self) -> None:
        succeeds_alone(many_inits)

    def test_of_which_another_was_faster_at_any_moment_opens_that_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other one comes between any two steps, is done, and even has its first push."""
        source = tensor_file(tmp_path / "model.safetensors")
        for step in ("_refuse_foreign", "_make_store", "create_store", "open_store", "make_catalog", "upgrade"):
            root, real = tmp_path / step, getattr(discover, step)

            def overtaken(*arguments: Any, real: Any = real, root: Path = root) -> Any:
                monkeypatch.undo()
                with Registry.init(root) as other:
                    other.push(source, "walk/new")
                return real(*arguments)

            monkeypatch.setattr(discover, step, overtaken)
            with Registry.init(root) as registry:
                assert registry.get("walk/new").version == 1
                assert json.loads((root / "registry.json").read_text())["id"] == registry.id
            assert os.listdir(root / "tmp") == []


def killed_inits() -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        source = peft_folder(folder / "adapter")
        unfinished = 0
        for number, killed in killed_at_every_stage(
            lambda number: lambda: Registry.init(folder / "deep" / str(number)).close()
        ):
            root = folder / "deep" / str(number)
            try:
                Registry.open(root).close()
            except RegistryNotFound:
                assert killed
                unfinished += 1
            if number % 3 == 0 or not killed:
                with Registry.init(root) as registry:
                    assert registry.push(source, "walk/new").created
                    whole(registry, root, "walk/new")
            shutil.rmtree(root, ignore_errors=True)
        assert unfinished > 20
        print(unfinished, number)


def many_inits() -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        source = peft_folder(folder / "adapter")
        for attempt in range(3):
            root = folder / str(attempt)

            def init_and_push(number: int, root: Path = root) -> None:
                with Registry.init(root) as registry:
                    registry.push(source, f"walk/new{number}")

            assert at_once([partial(init_and_push, number) for number in range(4)]) == [0] * 4
            with Registry.open(root) as registry:
                assert len(registry.find()) == 4
                for number in range(4):
                    whole(registry, root, f"walk/new{number}")
            assert os.listdir(root / "tmp") == []


class TestWhere:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "cwd").mkdir()
        monkeypatch.chdir(tmp_path / "cwd")
        monkeypatch.delenv("REGISTRY_URL", raising=False)
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

    def id_of(self, root: Path) -> str:
        return str(json.loads((root / "registry.json").read_text())["id"])

    def test_a_given_path_comes_before_the_environment(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Registry.init(tmp_path / "other").close()
        monkeypatch.setenv("REGISTRY_URL", str(tmp_path / "other"))
        with Registry.open(root) as registry:
            assert registry.id == self.id_of(root)

    def test_the_environment_comes_before_a_registry_upward(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Registry.init().close()
        monkeypatch.setenv("REGISTRY_URL", str(root))
        with Registry.open() as registry:
            assert registry.id == self.id_of(root)

    def test_an_environment_that_names_nothing_is_an_error_and_not_skipped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Registry.init().close()
        monkeypatch.setenv("REGISTRY_URL", str(tmp_path / "nothing"))
        with refused(RegistryNotFound, "nothing"):
            Registry.open()
        assert not (tmp_path / "nothing").exists()

    def test_an_empty_environment_variable_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Registry.init().close()
        monkeypatch.setenv("REGISTRY_URL", "")
        with Registry.open() as registry:
            assert registry.id == self.id_of(Path(".registry"))

    def test_the_nearest_registry_upward_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        below = tmp_path / "cwd" / "a" / "b"
        (below / ".registry").mkdir(parents=True)  # an empty one is none
        Registry.init().close()
        Registry.init(tmp_path / ".registry").close()
        monkeypatch.chdir(below)
        with Registry.open() as registry:
            assert registry.id == self.id_of(tmp_path / "cwd" / ".registry")

    def test_the_users_own_is_made_on_first_use(self, tmp_path: Path) -> None:
        with Registry.open() as registry:
            assert registry.find() == []
            registry.push(tensor_file(tmp_path / "model.safetensors"), "walk/new")
        assert (tmp_path / "data" / "lora-registry" / "catalog.sqlite").is_file()
        assert os.listdir(".") == []
        with Registry.open() as registry:
            assert registry.get("walk/new").version == 1

    @pytest.mark.parametrize("form", ["file://{}", "file://localhost{}", "FILE://{}"])
    def test_a_file_url_is_the_path_that_it_quotes(self, tmp_path: Path, form: str) -> None:
        root = tmp_path / "a b%c"
        Registry.init(form.format(str(root).replace("%", "%25").replace(" ", "%20"))).close()
        Registry.open(root).close()

    def test_a_relative_path_stays_where_it_was_when_the_process_moves(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(root.parent)
        with Registry.open(root.name) as registry:
            monkeypatch.chdir(tmp_path / "cwd")
            found: list[int] = []
            # Another thread has a connection of its own, made now.
            with registry._context.reading():
                thread = threading.Thread(target=lambda: found.append(registry.get("walk/base").version))
                thread.start()
                thread.join()
            assert found == [1]
            registry.push(tensor_file(tmp_path / "model.safetensors", model_tensors(seed=4)), "walk/new")
        assert os.listdir(".") == []

    def test_a_working_folder_that_is_gone_is_told(self, root: Path, tmp_path: Path) -> None:
        os.rmdir(tmp_path / "cwd")
        for make in (Registry.open, Registry.init, partial(Registry.open, "relative"), partial(Registry.init, "here")):
            with refused(StorageError, "working folder"):
                make()
        with Registry.open(root) as registry:
            assert registry.get("walk/base").version == 1


class TestPartsOfTwo:
    def test_a_store_of_another_registry_is_refused(self, root: Path) -> None:
        identity = json.loads((root / "registry.json").read_text())
        (root / "registry.json").unlink()
        (root / "registry.json").write_text(json.dumps({**identity, "id": uuid4().hex}))
        with refused(WrongStore, identity["id"]):
            Registry.open(root)

    def test_a_catalog_of_another_registry_is_refused(self, root: Path, tmp_path: Path) -> None:
        Registry.init(tmp_path / "other").close()
        shutil.copy(tmp_path / "other" / "catalog.sqlite", root / "catalog.sqlite")
        with refused(WrongStore, "do not belong together"):
            Registry.open(root)

    def test_a_store_that_is_gone_is_refused(self, root: Path) -> None:
        (root / "registry.json").unlink()
        for make in (Registry.open, Registry.init):
            with refused(WrongStore, "put it back"):
                make(root)
        assert not (root / "registry.json").exists()

    def test_a_newer_store_is_refused(self, root: Path) -> None:
        identity = json.loads((root / "registry.json").read_text())
        (root / "registry.json").unlink()
        (root / "registry.json").write_text(json.dumps({**identity, "store_format": 2}))
        with refused(SchemaOutOfDate, "newer"):
            Registry.open(root)

    @pytest.mark.parametrize(
        ("statement", "match"),
        [
            ("UPDATE registry_meta SET store_format = 2", "store format 2"),
            ("UPDATE alembic_version SET version_num = '29990101_future'", "newer lora-registry"),
        ],
        ids=["store format", "revision"],
    )
    def test_a_newer_catalog_is_refused_and_left_as_it_is(self, root: Path, statement: str, match: str) -> None:
        with closing(sqlite3.connect(root / "catalog.sqlite")) as catalog, catalog:
            catalog.execute(statement)
        before = photograph(root)
        for make in (Registry.open, Registry.init):
            with refused(SchemaOutOfDate, match):
                make(root)
        assert photograph(root) == before

    def test_two_catalogs_do_not_share_one_store(self, root: Path, postgresql_url: str, tmp_path: Path) -> None:
        with refused(Conflict, "registry of its own"):
            Registry.init(postgresql_url, store=root)
        with refused(RegistryNotFound):
            Registry.open(postgresql_url)
        Registry.init(postgresql_url, store=tmp_path / "store").close()
        Registry.open(postgresql_url).close()

    def test_a_server_without_a_place_for_blobs_asks_for_one(self, postgresql_url: str) -> None:
        with refused(InvalidInput, "--store"):
            Registry.init(postgresql_url)

    def test_a_folder_takes_no_other_store(self, tmp_path: Path) -> None:
        with refused(InvalidInput, "--store"):
            Registry.init(tmp_path / "registry", store=tmp_path / "store")
        assert os.listdir(tmp_path) == []


class TestTheOutbox:
    """Events that are committed and not journaled yet."""

    @pytest.fixture
    def unjournaled(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A registry whose last writer died between the commit and the journal."""
        with monkeypatch.context() as patch, Registry.open(root) as registry:
            patch.setattr(Context, "journal", lambda *_: None)
            registry.push(tensor_file(tmp_path / "m.safetensors", model_tensors(seed=2)), "walk/new", tags=["a", "b"])
            registry.tag("walk/base@1", "best")
        assert pending_events(root) == 5
        assert not (root / "journal" / "walk" / "new").exists()
        return root

    def entry(self, root: Path, seq: int) -> Path:
        return root / "journal" / "walk" / "new" / f"{seq}.json"

    def test_is_emptied_by_the_next_opening(self, unjournaled: Path) -> None:
        with Registry.open(unjournaled) as registry:
            assert pending_events(unjournaled) == 0
            whole(registry, unjournaled, "walk/new")
            whole(registry, unjournaled, "walk/base")

    def test_is_emptied_although_half_of_it_had_been_written(self, unjournaled: Path) -> None:
        Registry.open(unjournaled).close()
        with closing(sqlite3.connect(unjournaled / "catalog.sqlite")) as catalog, catalog:
            catalog.execute("INSERT OR IGNORE INTO outbox SELECT artifact_id, seq FROM event")
        self.entry(unjournaled, 2).unlink()
        with Registry.open(unjournaled) as registry:
            whole(registry, unjournaled, "walk/new")

    def test_of_more_events_than_are_read_at_once_is_emptied(
        self, unjournaled: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Registry.open(unjournaled) as registry, monkeypatch.context() as patch:
            patch.setattr(Context, "journal", lambda *_: None)
            for number in range(8):
                registry.annotate("walk/base", metadata={"a": number})
        monkeypatch.setattr(context, "OUTBOX_BATCH", 3)
        with Registry.open(unjournaled) as registry:
            assert pending_events(unjournaled) == 0
            whole(registry, unjournaled, "walk/base")

    def test_is_emptied_by_two_at_once(self, unjournaled: Path) -> None:
        succeeds_alone(open_at_once, unjournaled)

    def test_that_contradicts_the_journal_is_corrupt_and_names_the_entry(self, unjournaled: Path) -> None:
        self.entry(unjournaled, 2).parent.mkdir(parents=True)
        self.entry(unjournaled, 2).write_text("{}")
        with refused(Corrupt, str(self.entry(unjournaled, 2))):
            Registry.open(unjournaled)
        assert self.entry(unjournaled, 2).read_text() == "{}"
        assert pending_events(unjournaled) == 5
        self.entry(unjournaled, 2).unlink()
        with Registry.open(unjournaled) as registry:
            whole(registry, unjournaled, "walk/new")

    def test_a_push_that_cannot_journal_says_that_it_stands(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from registry.store.local_journal import LocalJournal

        source = tensor_file(tmp_path / "m.safetensors", model_tensors(seed=2))
        with Registry.open(root) as registry:

            def full(*_: object) -> None:
                raise NoSpace("cannot write: no space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(LocalJournal, "append", full)
                with refused(NoSpace, "what was done stands"):
                    registry.push(source, "walk/new")
            again = registry.push(source, "walk/new")
            assert (again.version, again.created) == (1, False)
        with Registry.open(root) as registry:
            whole(registry, root, "walk/new")

    def test_an_opening_that_fails_leaves_no_connection_open(self, unjournaled: Path) -> None:
        self.entry(unjournaled, 1).parent.mkdir(parents=True)
        self.entry(unjournaled, 1).write_text("{}")
        with refused(Corrupt):
            Registry.open(unjournaled)
        assert not (unjournaled / "catalog.sqlite-wal").exists()


def open_at_once(root: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
    assert at_once([lambda: Registry.open(root).close()] * 4) == [0] * 4
    with Registry.open(root) as registry:
        whole(registry, Path(root), "walk/new")
