"""Pulls that cannot end well: what is there already, what cannot be written, and what is damaged in the store. All or
nothing arrives, and what stood there before stays."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from registry import Registry
from registry.core.errors import (
    BlobNotFound,
    Corrupt,
    DestinationExists,
    DigestMismatch,
    InvalidInput,
    NotFound,
    ReadOnly,
    RegistryError,
    StorageError,
)
from registry.operations import converting
from registry.operations import pull as pull_module
from tests.failures.stages import killed_at_every_stage
from tests.failures.support import (
    adapter_tensors,
    as_nobody,
    forked,
    model_tensors,
    open_folder,
    peft_folder,
    photograph,
    quick_folder,
    safetensors_bytes,
    succeeds_alone,
    tensor_file,
    warm_up,
)

FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def sources(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was pushed, and beside it the registry: with `walk/base@1` (a file), `walk/new@1` (a folder), and
    `walk/parts@1` (a file that lies half in the base)."""
    folder = tmp_path_factory.mktemp("sources")
    with Registry.open(shutil.copytree(template, folder / "registry")) as registry:
        registry.push(peft_folder(folder / "adapter"), "walk/new", base="walk/base")
        registry.push(checkpoint(folder / "model.safetensors"), "walk/parts", base="walk/base")
    return folder


@pytest.fixture
def filled(sources: Path, tmp_path: Path) -> Iterator[Registry]:
    """A copy of that registry."""
    with Registry.open(shutil.copytree(sources / "registry", tmp_path / "registry")) as registry:
        yield registry


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where to pull to: a folder of its own."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def checkpoint(path: Path) -> Path:
    base = {name.replace(".weight", ".base_layer.weight"): tensor for name, tensor in model_tensors().items()}
    return tensor_file(path, {**base, **adapter_tensors(seed=50)})


def tree(folder: Path) -> dict[str, object]:
    """All that stands in a folder: links as such, files with their bytes."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


@contextmanager
def refused(registry: Registry, place: Path, error: type[RegistryError], match: str | None = None) -> Iterator[None]:
    """The body raises this error in one printable line, and neither the destination nor the registry changes."""
    root = Path(registry._context.database.what).parent
    before = tree(place), photograph(root)
    with pytest.raises(error, match=match) as caught:
        yield
    assert str(caught.value).isprintable(), caught.value
    assert (tree(place), photograph(root)) == before


class TestAFile:
    """A version of one file."""

    def test_goes_to_a_path_that_is_free(self, filled: Registry, place: Path, sources: Path) -> None:
        result = filled.pull("walk/parts", place / "out.safetensors")
        assert (result.path, result.files) == (place / "out.safetensors", (place / "out.safetensors",))
        assert result.path.read_bytes() == (sources / "model.safetensors").read_bytes()
        assert os.listdir(place) == ["out.safetensors"]

    def test_goes_into_a_folder_that_is_there(self, filled: Registry, place: Path) -> None:
        assert filled.pull("walk/base", place).path == place / "model.safetensors"

    def test_replaces_a_file_only_with_force(self, filled: Registry, place: Path) -> None:
        out = place / "out"
        out.write_bytes(b"mine")
        with refused(filled, place, DestinationExists, "--force"):
            filled.pull("walk/base", out)
        filled.pull("walk/base", out, force=True)
        assert out.read_bytes() == safetensors_bytes(model_tensors())

    def test_replaces_a_file_within_a_folder_only_with_force(self, filled: Registry, place: Path) -> None:
        (place / "model.safetensors").write_bytes(b"mine")
        with refused(filled, place, DestinationExists, r"model\.safetensors"):
            filled.pull("walk/base", place)
        filled.pull("walk/base", place, force=True)
        assert tree(place) == {"model.safetensors": safetensors_bytes(model_tensors())}

    def test_never_changes_a_file_that_somebody_has_mapped(self, filled: Registry, place: Path) -> None:
        out = place / "out"
        out.write_bytes(b"mine")
        with out.open("rb") as reader:
            filled.pull("walk/base", out, force=True)
            assert reader.read() == b"mine"

    @pytest.mark.parametrize("target", ["file", "nothing"])
    def test_replaces_a_link_and_not_what_it_points_to(self, filled: Registry, place: Path, target: str) -> None:
        (place / "file").write_bytes(b"mine")
        (place / "link").symlink_to(target)
        with refused(filled, place, DestinationExists, "link"):
            filled.pull("walk/base", place / "link")
        filled.pull("walk/base", place / "link", force=True)
        assert not (place / "link").is_symlink()
        assert (place / "file").read_bytes() == b"mine"

    def test_follows_a_link_to_a_folder(self, filled: Registry, place: Path) -> None:
        (place / "folder").mkdir()
        (place / "link").symlink_to("folder")
        filled.pull("walk/base", place / "link")
        assert (place / "folder" / "model.safetensors").is_file()
        assert (place / "link").is_symlink()

    def test_never_replaces_a_device_or_a_pipe(self, filled: Registry, place: Path) -> None:
        os.mkfifo(place / "pipe")
        for force in (False, True):
            with refused(filled, place, RegistryError, "pipe"):
                filled.pull("walk/base", place / "pipe", force=force)

    def test_never_replaces_a_folder(self, filled: Registry, place: Path) -> None:
        (place / "model.safetensors").mkdir()
        for force in (False, True):
            with refused(filled, place, RegistryError, r"model\.safetensors"):
                filled.pull("walk/base", place, force=force)

    def test_does_not_overwrite_what_came_while_it_was_written(
        self, filled: Registry, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_files = pull_module._write_files

        def overtaken(*arguments: Any) -> None:
            write_files(*arguments)
            (place / "out").write_bytes(b"mine")

        monkeypatch.setattr(pull_module, "_write_files", overtaken)
        with pytest.raises(DestinationExists):
            filled.pull("walk/base", place / "out")
        assert tree(place) == {"out": b"mine"}


class TestAFolder:
    """A version of several files."""

    @pytest.mark.parametrize("make", [False, True], ids=["new", "empty"])
    def test_is_made_where_nothing_is(self, filled: Registry, place: Path, sources: Path, make: bool) -> None:
        out = place / "out"
        if make:
            out.mkdir(0o750)
        filled.pull("walk/new", out)
        assert tree(out) == tree(sources / "adapter")
        assert os.listdir(place) == ["out"]
        assert os.access(out, os.R_OK | os.W_OK | os.X_OK)
        if make:
            assert out.stat().st_mode & 0o777 == 0o750

    def test_that_is_somebodys_working_folder_stays_the_same_folder(
        self, filled: Registry, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(place)
        for destination in (place, Path("."), Path("")):
            filled.pull("walk/new", destination)
            assert sorted(os.listdir(".")) == FILES
            for name in FILES:
                os.unlink(name)

    def test_with_other_files_is_refused_without_force(self, filled: Registry, place: Path) -> None:
        (place / "notes.txt").write_bytes(b"mine")
        with refused(filled, place, DestinationExists, "not empty"):
            filled.pull("walk/new", place)

    def test_with_other_files_keeps_them_with_force(self, filled: Registry, place: Path, sources: Path) -> None:
        (place / "notes.txt").write_bytes(b"mine")
        (place / FILES[0]).write_bytes(b"old")
        filled.pull("walk/new", place, force=True)
        assert tree(place) == {**tree(sources / "adapter"), "notes.txt": b"mine"}

    def test_that_a_killed_pull_left_something_in_counts_as_empty(self, filled: Registry, place: Path) -> None:
        (place / ".registry-pull-0123").mkdir()
        filled.pull("walk/new", place)
        assert sorted(path for path in os.listdir(place) if not path.startswith(".")) == FILES

    def test_behind_a_link_is_filled(self, filled: Registry, place: Path) -> None:
        (place / "folder").mkdir()
        (place / "link").symlink_to("folder")
        filled.pull("walk/new", place / "link")
        assert sorted(os.listdir(place / "folder")) == FILES
        assert (place / "link").is_symlink()

    def test_that_is_a_mount_is_filled(self, filled: Registry, mounted: Callable[[str], Path]) -> None:
        disk = mounted("size=2m")
        filled.pull("walk/new", disk)
        assert sorted(os.listdir(disk)) == FILES

    @pytest.mark.parametrize("kind", ["file", "link to nothing", "loop"])
    @pytest.mark.parametrize("force", [False, True])
    def test_is_not_put_in_place_of_something_else(self, filled: Registry, place: Path, kind: str, force: bool) -> None:
        out = place / "out"
        if kind == "file":
            out.write_bytes(b"mine")
        else:
            out.symlink_to("nothing" if kind == "link to nothing" else "out")
        with refused(filled, place, RegistryError, "out"):
            filled.pull("walk/new", out, force=force)

    def test_with_a_folder_in_place_of_a_file_is_refused(self, filled: Registry, place: Path) -> None:
        (place / FILES[1]).mkdir()
        with refused(filled, place, InvalidInput, "is a folder"):
            filled.pull("walk/new", place, force=True)


class TestADestination:
    @pytest.mark.parametrize("reference", ["walk/base", "walk/new"])
    @pytest.mark.parametrize(
        ("destination", "error"),
        [
            ("missing/out", NotFound),
            ("file/out", NotFound),
            ("loop/out", RegistryError),
            ("x" * 300, StorageError),
            ("nul\0", InvalidInput),
            ("line\nbreak/out", NotFound),
        ],
    )
    def test_that_cannot_be_is_refused(
        self, filled: Registry, place: Path, reference: str, destination: str, error: type[RegistryError]
    ) -> None:
        (place / "file").write_bytes(b"")
        (place / "loop").symlink_to("loop")
        with refused(filled, place, error):
            filled.pull(reference, place / destination)

    def test_that_may_not_be_written_is_refused(self, template: Path, tmp_path: Path) -> None:
        succeeds_alone(unwritable_destinations, template, tmp_path)

    @pytest.mark.parametrize("reference", ["walk/none", "walk/new@7", "walk/new:none"])
    def test_of_nothing_is_refused(self, filled: Registry, place: Path, reference: str) -> None:
        with refused(filled, place, NotFound):
            filled.pull(reference, place / "out")

    @pytest.mark.parametrize("format", ["zip", "", "peft\n"])
    def test_of_an_unknown_format_is_refused(self, filled: Registry, place: Path, format: str) -> None:
        with refused(filled, place, InvalidInput, "native, peft"):
            filled.pull("walk/new", place / "out", format=format)

    def test_of_a_peft_folder_needs_a_configuration(self, filled: Registry, place: Path) -> None:
        with refused(filled, place, InvalidInput, "adapter_config"):
            filled.pull("walk/base", place / "out", format="peft")


def unwritable_destinations(template: str, scratch: str) -> None:
    folder = Path(scratch)
    warm_up(folder / "warm-up")
    with open_folder() as place:
        root = Path(shutil.copytree(template, place / "registry"))
        with Registry.open(root) as registry:
            registry.push(peft_folder(folder / "adapter"), "walk/new")
        closed, hidden, own = place / "closed", place / "hidden", place / "closed" / "own"
        own.mkdir(parents=True)
        (hidden / "out").mkdir(parents=True)
        own.chmod(0o777)
        closed.chmod(0o555)
        hidden.chmod(0o000)

        def pulls() -> None:
            with Registry.open(root) as registry:
                for reference in ("walk/base", "walk/new"):
                    for destination in (closed / "out", hidden / "out"):
                        with pytest.raises(ReadOnly) as caught:
                            registry.pull(reference, destination)
                        assert caught.value.errno == errno.EACCES
                        assert str(destination) in str(caught.value)
                assert os.listdir(closed) == ["own"]
                # Only this one folder is writable, and not the one that it stands in.
                registry.pull("walk/new", own)
                assert sorted(os.listdir(own)) == FILES

        as_nobody(pulls)


class TestADamagedStore:
    """The registry says what is damaged, and nothing is written."""

    def blobs(self, registry: Registry, reference: str) -> dict[str, Path]:
        """The blob files of a version by role; `reused` are those of the base."""
        root = Path(registry._context.database.what).parent
        found = registry.show(reference).contents.blobs
        return {role: root / "blobs" / "sha256" / digest[:2] / digest for digest, role in found}

    def change(self, path: Path, change: Callable[[bytes], bytes]) -> None:
        path.chmod(0o644)
        path.write_bytes(change(path.read_bytes()))

    DAMAGES: Mapping[str, Callable[[bytes], bytes]] = {
        "a bit in the data": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "a bit in the header": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
        "cut": lambda data: data[:-1],
        "cut in the header": lambda data: data[:30],
        "empty": lambda data: b"",
        "longer": lambda data: data + b"\0",
        "header of 4 GB": lambda data: data[:4] + b"\1" + data[5:],
        "zeros": lambda data: bytes(len(data)),
    }

    @pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
    @pytest.mark.parametrize(
        ("reference", "role"),
        [("walk/new", "tensors"), ("walk/new", "file"), ("walk/parts", "header"), ("walk/parts", "reused")],
    )
    def test_of_one_blob_is_found_at_the_pull(
        self, filled: Registry, place: Path, reference: str, role: str, damage: Callable[[bytes], bytes]
    ) -> None:
        self.change(self.blobs(filled, reference)[role], damage)
        with refused(filled, place, Corrupt):
            filled.pull(reference, place / "out")

    # A load takes the names from the catalog, so that one may be wrong in the blob.
    @pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"a bit in the header"}))
    @pytest.mark.parametrize(("reference", "role"), [("walk/new", "tensors"), ("walk/parts", "reused")])
    def test_of_one_blob_is_found_at_the_load(
        self, filled: Registry, place: Path, reference: str, role: str, damage: str
    ) -> None:
        self.change(self.blobs(filled, reference)[role], self.DAMAGES[damage])
        with refused(filled, place, Corrupt):
            filled.load(reference)

    def test_of_two_swapped_blobs_is_found(self, filled: Registry, place: Path) -> None:
        one, other = (self.blobs(filled, reference)["tensors"] for reference in ("walk/new", "walk/parts"))
        data = one.read_bytes()
        self.change(one, lambda _: other.read_bytes())
        self.change(other, lambda _: data)
        for reference in ("walk/new", "walk/parts"):
            with refused(filled, place, Corrupt):
                filled.pull(reference, place / "out")

    def test_names_both_digests(self, filled: Registry, place: Path) -> None:
        path = self.blobs(filled, "walk/new")["tensors"]
        self.change(path, self.DAMAGES["a bit in the data"])
        with refused(filled, place, DigestMismatch, path.name):
            filled.pull("walk/new", place / "out")

    @pytest.mark.parametrize(
        ("reference", "role"),
        [
            ("walk/new", "tensors"),
            ("walk/new", "file"),
            ("walk/parts", "header"),
            ("walk/parts", "reused"),
            ("walk/parts", "tensors"),
        ],
    )
    @pytest.mark.parametrize("force", [False, True])
    def test_without_a_blob_names_it(
        self, filled: Registry, place: Path, reference: str, role: str, force: bool
    ) -> None:
        path = self.blobs(filled, reference)[role]
        path.unlink()
        (place / "out").mkdir()
        with refused(filled, place, BlobNotFound, path.name):
            filled.pull(reference, place / "out", force=force)

    @pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
    def test_with_something_else_in_place_of_a_blob_is_corrupt(
        self, filled: Registry, place: Path, tmp_path: Path, kind: str
    ) -> None:
        path = self.blobs(filled, "walk/new")["tensors"]
        data = path.read_bytes()
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            (tmp_path / "copy").write_bytes(data)
            path.symlink_to(tmp_path / "copy")
        with pytest.raises(Corrupt, match=path.name):
            filled.pull("walk/new", place / "out")
        assert os.listdir(place) == []

    def test_keeps_what_a_forced_pull_would_have_replaced(self, filled: Registry, place: Path) -> None:
        filled.pull("walk/new", place / "out")
        self.change(self.blobs(filled, "walk/new")["tensors"], self.DAMAGES["zeros"])
        with refused(filled, place, DigestMismatch):
            filled.pull("walk/new", place / "out", force=True)

    def test_that_cannot_be_read_is_not_blamed_on_the_destination(
        self, filled: Registry, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from registry.store.local_blobs import LocalBlobStore

        class Broken:
            def __init__(self, *_: object) -> None: ...
            def __enter__(self) -> Broken:
                return self

            def __exit__(self, *_: object) -> None: ...
            def read(self, *_: object) -> bytes:
                raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(LocalBlobStore, "open", Broken)
        digest = self.blobs(filled, "walk/base")["tensors"].name
        with refused(filled, place, StorageError, f"cannot read blob {digest}"):
            filled.pull("walk/base", place / "out")


def killed_pulls(template: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        root = Path(shutil.copytree(template, folder / "registry"))
        out = folder / "out"
        out.mkdir()
        with Registry.open(root) as registry:
            registry.push(peft_folder(folder / "adapter"), "walk/new", base="walk/base")
            expected = tree(folder / "adapter")
            absent = 0
            for number, killed in killed_at_every_stage(
                lambda number: partial(registry.pull, "walk/new", out / str(number))
            ):
                there = out / str(number)
                if there.exists():
                    assert tree(there) == expected, "half a version arrived"
                else:
                    absent += 1
                    assert killed
                    registry.pull("walk/new", there)
                    assert tree(there) == expected
            assert absent > 5, absent
            # And in the middle of the bytes.
            assert forked(partial(pull_half, registry, out / "half")) == -signal.SIGKILL
            assert not (out / "half").exists()


def pull_half(registry: Registry, destination: Path) -> None:
    file_bytes = converting.file_bytes

    def dying(*arguments: Any) -> Iterator[bytes]:
        for chunk in file_bytes(*arguments):
            yield chunk[: len(chunk) // 2]
            os.kill(os.getpid(), signal.SIGKILL)

    converting.file_bytes = dying
    registry.pull("walk/new", destination)


def test_a_pull_that_is_killed_leaves_all_or_nothing_at_the_destination(template: Path) -> None:
    succeeds_alone(killed_pulls, template)
