"""A folder's files as they are found, and what is refused in a folder that came from somewhere else."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.file_download import _create_symlink

from registry import Registry
from registry.core.errors import InvalidInput, SourceNotFound, StorageError
from registry.formats.attachments import ATTACHMENT_LIMIT, Attachment, attachments, list_folder
from tests.failures.support import as_nobody, open_folder

SECRET = b"a file outside"


def kept(folder: Path, *known: str) -> dict[str, bytes]:
    """What a folder's attachments hold, by path."""
    found, _ = attachments(list_folder(folder), known)
    return {file.path: b"".join(bytes(chunk) for chunk in file.chunks()) for file in found}


def fill(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    return folder


def test_all_files_are_kept_sorted_by_path(tmp_path: Path) -> None:
    fill(tmp_path, "b.txt", "a/z/deep.bin", "a-b", "known.bin", "Ünicode name.md")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_bytes(b"")
    found = kept(tmp_path, "known.bin")
    assert list(found) == ["a-b", "a/z/deep.bin", "b.txt", "none.txt", "Ünicode name.md"]
    assert all(data == path.encode() for path, data in found.items() if path != "none.txt")
    assert found["none.txt"] == b""


def test_folders_of_tools_are_left_out_with_a_note(tmp_path: Path) -> None:
    fill(tmp_path, "code/__pycache__/x.pyc", ".git/config", ".cache/huggingface/x.lock", "a.txt", "git/x", ".gitignore")
    found, notes = attachments(list_folder(tmp_path), ())
    assert [file.path for file in found] == [".gitignore", "a.txt", "git/x"]
    assert notes == ("left out (folders of tools): .cache, .git, code/__pycache__",)


def test_without_attachments_nothing_is_kept_and_nothing_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "b.bin")
    (tmp_path / "link").symlink_to("/etc/passwd")
    found, notes = attachments(list_folder(tmp_path), ["b.bin"], limit=None)
    assert (found, notes) == ((), ("left out (no attachments): a.txt, link",))


def test_a_large_file_is_refused_with_its_name_and_size(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt")
    for name in ("data.bin", "more.bin", "weights.bin"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(ATTACHMENT_LIMIT + 1)
    listing = list_folder(tmp_path)
    with pytest.raises(InvalidInput) as caught:
        attachments(listing, ["weights.bin"])
    message = str(caught.value)
    assert f"{tmp_path / 'data.bin'} has 268435457 bytes (and 1 more are too large)" in message
    assert "has 268435456 at most" in message
    assert "--attachment-limit" in message
    assert "--no-attachments" in message
    found, _ = attachments(listing, ["weights.bin"], limit=ATTACHMENT_LIMIT + 1)
    assert [file.path for file in found] == ["a.txt", "data.bin", "more.bin"]


def test_an_attachment_is_never_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(64 << 20)
    ((attachment,), _) = attachments(list_folder(tmp_path), ())
    tracemalloc.start()
    assert sum(len(chunk) for chunk in attachment.chunks()) == attachment.size == 64 << 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


# ---------------------------------------------------------------- links


def link_to_a_file(folder: Path) -> None:
    (folder / "x").symlink_to(folder.parent / "secret")


def link_to_a_file_of_the_folder(folder: Path) -> None:
    (folder / "x").symlink_to("a.txt")


def link_to_a_folder(folder: Path) -> None:
    (folder / "x").symlink_to("/etc")


def link_to_itself(folder: Path) -> None:
    (folder / "x").symlink_to("x")


def link_to_the_folder(folder: Path) -> None:
    (folder / "x").symlink_to(".")


def link_to_nothing(folder: Path) -> None:
    (folder / "x").symlink_to("nothing")


def link_by_two(folder: Path) -> None:
    (folder.parent / "hop").symlink_to("secret")
    (folder / "x").symlink_to("../hop")


@pytest.mark.parametrize(
    "make",
    [
        link_to_a_file,
        link_to_a_file_of_the_folder,
        link_to_a_folder,
        link_to_itself,
        link_to_the_folder,
        link_to_nothing,
        link_by_two,
    ],
)
def test_a_symbolic_link_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    folder = fill(tmp_path / "model", "a.txt")
    make(folder)
    with pytest.raises(InvalidInput, match=r"x cannot be kept: it is a symbolic link; put the file itself there"):
        kept(folder)


def test_the_folder_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    fill(tmp_path / "real", "a.txt")
    (tmp_path / "link").symlink_to("real")
    assert kept(tmp_path / "link") == {"a.txt": b"a.txt"}


def hub_cache(root: Path, *paths: str) -> Path:
    """A snapshot as huggingface_hub writes it."""
    repository = root / "hub" / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123456789abcdef"
    for number, path in enumerate(paths):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(path.encode())
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        _create_symlink(str(blob), str(snapshot / path), new_blob=True)
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_read(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, "README.md", "unet/config.json", "unet/a/b.txt")
    assert (snapshot / "unet" / "config.json").is_symlink()
    assert kept(snapshot) == {path: path.encode() for path in ("README.md", "unet/a/b.txt", "unet/config.json")}
    assert kept(snapshot / "unet") == {"a/b.txt": b"unet/a/b.txt", "config.json": b"unet/config.json"}
    # By another path to the cache, as where the home folder is a link.
    (tmp_path / "other").symlink_to("hub")
    assert kept(tmp_path / "other" / "models--org--name" / "snapshots" / "0123456789abcdef").keys() == {
        "README.md",
        "unet/a/b.txt",
        "unet/config.json",
    }


@pytest.mark.parametrize(
    "target",
    [
        "../../../../secret",
        "../../blobs/../../../secret",
        "../../blobs/inner/x",
        "../../blobs",
        "../../../models--org--other/blobs/x",
        "README.md",
        "/etc/passwd",
    ],
)
def test_a_link_of_a_snapshot_that_leaves_the_blobs_is_refused(target: str, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, "README.md")
    fill(tmp_path, "secret", "hub/models--org--other/blobs/x", "hub/models--org--name/blobs/inner/x")
    (snapshot / "x").symlink_to(target)
    with pytest.raises(InvalidInput, match="x cannot be kept: it is a symbolic link"):
        kept(snapshot)


def test_a_blob_that_is_a_link_or_missing_is_refused(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, "README.md")
    blob = snapshot.parent.parent / "blobs" / f"{0:040x}"
    blob.unlink()
    with pytest.raises(InvalidInput, match=r"README.md cannot be kept: the hub cache has not its blob; download it"):
        kept(snapshot)
    blob.symlink_to(fill(tmp_path, "secret") / "secret")
    with pytest.raises(InvalidInput, match=r"README\.md cannot be kept: it is no regular file"):
        kept(snapshot)


# ---------------------------------------------------------------- what is no file, and what cannot be read


def test_what_is_no_regular_file_is_refused_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="pipe cannot be kept: it is no regular file"):
        kept(tmp_path)
    (tmp_path / "pipe").unlink()
    here = Path.cwd()
    os.chdir(tmp_path)  # a socket's path has room for about 100 letters
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    os.chdir(here)
    with pytest.raises(InvalidInput, match="socket cannot be kept: it is no regular file"):
        kept(tmp_path)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "x" * 255 + "/" + "y" * 255 + "/" + "z" * 20, "a\u202eb", "C:/x"])
def test_a_path_that_no_version_may_hold_is_refused(name: str, tmp_path: Path) -> None:
    fill(tmp_path, name)
    with pytest.raises(InvalidInput, match="cannot be kept: its path may not stand in a version") as caught:
        kept(tmp_path)
    assert str(caught.value).isprintable()
    assert attachments(list_folder(tmp_path), (), limit=None)[0] == ()


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/a\xff", "wb"):
        pass
    with pytest.raises(InvalidInput, match="cannot be kept: its path may not stand in a version"):
        kept(tmp_path)


def test_what_cannot_be_read_is_told() -> None:
    with open_folder() as folder:
        fill(folder, "closed.txt", "inner/a.txt")
        (folder / "closed.txt").chmod(0o000)
        listing = list_folder(folder)
        (folder / "inner").chmod(0o000)

        def refused() -> None:
            with pytest.raises(StorageError, match=r"cannot read .*inner: Permission denied"):
                list_folder(folder)
            (first, *_), _ = attachments(listing, ())
            with pytest.raises(StorageError, match=r"cannot read .*closed.txt: Permission denied"):
                b"".join(first.chunks())

        as_nobody(refused)


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        list_folder(tmp_path / "none")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((InvalidInput, SourceNotFound)):
        list_folder(tmp_path / "loop")


# ---------------------------------------------------------------- a folder that changes


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


def become_a_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [grow, rewrite, become_a_link, become_a_pipe, Path.unlink])
def test_a_file_that_changed_is_not_read(change: Callable[[Path], None], tmp_path: Path) -> None:
    listing = list_folder(fill(tmp_path, "a.txt"))
    ((file,), _) = attachments(listing, ())
    assert file.is_unchanged()
    assert listing.is_unchanged()
    change(tmp_path / "a.txt")
    with pytest.raises((InvalidInput, SourceNotFound)):
        b"".join(file.chunks())
    assert not file.is_unchanged()
    assert not listing.is_unchanged()


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    with (tmp_path / "a.bin").open("wb") as large:
        large.truncate(16 << 20)
    ((file,), _) = attachments(list_folder(tmp_path), ())
    chunks = file.chunks()
    next(chunks)
    os.truncate(tmp_path / "a.bin", 5 << 20)
    with pytest.raises(InvalidInput, match=r"a\.bin changed while it was read"):
        for _ in chunks:
            pass


@pytest.mark.parametrize("change", ["another file", "one file less"])
def test_files_that_come_or_go_are_noticed(change: str, tmp_path: Path) -> None:
    listing = list_folder(fill(tmp_path, "a.txt", "inner/b.txt"))
    if change == "another file":
        fill(tmp_path, "inner/c.txt")
    else:
        (tmp_path / "inner" / "b.txt").unlink()
    assert not listing.is_unchanged()


def test_a_push_of_a_folder_that_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(tmp_path / "model", "README.md")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(one_tensor())
    read = Attachment.chunks

    def late(file: Attachment) -> object:
        fill(folder, "later.txt")
        return read(file)

    with Registry.init(tmp_path / "registry") as registry:
        with monkeypatch.context() as patch:
            patch.setattr(Attachment, "chunks", late)
            with pytest.raises(InvalidInput, match="the model folder changed while it was pushed"):
                registry.push(folder, "walk/base")
        assert registry.find() == []
        assert registry.push(folder, "walk/base").reference == "walk/base@1"


def one_tensor() -> bytes:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)
