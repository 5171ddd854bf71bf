"""Two readers of one archive must see the same: whatever they could disagree about is refused."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from registry.core.errors import InvalidInput
from registry.formats.pickles import is_pickle, read_pickle_bytes
from tests.formats.pickles import assembler as asm

GOOD = asm.pickle([1])
EVIL = asm.pickle([2])
PLAIN: dict[str, int] = {}


def archive(*entries: tuple[bytes, bytes, dict[str, int], dict[str, int]]) -> bytes:
    return asm.raw_zip([(b"a/data.pkl", GOOD, PLAIN, PLAIN), *entries])


def changed(local: dict[str, int], central: dict[str, int], name: bytes = b"a/data.pkl") -> bytes:
    return asm.raw_zip([(name, GOOD, local, central), (b"a/version", b"3\n", PLAIN, PLAIN)])


def compressed() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a/data.pkl", asm.pickle("x" * 10_000_000))
    return file.getvalue()


def overlapping() -> bytes:
    inner = asm.raw_zip([(b"a/data.pkl", GOOD, PLAIN, PLAIN)])
    return asm.raw_zip([(b"a/version", inner, PLAIN, PLAIN), (b"a/data.pkl", GOOD, PLAIN, {"at": 39})])


REFUSED: dict[str, tuple[bytes, str]] = {
    "one name twice": (archive((b"a/data.pkl", EVIL, PLAIN, PLAIN)), "found two"),
    "a compressed record": (compressed(), "compressed"),
    "compressed only as the directory says": (changed(PLAIN, {"method": 8}), "compressed"),
    "compressed only as its header says": (changed({"method": 8}, PLAIN), "another header"),
    "an encrypted record": (changed({"flags": 1}, {"flags": 1}), "encrypted"),
    "encrypted only as its header says": (changed({"flags": 1}, PLAIN), "another header"),
    "a masked header": (changed({"flags": 0x2000}, {"flags": 0x2000}), "encrypted"),
    "another size in its header": (changed({"size": 3, "packed": 3}, PLAIN), "another header"),
    "another sum in its header": (changed({"crc": 3}, PLAIN), "another header"),
    "no size in its header": (changed({"size": 0, "packed": 0}, PLAIN), "another header"),
    "sizes that differ": (changed(PLAIN, {"size": 3}), "stored"),
    "a size beyond the file": (changed(PLAIN, {"size": 10**6, "packed": 10**6}), "another place or length"),
    "a size of 4 GB without zip64": (changed(PLAIN, {"size": 2**32 - 1, "packed": 2**32 - 1}), "zip64 field"),
    "a place beyond the file": (changed(PLAIN, {"at": 10**6}), "before the directory"),
    "a place that is no header": (changed(PLAIN, {"at": 1}), "another place or length"),
    "records that overlap": (overlapping(), "another|overlap"),
    "another name in its header": (
        asm.raw_zip([(b"a/data.pkl", GOOD, PLAIN, PLAIN)]).replace(b"a/data.pkl", b"a/evil.pkl", 1),
        "another header",
    ),
    "a name that climbs": (archive((b"a/../b", b"", PLAIN, PLAIN)), "within one folder"),
    "a name that climbs at its end": (archive((b"a/..", b"", PLAIN, PLAIN)), "within one folder"),
    "an absolute name": (archive((b"/etc/passwd", b"", PLAIN, PLAIN)), "within one folder"),
    "a name with a drive": (archive((b"C:x", b"", PLAIN, PLAIN)), "within one folder"),
    "a name with a backslash": (archive((b"a\\..\\b", b"", PLAIN, PLAIN)), "within one folder"),
    "a name with a NUL": (archive((b"a/data.pkl\0", b"", PLAIN, PLAIN)), "within one folder"),
    "an empty name": (archive((b"", b"", PLAIN, PLAIN)), "within one folder"),
    "a folder": (archive((b"a/data/", b"", PLAIN, PLAIN)), "within one folder"),
    "a name in no encoding": (archive((b"a/\xff", b"", {"flags": 0x800}, {"flags": 0x800})), "UTF-8"),
    "a name in another encoding": (archive((b"a/\xff", b"", PLAIN, PLAIN)), "UTF-8"),
    "two folders": (archive((b"b/data.pkl", EVIL, PLAIN, PLAIN)), "one folder"),
    "no data.pkl": (asm.stored_zip({"a/weights.npy": b""}), "1 other records"),
    "no folder": (asm.stored_zip({"data.pkl": GOOD}), "one folder"),
    "bytes after its end": (archive() + b"\0", "other bytes at its end"),
    "a comment": (archive()[:-2] + b"\1\0x", "other bytes at its end"),
    "bytes before its start": (b"PK\x03\x04" + archive(), "the directory before"),
    "a cut end": (archive()[:-30], "truncated"),
    "only a start": (b"PK\x03\x04", "truncated"),
    "no records": (asm.raw_zip([]), "empty zip"),
    "a program": (asm.stored_zip({"a/data.pkl": GOOD, "a/constants.pkl": GOOD, "a/version": b"3"}), "TorchScript"),
    "a program's code": (asm.stored_zip({"a/data.pkl": GOOD, "a/code/__torch__.py": b"import os"}), "TorchScript"),
    "big-endian storages": (asm.stored_zip({"a/data.pkl": GOOD, "a/byteorder": b"big"}), "byte order 'big'"),
    "another byte order": (asm.stored_zip({"a/data.pkl": GOOD, "a/byteorder": b"x" * 99}), "byte order"),
    "a pickle that goes on": (asm.stored_zip({"a/data.pkl": GOOD + EVIL}), "bytes more"),
    "an empty pickle": (asm.stored_zip({"a/data.pkl": b""}), "found 0 before the end"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_ambiguous_or_foreign_zip_is_refused(case: str) -> None:
    raw, message = REFUSED[case]
    with pytest.raises(InvalidInput, match=message) as refused:
        read_pickle_bytes(raw, what="archive.pt")
    assert "\n" not in str(refused.value)


def test_the_same_zips_without_their_fault_read() -> None:
    assert read_pickle_bytes(archive(), what="good").tree == [1]
    assert read_pickle_bytes(changed(PLAIN, PLAIN), what="good").tree == [1]
    late = {"flags": 8, "size": 0, "packed": 0, "crc": 0}  # sizes follow, as torch writes it
    assert read_pickle_bytes(changed(late, {"flags": 8}), what="good").tree == [1]


def test_every_cut_of_a_torch_file_is_refused() -> None:
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save({"a": torch.ones(3), "b": [1, "x"]}, buffer, _use_new_zipfile_serialization=new)
        raw = buffer.getvalue()
        for length in range(len(raw)):
            with pytest.raises(InvalidInput):
                read_pickle_bytes(raw[:length], what="cut")


def test_a_torchscript_archive_of_torch_itself_is_refused() -> None:
    records = {"m/data.pkl": GOOD, "m/code/__torch__/torch/nn.py": b"", "m/constants.pkl": GOOD}
    with pytest.raises(InvalidInput, match="TorchScript archive, which is a program"):
        read_pickle_bytes(asm.stored_zip(records), what="script.pt")


def tar_with(change: str) -> bytes:
    file = io.BytesIO()
    format = tarfile.GNU_FORMAT if change == "a long name" else tarfile.PAX_FORMAT
    with tarfile.open(fileobj=file, mode="w", format=format) as made:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(asm.pickle(0))
            made.addfile(info, io.BytesIO(asm.pickle(0)))
        info = tarfile.TarInfo("more")
        if change == "a link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        elif change == "a device":
            info.type = tarfile.CHRTYPE
        elif change == "one name twice":
            info.name = "./pickle"
        elif change in ("a long name", "a name in an extended header"):
            info.name = "x" * 300
        elif change == "a size in an extended header":
            info.pax_headers = {"size": "5"}
        made.addfile(info)
    raw = bytearray(file.getvalue())
    if change == "a wrong sum":
        raw[0] ^= 1
    elif change == "a size beyond the file":
        raw[124:136] = b"77777777777\0"
        raw[148:156] = f"{sum(raw[:148]) + 256 + sum(raw[156:512]):06o}\0 ".encode()
    elif change == "a size that is no number":
        raw[124:136] = b"0000000x000\0"
        raw[148:156] = f"{sum(raw[:148]) + 256 + sum(raw[156:512]):06o}\0 ".encode()
    elif change == "a cut end":
        raw = raw[: 512 * 7]
    return bytes(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a link", "another kind"),
        ("a device", "another kind"),
        ("one name twice", "found two"),
        ("a long name", "another kind"),
        ("a name in an extended header", "extended header"),
        ("a size in an extended header", "extended header"),
        ("a wrong sum", "another sum"),
        ("a size beyond the file", "end of the file"),
        ("a size that is no number", "octal"),
        ("a cut end", "empty block"),
    ],
)
def test_a_tar_of_anything_but_plain_files_is_refused(change: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_pickle_bytes(tar_with(change), what="old.pt")


def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    others = {
        path.read_bytes(): "looks like safetensors; rename it",
        b"": "an empty file",
        b"version https://git-lfs.github.com/spec/v1\noid": "Git LFS pointer",
        b"<!doctype html>": "a web page",
        b"\x1f\x8b\x08\x00": "gzip",
        b"\x89HDF\r\n": "HDF5",
        b"\x93NUMPY\x01": "numpy array",
        b"GGUF\x03": "GGUF",
        b"hello": "another kind of file",
        b"\xff\xfe": "unknown instruction 0xff",
        b"N.N.": "2 bytes more",
        b"\x80\x06N.": "protocol 6",
    }
    for raw, message in others.items():
        with pytest.raises(InvalidInput, match=message):
            read_pickle_bytes(raw, what="weights.pth")


def test_what_is_a_pickle_shows_in_its_first_bytes() -> None:
    yes = [GOOD, b"\x80\x04\x95", b"(dp0\n", b"(lp0\n", b"}q\x00", b"]q\x00", b"ccollections\nOrderedDict\n", archive()]
    no = [b"", b"\x80", b"\x80\x09", b"{}", b"hello", b"\x93NUMPY", b"\x10\0\0\0\0\0\0\0{", b"PK", b"<html>", b"code\n"]
    assert [is_pickle(head) for head in yes] == [True] * len(yes)
    assert [is_pickle(head) for head in no] == [False] * len(no)
