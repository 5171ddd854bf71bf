"""Bundles that are damaged, or that somebody made to do harm: each is refused with a word of our own, and the registry
that should take it in is afterwards as it was before, bit for bit."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry import Registry
from registry.core.bundle import INDEX
from registry.core.canonical_json import canonical_json
from registry.core.digest import sha256_hex
from registry.core.errors import (
    Corrupt,
    DigestMismatch,
    InvalidInput,
    InvalidManifest,
    NoSpace,
    RegistryError,
    SourceNotFound,
)
from registry.formats import bundle, bundle_tar
from tests.failures.support import CONFIG, peft_folder, photograph, tensor_file


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound bundle, `b`, and its tar form: an adapter with a note, its parent and its base."""
    folder = tmp_path_factory.mktemp("bundles")
    with Registry.init(folder / "registry") as registry:
        registry.push(tensor_file(folder / "model.safetensors"), "walk/base", tags=["v1"])
        for place in (1, 2):
            registry.push(
                peft_folder(folder / f"adapter{place}", {**CONFIG, "lora_alpha": 8 * place}),
                "walk/perturb:prod",
                base="walk/base@1",
                continued_from="walk/perturb@1" if place == 2 else None,
                metadata={"seed": place},
            )
        registry.export("walk/perturb", to=folder / "b")
        registry.export("walk/perturb", to=folder / "b.tar")
        registry.export("walk/perturb", to=folder / "small", no_base=True)
    return folder


@pytest.fixture
def b(exported: Path, tmp_path: Path) -> Path:
    """A copy of the sound bundle, to be spoiled."""
    return Path(shutil.copytree(exported / "b", tmp_path / "b"))


def refused(root: Path, path: Path, kind: type[RegistryError], words: str) -> None:
    """Holds that an import is refused and changes nothing."""
    before = photograph(root)
    with Registry.open(root) as registry, pytest.raises(kind, match=words) as caught:
        registry.import_(path)
    assert type(caught.value) is kind, caught.value
    assert photograph(root) == before


def index(b: Path) -> Any:
    return json.loads((b / INDEX).read_text())


def write_index(b: Path, tree: Any) -> None:
    (b / INDEX).write_bytes(canonical_json(tree, INDEX))


def add_blob(b: Path, data: bytes) -> str:
    digest = sha256_hex(data)
    path = b / "blobs" / "sha256" / digest[:2] / digest
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return digest


def blob(b: Path, digest: str) -> Path:
    return b / "blobs" / "sha256" / digest[:2] / digest


def rewrite_event(b: Path, name: str, seq: int, change: Callable[[Any], None]) -> None:
    """Changes an event and gives it a sound sha256."""
    path = b / "events" / "walk" / name / f"{seq}.json"
    tree = json.loads(path.read_text())
    del tree["sha256"]
    change(tree)
    tree["sha256"] = sha256_hex(canonical_json(tree, "x"))
    path.write_bytes(canonical_json(tree, "x"))


def tensors_blob(b: Path, place: int) -> str:
    """Digest of the blob with the tensors of a version of the bundle."""
    placement = pushed(b, index(b)["versions"][place])["payload"]["placement"]
    return str(next(digest for digest, role in placement["blobs"] if role == "tensors"))


def pushed(b: Path, entry: Any) -> Any:
    for path in sorted((b / "events" / entry["namespace"] / entry["name"]).iterdir()):
        tree = json.loads(path.read_text())
        if (tree["kind"], tree["version"]) == ("pushed", entry["number"]):
            return tree
    raise AssertionError(entry)


def test_the_sound_bundle_is_taken_in(root: Path, b: Path, exported: Path) -> None:
    with Registry.open(root) as registry:
        assert len(registry.import_(b).versions) == 3
        assert not any(one.created for one in registry.import_(exported / "b.tar").versions)
        assert not any(one.created for one in registry.import_(exported / "small").versions)


# ------------------------------------------------------------ folders


def test_a_link_in_a_folder_is_not_followed(root: Path, b: Path, tmp_path: Path) -> None:
    path = blob(b, tensors_blob(b, 0))
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(root, b, InvalidInput, "is a link; a bundle holds plain files alone")


def test_a_folder_that_is_a_link_is_not_followed(root: Path, b: Path, tmp_path: Path) -> None:
    shutil.move(b / "events", tmp_path / "events")
    (b / "events").symlink_to(tmp_path / "events")
    refused(root, b, InvalidInput, "'events' is a link")


def test_a_link_that_comes_later_is_not_followed_either(b: Path, tmp_path: Path) -> None:
    with bundle.open_bundle(b) as opened:
        shutil.move(b / "events", tmp_path / "events")
        (b / "events").symlink_to(tmp_path / "events")
        with pytest.raises(RegistryError, match="cannot read"):
            opened.document("events/walk/base/1.json")


def test_a_pipe_or_socket_is_refused_at_once(root: Path, b: Path) -> None:
    os.mkfifo(b / "blobs" / "pipe")
    refused(root, b, InvalidInput, "'blobs/pipe' is no regular file")
    (b / "blobs" / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(b / "s"))
        refused(root, b, InvalidInput, "'s' is no regular file")


@pytest.mark.parametrize(
    "name",
    [
        "readme.txt",
        "blobs/readme.txt",
        "blobs/sha256/ab/" + "c" * 64,
        "blobs/sha256/ab/" + "AB" * 32,
        "events/walk/base/0.json",
        "events/walk/base/01.json",
        "events/walk/..x/1.json",
        "events/Walk/base/1.json",
        "events/walk/base/deep/1.json",
        "journal/walk/base/1.json",
        "events/walk/ba\x1b[31m/1.json",
    ],
)
def test_what_does_not_belong_into_a_bundle_is_refused(root: Path, b: Path, name: str) -> None:
    (b / name).parent.mkdir(parents=True, exist_ok=True)
    (b / name).write_bytes(b"x")
    refused(root, b, _kind_of(root, b), "does not belong into a bundle|invalid reference")


def _kind_of(root: Path, b: Path) -> type[RegistryError]:
    """A name that is no name is an InvalidReference, all else an InvalidInput."""
    with Registry.open(root) as registry, pytest.raises(InvalidInput) as caught:
        registry.import_(b)
    return type(caught.value)


def test_a_blob_that_nobody_needs_is_refused(root: Path, b: Path) -> None:
    digest = add_blob(b, b"what is this?")
    refused(root, b, InvalidInput, f"no version needs blobs/sha256/{digest[:2]}/{digest}")


def test_an_event_of_a_stranger_is_refused(root: Path, b: Path) -> None:
    shutil.copytree(b / "events" / "walk" / "base", b / "events" / "walk" / "other")
    refused(root, b, Corrupt, "is an event of another registry, name or number")
    shutil.rmtree(b / "events" / "walk" / "other")
    rewrite_event(b, "base", 1, lambda tree: tree.update(version=7))
    refused(root, b, InvalidInput, "has events of walk/base@7, which it does not list")


def test_a_missing_member_is_told(root: Path, b: Path) -> None:
    digest = tensors_blob(b, 0)
    blob(b, digest).unlink()
    refused(root, b, Corrupt, f"has no blob {digest}")
    (b / INDEX).unlink()
    refused(root, b, InvalidInput, "is no bundle: it has no bundle.json")
    refused(root, b / "nothing", SourceNotFound, "no such file or folder")


def test_a_missing_event_is_told(root: Path, b: Path) -> None:
    (b / "events" / "walk" / "base" / "1.json").unlink()
    refused(root, b, Corrupt, "walk/base@1: expected one event `pushed`")


# ------------------------------------------------------------ digests


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_flipped_bit_of_a_tensor_is_found(root: Path, b: Path, place: int) -> None:
    path = blob(b, tensors_blob(b, place))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(root, b, DigestMismatch, path.name)


def test_every_changed_byte_of_a_bundle_is_found(root: Path, exported: Path, tmp_path: Path) -> None:
    """One byte in each member, in the middle; the order of the bytes in a tar file leaves no other place."""
    for path in sorted(one for one in (exported / "b").rglob("*") if one.is_file()):
        copy = Path(shutil.copytree(exported / "b", tmp_path / "copy"))
        spoiled = copy / path.relative_to(exported / "b")
        data = bytearray(spoiled.read_bytes())
        data[len(data) // 2] ^= 1
        spoiled.write_bytes(data)
        before = photograph(root)
        with Registry.open(root) as registry, pytest.raises((InvalidInput, Corrupt)):
            registry.import_(copy)
        assert photograph(root) == before
        shutil.rmtree(copy)


def test_another_manifest_is_found(root: Path, b: Path) -> None:
    tree = index(b)
    manifest = json.loads(blob(b, tree["versions"][2]["manifest"]).read_text())
    manifest["config"]["lora_alpha"] = 99
    tree["versions"][2]["manifest"] = add_blob(b, canonical_json(manifest, "x"))
    write_index(b, tree)
    refused(root, b, Corrupt, "its manifest is")


def other_manifest(b: Path, place: int, change: Callable[[Any], None]) -> None:
    """Changes a manifest, and all digests of it that stand elsewhere, as somebody would who means it."""
    tree = index(b)
    entry = tree["versions"][place]
    old = entry["manifest"]
    manifest = json.loads(blob(b, old).read_text())
    change(manifest)
    blob(b, old).unlink()
    new = add_blob(b, canonical_json(manifest, "x"))
    for path in b.rglob("*.json"):
        path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    for path in (b / "events").rglob("*.json"):
        rewrite_event(b, path.parent.name, int(path.stem), lambda tree: None)


def test_another_content_digest_is_a_note_for_programs_learn(root: Path, b: Path) -> None:
    tree = index(b)
    tree["versions"][0]["content"] = "0" * 64
    write_index(b, tree)
    rewrite_event(b, "base", 1, lambda tree: tree["payload"].update(content="0" * 64))
    with Registry.open(root) as registry:
        notes = registry.import_(b).notes
    assert notes == ("walk/base@1 gets another content digest than where it comes from",)


def test_a_manifest_that_names_other_tensors_is_found(root: Path, b: Path) -> None:
    def swap(manifest: Any) -> None:
        tensors = manifest["components"]["adapter"]["tensors"]
        tensors[0], tensors[2] = tensors[2], tensors[0]

    other_manifest(b, 2, swap)
    refused(root, b, DigestMismatch, "tensor 0 of the adapter of walk/perturb@2")


def test_a_manifest_that_names_another_layout_is_found(root: Path, b: Path) -> None:
    def change(manifest: Any) -> None:
        layout = json.loads(blob(b, manifest["components"]["adapter"]["layout"]).read_text())
        layout[0][1] = "I32"
        manifest["components"]["adapter"]["layout"] = add_blob(b, canonical_json(layout, "x"))

    other_manifest(b, 2, change)
    refused(root, b, InvalidManifest, "leaves out the blob")


def test_a_manifest_that_names_another_file_is_found(root: Path, b: Path) -> None:
    other_manifest(b, 2, lambda manifest: manifest["files"][0].update(size=manifest["files"][0]["size"] + 1))
    refused(root, b, Corrupt, "the file adapter_config.json, found")


def test_a_manifest_with_a_path_that_leads_out_is_refused(root: Path, b: Path) -> None:
    other_manifest(b, 2, lambda manifest: manifest["files"][0].update(path="../../evil"))
    refused(root, b, InvalidManifest, "is not a plain relative path")


def test_another_ancestor_is_found(root: Path, b: Path) -> None:
    rewrite_event(b, "perturb", 1, lambda tree: tree["payload"].update(base="walk/other@1"))
    refused(root, b, Corrupt, "its ancestor walk/other@1 does not stand before it")
    rewrite_event(b, "perturb", 1, lambda tree: tree["payload"].update(base="walk/perturb@2"))
    refused(root, b, Corrupt, "its ancestor walk/perturb@2 does not stand before it")
    rewrite_event(b, "perturb", 1, lambda tree: tree["payload"].update(base=None))
    refused(root, b, Corrupt, "names other ancestors than its manifest")


def test_an_event_that_was_changed_is_found(root: Path, b: Path) -> None:
    path = b / "events" / "walk" / "perturb" / "1.json"
    path.write_bytes(path.read_bytes().replace(b'"git_dirty"', b'"git_dirtx"'))
    refused(root, b, DigestMismatch, "events/walk/perturb/1.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda payload: payload["placement"]["files"].update({"adapter_config.json": [99, True]}), "not a placement"),
        (lambda payload: payload["placement"]["components"].update(adapter=[[99, 0, 4]]), "not a placement"),
        (lambda payload: payload["placement"]["components"].update(adapter=[[0, 0, 2**24]]), "placements of 16777216"),
        (lambda payload: payload["placement"]["components"].update(adapter=[[0, 0, 9], [0, 0, -5]]), "not a placement"),
        (lambda payload: payload["placement"]["components"].update(adapter=[[1, 0, 4]]), "says that it holds tensors"),
        (lambda payload: payload["placement"]["components"].update(adapter=[[0, 2, 4]]), "none with ordinal 4"),
        (lambda payload: payload["placement"].pop("blobs"), "not a placement"),
        (lambda payload: payload["placement"]["blobs"].append(["0" * 64, "file"]), "has no blob 0000"),
        (lambda payload: payload["placement"]["blobs"].append(["../../etc/passwd", "file"]), "a digest and one of"),
        (lambda payload: payload.update(environment={"git_dirty": "\0"}), "NUL"),
        (lambda payload: payload.update(environment={"torch_version": 3}), "environment torch_version"),
        (lambda payload: payload.update(environment=[1]), "cannot be read"),
        (lambda payload: payload.update(message=7), "cannot be read"),
        (lambda payload: payload.update(nonfinite={"adapter": [4]}), "nonfinite"),
        (lambda payload: payload.update(content="0" * 64), "another kind or content digest"),
        (lambda payload: payload.clear(), "cannot be read"),
    ],
)
def test_an_event_with_a_sound_digest_and_a_wrong_payload_is_refused(
    root: Path, b: Path, change: Callable[[Any], Any], words: str
) -> None:
    def apply(tree: Any) -> None:
        change(tree["payload"])

    rewrite_event(b, "perturb", 1, apply)
    before = photograph(root)
    with Registry.open(root) as registry, pytest.raises((InvalidInput, Corrupt), match=words):
        registry.import_(b)
    assert photograph(root) == before


@pytest.mark.parametrize(
    "payload",
    [
        {"seed": {"text": "1\0", "number": None}},
        {"seed": {"text": "1", "number": 2}},
        {"seed": {"text": "x" * 501, "number": None}},
        {"../seed": {"text": "1", "number": 1}},
        {"seed": "1"},
    ],
)
def test_metadata_that_nobody_could_have_given_is_refused(root: Path, b: Path, payload: Any) -> None:
    path = next(
        path
        for path in sorted((b / "events" / "walk" / "perturb").iterdir())
        if json.loads(path.read_text())["kind"] == "metadata"
    )
    rewrite_event(b, "perturb", int(path.stem), lambda tree: tree.update(payload=payload))
    refused(root, b, Corrupt, r"\(metadata\) cannot be read")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.update(format=2), "format 2; this program reads 1"),
        (lambda tree: tree.update(more=1), "unknown members"),
        (lambda tree: tree["versions"][0].update(more=1), "unknown members"),
        (lambda tree: tree.update(versions=[]), "0 versions"),
        (lambda tree: tree.update(registry="x"), "no id of 32 hex digits"),
        (lambda tree: tree["versions"].append(tree["versions"][0]), "stands there twice"),
        (lambda tree: tree["versions"].reverse(), "does not stand before it"),
        (lambda tree: tree["versions"][0].update(namespace=".."), "bundle.json cannot be read"),
        (lambda tree: tree["versions"][0].update(name="a/b"), "bundle.json cannot be read"),
        (lambda tree: tree["versions"][0].update(number=True), "number True"),
        (lambda tree: tree["versions"][0].update(manifest="../x"), "64 hex digits"),
        (lambda tree: tree["versions"][0].update(kind="x"), "kind 'x'"),
        (lambda tree: tree["versions"][0].update(kind="checkpoint"), "another kind or content digest"),
        (lambda tree: tree["versions"][0].update(content="0" * 64), "another kind or content digest"),
        (lambda tree: tree["versions"][0].update(tags=["latest"]), "bundle.json cannot be read"),
        (lambda tree: tree["versions"][0].update(tags=["\x1b[31m"]), "bundle.json cannot be read"),
        (lambda tree: tree["versions"][0].update(tags=["b", "a"]), "not sorted"),
        (lambda tree: tree["versions"][1].update(tags=["prod"]), "the tag walk/perturb:prod stands there twice"),
        (lambda tree: tree["versions"][2].update(asked=False), "none of its versions was asked for"),
        (lambda tree: tree["versions"][0].update(external={}), "bundle.json cannot be read"),
        (
            lambda tree: tree["versions"][0].update(
                external={"blobs": [["0" * 64, "external"]], "components": {"model": [[0, 0, 2**24]]}, "files": {}}
            ),
            "placements of 16777216 tensors",
        ),
    ],
)
def test_a_wrong_table_of_contents_is_refused(root: Path, b: Path, change: Callable[[Any], Any], words: str) -> None:
    tree = index(b)
    change(tree)
    write_index(b, tree)
    before = photograph(root)
    with Registry.open(root) as registry, pytest.raises((InvalidInput, Corrupt), match=words):
        registry.import_(b)
    assert photograph(root) == before


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b'{"format":1,"format":1}', b"\xff", b'{"format":NaN}'])
def test_a_table_of_contents_that_is_no_json_is_refused(root: Path, b: Path, data: bytes) -> None:
    (b / INDEX).write_bytes(data)
    refused(root, b, InvalidInput, "bundle.json cannot be read")


def test_a_lie_about_a_base_that_was_left_out_is_found(root: Path, exported: Path, tmp_path: Path) -> None:
    b = Path(shutil.copytree(exported / "small", tmp_path / "small"))
    tree = index(b)
    tree["versions"][0]["external"]["components"]["model"] = [[0, 1, 1], [0, 0, 1]]
    write_index(b, tree)
    refused(root, b, DigestMismatch, "walk/base@1, put together again")
    tree["versions"][0]["external"]["components"]["model"] = [[0, 5, 2]]
    write_index(b, tree)
    refused(root, b, InvalidManifest, "tensors that no component names")


def test_a_document_larger_than_any_is_not_read(root: Path, b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (b / INDEX).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: it has no bytes on the disk
    refused(root, b, InvalidInput, r"bundle.json has 1099511627776 bytes; a document has at most")
    monkeypatch.setattr(bundle, "MAX_MEMBERS", 3)
    refused(root, b, InvalidInput, "has over 3 files")
    monkeypatch.undo()
    monkeypatch.setattr(bundle, "MAX_BYTES", 1000)
    refused(root, b, InvalidInput, "has over 1000 bytes")


def test_a_bundle_that_changes_while_it_is_read_is_refused(b: Path) -> None:
    with bundle.open_bundle(b) as opened:
        (b / INDEX).write_bytes(b"other")
        with pytest.raises(InvalidInput, match="changed while it was read"):
            opened.document(INDEX)
        assert not opened.is_unchanged(INDEX)


# ------------------------------------------------------------ tar files


def retar(
    exported: Path, path: Path, change: Callable[[tarfile.TarInfo], tarfile.TarInfo | None], **extra: Any
) -> Path:
    """The sound bundle as another tar file, by Python's own library."""
    with tarfile.open(exported / "b.tar") as old, tarfile.open(path, "w", **extra) as new:
        for member in old.getmembers():
            data = old.extractfile(member)
            changed = change(member)
            new.addfile(changed, data if changed.isreg() else None)
    return path


def link(kind: bytes, target: str) -> Callable[[tarfile.TarInfo], tarfile.TarInfo]:
    def change(member: tarfile.TarInfo) -> tarfile.TarInfo:
        if member.name == INDEX:
            member.type, member.linkname, member.size = kind, target, 0
        return member

    return change


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "'bundle.json' is a symbolic link"),
        (tarfile.LNKTYPE, "'bundle.json' is a hard link"),
        (tarfile.CHRTYPE, "'bundle.json' is a device"),
        (tarfile.BLKTYPE, "'bundle.json' is a device"),
        (tarfile.FIFOTYPE, "'bundle.json' is a pipe"),
        (tarfile.DIRTYPE, "'bundle.json/' is a folder"),
        (tarfile.GNUTYPE_SPARSE, "'bundle.json' is a sparse file"),
        (b"7", "'bundle.json' has a header that no bundle has"),
    ],
)
def test_a_tar_member_that_is_no_plain_file_is_refused(
    root: Path, exported: Path, tmp_path: Path, kind: bytes, words: str
) -> None:
    made = retar(exported, tmp_path / "x.tar", link(kind, "/etc/passwd"), format=tarfile.USTAR_FORMAT)
    refused(root, made, InvalidInput, words)


@pytest.mark.parametrize("name", ["/etc/passwd", "../evil", "blobs/../../evil", "./bundle.json", "bundle.json/", "x"])
def test_a_tar_member_of_another_name_is_refused(root: Path, exported: Path, tmp_path: Path, name: str) -> None:
    data = (exported / "b.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(bundle_tar.tar_head(name, 0) + data)
    refused(root, tmp_path / "x.tar", InvalidInput, "does not belong into a bundle")
    assert not (tmp_path.parent / "evil").exists()


def test_two_members_of_one_name_are_refused(root: Path, exported: Path, tmp_path: Path) -> None:
    data = (exported / "b.tar").read_bytes()
    first = bundle_tar.read_tar_head(lambda begin, size: data[begin : begin + size], 0, "x")
    length = 512 * first.blocks + first.size + bundle_tar.padding(first.size)
    (tmp_path / "x.tar").write_bytes(data[:length] + data)
    refused(root, tmp_path / "x.tar", InvalidInput, "stands twice, or behind")


def test_another_spelling_of_the_same_tar_file_is_refused(root: Path, exported: Path, tmp_path: Path) -> None:
    def older(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = 1
        return member

    def extended(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.pax_headers = {"size": "5", "GNU.sparse.realsize": "99999999"}
        return member

    for change in (older, extended):
        made = retar(exported, tmp_path / "x.tar", change, format=tarfile.PAX_FORMAT)
        refused(root, made, InvalidInput, "has a header that no bundle has; export again, or unpack it")
    with tarfile.open(exported / "b.tar") as tar:
        for member in tar:
            path = tmp_path / "unpacked" / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            path.write_bytes(content.read())
    with Registry.open(root) as registry:
        assert len(registry.import_(tmp_path / "unpacked").versions) == 3


def test_a_compressed_tar_file_is_refused(root: Path, exported: Path, tmp_path: Path) -> None:
    made = retar(exported, tmp_path / "x.tar", lambda member: member)
    (tmp_path / "x.tgz").write_bytes(gzip.compress(made.read_bytes()))
    refused(root, tmp_path / "x.tgz", InvalidInput, "is no tar file of a bundle")


def test_a_size_that_is_not_there_is_refused(root: Path, exported: Path, tmp_path: Path) -> None:
    for size in (1 << 20, 8**11 - 1, 10**15):
        (tmp_path / "x.tar").write_bytes(bundle_tar.tar_head(INDEX, size) + bytes(2048))
        refused(root, tmp_path / "x.tar", Corrupt, "is truncated")
    records = b"30 size=" + b"9" * 21 + b"\n"
    head = bundle_tar._block(b"././@PaxHeader", len(records), b"x") + records.ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(head + bundle_tar._block(INDEX.encode(), 0, b"0") + bytes(1024))
    refused(root, tmp_path / "x.tar", InvalidInput, "has a header that no bundle has")


def test_a_truncated_tar_file_is_told(root: Path, exported: Path, tmp_path: Path) -> None:
    data = (exported / "b.tar").read_bytes()
    for length in (0, 100, 511, 512, 700, len(data) // 2, len(data) - 1025, len(data) - 1024, len(data) - 1):
        (tmp_path / "x.tar").write_bytes(data[:length])
        refused(root, tmp_path / "x.tar", Corrupt, "is truncated")


def test_what_is_hidden_in_a_tar_file_is_found(root: Path, exported: Path, tmp_path: Path) -> None:
    data = bytearray((exported / "b.tar").read_bytes())
    (tmp_path / "x.tar").write_bytes(data + bytes(512))
    refused(root, tmp_path / "x.tar", InvalidInput, "goes on behind its end")
    first = bundle_tar.read_tar_head(lambda begin, size: bytes(data[begin : begin + size]), 0, "x")
    assert bundle_tar.padding(first.size)
    data[512 * first.blocks + first.size] = 1
    (tmp_path / "x.tar").write_bytes(data)
    refused(root, tmp_path / "x.tar", InvalidInput, "bytes are hidden behind")


def test_every_changed_byte_of_a_tar_header_is_found(root: Path, exported: Path, tmp_path: Path) -> None:
    data = (exported / "b.tar").read_bytes()
    before = photograph(root)
    with Registry.open(root) as registry:
        for place in range(0, 512, 7):
            spoiled = bytearray(data)
            spoiled[place] ^= 1
            (tmp_path / "x.tar").write_bytes(spoiled)
            with pytest.raises((InvalidInput, Corrupt)):
                registry.import_(tmp_path / "x.tar")
    assert photograph(root) == before


# ------------------------------------------------------------ interruptions and disks


def test_an_import_that_was_cut_off_is_completed_by_the_same_again(
    root: Path, b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.operations import importing

    pushes: list[object] = []

    def stop_at_the_second(*arguments: Any) -> Any:
        pushes.append(arguments)
        if len(pushes) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    real = importing.push
    monkeypatch.setattr(importing, "push", stop_at_the_second)
    with Registry.open(root) as registry:
        with pytest.raises(KeyboardInterrupt):
            registry.import_(b)
        monkeypatch.undo()
        assert [one.reference for one in registry.find("kind = adapter")] == ["walk/perturb@1"]
        result = registry.import_(b)
        assert [one.created for one in result.versions] == [False, False, True]
        assert registry.get("walk/perturb@1").metadata == {"seed": 1}


def test_an_event_that_the_journal_has_otherwise_is_not_exported(exported: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(exported / "registry", tmp_path / "registry"))
    path = root / "journal" / "walk" / "base" / "1.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b" ")
    with Registry.open(root) as registry, pytest.raises(Corrupt, match="event 1 of walk/base is another one"):
        registry.export("walk/base", to=tmp_path / "x")
    path.unlink()  # not written yet: the catalog has it
    with Registry.open(root) as registry:
        registry.export("walk/base", to=tmp_path / "x")
    event = Path("events") / "walk" / "base" / "1.json"
    assert (tmp_path / "x" / event).read_bytes() == (exported / "b" / event).read_bytes()


def test_an_export_that_is_interrupted_leaves_nothing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.formats import bundle_writing

    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    for writer in (bundle_writing._FolderWriter, bundle_writing._TarWriter):
        monkeypatch.setattr(writer, "finish", interrupted)
    with Registry.open(exported / "registry") as registry:
        for form in ("x", "x.tar"):
            with pytest.raises(KeyboardInterrupt):
                registry.export("walk/perturb", to=tmp_path / form)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(exported: Path, mounted: Callable[[str], Path]) -> None:
    small = mounted("size=8k")
    with Registry.open(exported / "registry") as registry:
        for form in ("x", "x.tar"):
            with pytest.raises(NoSpace, match="no space to write"):
                registry.export("walk/perturb", to=small / form)
    assert list(small.iterdir()) == []
