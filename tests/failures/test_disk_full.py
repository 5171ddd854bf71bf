"""A disk that is full in the middle, at any page: of a push nothing is visible (or, when the transaction had been
committed, one whole version whose journal the next opening completes), no temporary file stays, and with room again
the same push works. The same for pull and init."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from registry import Registry
from registry.core.errors import ArtifactNotFound, NoSpace, StorageError
from tests.failures.support import (
    REFUSED,
    adapter_tensors,
    floats,
    forked,
    peft_folder,
    photograph,
    quick_folder,
    succeeds_alone,
    tensor_file,
    warm_up,
    whole,
)

PAGE = 4096


@contextmanager
def pages_free(disk: Path, pages: int) -> Iterator[None]:
    """Fills a disk so that only so many pages are left."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail
    with filler.open("wb") as file:
        if free > pages:
            os.posix_fallocate(file.fileno(), 0, (free - pages) * PAGE)
        yield
    filler.unlink()


def done_in_a_child(work: Callable[[], object], allowed: type[StorageError] = NoSpace) -> bool:
    """Whether the work was done; in a child, because a full disk may end in SIGBUS."""
    code = forked(work, allowed)
    assert code in (0, REFUSED), f"the child ended with {code}"
    return code == 0


def pushes_without_room(template: str, mount: str) -> None:
    disk = Path(mount)
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        source = tensor_file(folder / "model.safetensors", {"a.weight": floats(64, 64, seed=8)})
        root = Path(shutil.copytree(template, disk / "registry"))
        registry = Registry.open(root)

        def push() -> str:
            return registry.push(source, "walk/new", base="walk/base", tags=["prod"], metrics={"reward": 1}).digest

        expected = push()
        found = {"absent": 0, "whole": 0}
        for pages in range(0, 500, 2):
            registry.close()
            shutil.rmtree(root)
            shutil.copytree(template, root)
            with pages_free(disk, pages):
                done = done_in_a_child(push)
                assert not any((root / "tmp").iterdir()), "a temporary file was left"
            Registry.open(root).close()
            try:
                registry.get("walk/new")
            except ArtifactNotFound:
                assert not done
                assert not (root / "journal" / "walk" / "new").exists()
                found["absent"] += 1
            else:
                whole(registry, root, "walk/new")
                found["whole"] += 1
            assert push() == expected
            whole(registry, root, "walk/new")
            if done:
                break
        assert done
        assert found["absent"] > 15, found
        registry.close()
        print(pages, found)


def test_a_push_onto_a_disk_that_fills_up_anywhere_is_absent_or_whole(
    template: Path, mounted: Callable[[str], Path]
) -> None:
    print(succeeds_alone(pushes_without_room, template, mounted("size=8m")))


def streamed_without_room(template: str, mount: str) -> None:
    disk = Path(mount)
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        source = tensor_file(folder / "model.safetensors", {"w": ("U8", (20 << 20,), os.urandom(20 << 20))})
        root = Path(shutil.copytree(template, disk / "registry"))
        before = photograph(root)
        with Registry.open(root) as registry:
            assert not done_in_a_child(lambda: registry.push(source, "walk/new"))
            assert photograph(root) == before
            subprocess.run(["/bin/mount", "-o", "remount,size=64m", mount], check=True)
            assert registry.push(source, "walk/new").created
            whole(registry, root, "walk/new")


def test_a_file_larger_than_the_disk_leaves_nothing(template: Path, mounted: Callable[[str], Path]) -> None:
    succeeds_alone(streamed_without_room, template, mounted("size=8m"))


def pushes_without_inodes(template: str, mount: str) -> None:
    disk = Path(mount)
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        source = peft_folder(folder / "adapter")
        root, fillers = disk / "registry", disk / "fillers"
        shutil.copytree(template, root)
        registry = Registry.open(root)
        before = photograph(root)
        for free in range(60):
            registry.close()
            shutil.rmtree(root)
            shutil.copytree(template, root)
            fillers.mkdir()
            for number in range(os.statvfs(disk).f_favail - free):
                (fillers / str(number)).touch()
            done = done_in_a_child(partial(registry.push, source, "walk/new"), StorageError)
            assert not any((root / "tmp").iterdir())
            shutil.rmtree(fillers)
            Registry.open(root).close()
            after = photograph(root)
            assert len(after.rows["version"]) == 2 or after.rows == before.rows
            registry.push(source, "walk/new")
            whole(registry, root, "walk/new")
            if done:
                break
        assert done
        assert free > 5
        print(free)


def test_a_push_onto_a_disk_without_inodes_is_absent_or_whole(template: Path, mounted: Callable[[str], Path]) -> None:
    print(succeeds_alone(pushes_without_inodes, template, mounted("size=8m,nr_inodes=100")))


def inits_without_room(mount: str) -> None:
    disk = Path(mount)
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        source = peft_folder(folder / "adapter")
        root = disk / "deep" / "registry"
        for pages in range(0, 1000, 6):
            with pages_free(disk, pages):
                done = done_in_a_child(lambda: Registry.init(root).close())
                tmp = root / "tmp"
                assert not tmp.exists() or not any(tmp.iterdir()), "a temporary file was left"
            assert done == (root / "catalog.sqlite").exists()
            with Registry.init(root) as registry:
                assert registry.push(source, "walk/new").created
                whole(registry, root, "walk/new")
            shutil.rmtree(disk / "deep")
            if done:
                break
        assert done
        assert pages > 50
        print(pages)


@pytest.mark.exhaustive
def test_an_init_on_a_disk_that_is_full_can_be_done_again(mounted: Callable[[str], Path]) -> None:
    print(succeeds_alone(inits_without_room, mounted("size=8m")))


def pulls_without_room(template: str, mount: str) -> None:
    disk = Path(mount)
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        root = Path(shutil.copytree(template, folder / "registry"))
        size = 64 << 10
        tensors = {"w": ("U8", (size,), os.urandom(size))}
        with Registry.open(root) as registry:
            registry.push(tensor_file(folder / "model.safetensors", tensors), "walk/file")
            registry.push(peft_folder(folder / "adapter", tensors={**adapter_tensors(), **tensors}), "walk/folder")
            before = photograph(root)
            for reference in ("walk/file", "walk/folder"):
                for pages in range(100):
                    with pages_free(disk, pages):
                        done = done_in_a_child(partial(registry.pull, reference, disk / "out"))
                        assert sorted(os.listdir(disk)) == (["filler", "out"] if done else ["filler"])
                    if done:
                        break
                assert pages > size // PAGE
                assert done
                out = disk / "out"
                shutil.rmtree(out) if out.is_dir() else out.unlink()
            assert photograph(root) == before


def test_a_pull_onto_a_full_disk_leaves_nothing(template: Path, mounted: Callable[[str], Path]) -> None:
    succeeds_alone(pulls_without_room, template, mounted("size=2m"))


def pushes_under_a_limit(template: str) -> None:
    """A limit on the size of files, which needs no root; SQLite cannot tell it from a broken disk."""
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        source = tensor_file(folder / "model.safetensors", {"w": ("U8", (1 << 20,), os.urandom(1 << 20))})
        root = Path(shutil.copytree(template, folder / "registry"))
        before = photograph(root)

        def limited(limit: int, push: Callable[[], object]) -> Callable[[], object]:
            def work() -> object:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                return push()

            return work

        with Registry.open(root) as registry:
            for limit in (0, 1, PAGE, 10 * PAGE, 100 * PAGE, 1 << 20):
                kind = NoSpace if limit >= 100 * PAGE else StorageError
                assert not done_in_a_child(limited(limit, lambda: registry.push(source, "walk/new")), kind), limit
                assert photograph(root) == before, limit
            assert done_in_a_child(limited(2 << 20, lambda: registry.push(source, "walk/new")))
            whole(registry, root, "walk/new")
            expected = (folder / "model.safetensors").read_bytes()
            for limit in (100 * PAGE, 1 << 20):
                assert not done_in_a_child(limited(limit, lambda: registry.pull("walk/new", folder / "out")))
                assert not (folder / "out").exists()
            assert done_in_a_child(limited(2 << 20, lambda: registry.pull("walk/new", folder / "out")))
            assert (folder / "out").read_bytes() == expected


def test_a_limit_on_the_size_of_files_is_a_full_disk_too(template: Path) -> None:
    succeeds_alone(pushes_under_a_limit, template)
