"""Pickles and archives put together byte by byte: nothing here pickles or runs a hostile object."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass

MARK, STOP, REDUCE, BUILD, NEWOBJ, NEWOBJ_EX, TUPLE = b"(", b".", b"R", b"b", b"\x81", b"\x92", b"t"


@dataclass(frozen=True)
class Code:
    """Instructions that leave one value on the stack."""

    raw: bytes


def value(thing: object) -> bytes:
    """Instructions for plain data with `Code` in it."""
    match thing:
        case Code(raw):
            return raw
        case None:
            return b"N"
        case bool():
            return b"\x88" if thing else b"\x89"
        case int():
            raw = thing.to_bytes(thing.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case float():
            return b"G" + struct.pack(">d", thing)
        case str():
            raw = thing.encode()
            return b"X" + len(raw).to_bytes(4, "little") + raw
        case bytes():
            return b"B" + len(thing).to_bytes(4, "little") + thing
        case tuple():
            return MARK + b"".join(map(value, thing)) + TUPLE
        case list():
            return b"](" + b"".join(map(value, thing)) + b"e"
        case dict():
            return b"}(" + b"".join(value(key) + value(item) for key, item in thing.items()) + b"u"
    raise TypeError(thing)


def pickle(thing: object) -> bytes:
    return b"\x80\x02" + value(thing) + STOP


def name(module: str, attribute: str) -> Code:
    return Code(f"c{module}\n{attribute}\n".encode())


def stack_name(module: str, attribute: str) -> Code:
    return Code(value(module) + value(attribute) + b"\x93")


def call(function: Code, *arguments: object) -> Code:
    return Code(value(function) + value(arguments) + REDUCE)


def new(cls: Code, *arguments: object) -> Code:
    return Code(value(cls) + value(arguments) + NEWOBJ)


def new_with_keywords(cls: Code, *arguments: object) -> Code:
    return Code(value(cls) + value(arguments) + b"}" + NEWOBJ_EX)


def inst(module: str, attribute: str, *arguments: object) -> Code:
    return Code(MARK + b"".join(map(value, arguments)) + f"i{module}\n{attribute}\n".encode())


def obj(cls: Code, *arguments: object) -> Code:
    return Code(MARK + value(cls) + b"".join(map(value, arguments)) + b"o")


def build(target: Code, state: object) -> Code:
    return Code(value(target) + value(state) + BUILD)


def persistent(thing: object) -> Code:
    return Code(value(thing) + b"Q")


def storage(count: object = 4, key: str = "0", cls: Code | None = None) -> Code:
    return persistent(("storage", cls or name("torch", "FloatStorage"), key, "cpu", count))


def old_storage(count: object = 4, key: object = "0", cls: Code | None = None, part: object = None) -> Code:
    """As in a file before 1.6."""
    return persistent(("storage", cls or name("torch", "FloatStorage"), key, "cpu", count, part))


def tensor(
    storage: object, offset: object, shape: object, stride: object, hooks: object = None, metadata: object = None
) -> Code:
    hooks = call(name("collections", "OrderedDict")) if hooks is None else hooks
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, stride, False, hooks, metadata)


def torch_zip(tree: object, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """A file like that of torch.save; `more` by names in which `__` stands for `/`."""
    records = {"data.pkl": pickle(tree), "byteorder": b"little", "version": b"3\n"}
    records |= {f"data/{key}": raw for key, raw in (storages or {"0": bytes(16)}).items()}
    records |= {key.replace("__", "/"): raw for key, raw in more.items()}
    return stored_zip({f"archive/{key}": raw for key, raw in records.items()})


def stored_zip(records: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for key, raw in records.items():
            archive.writestr(zipfile.ZipInfo(key), raw)
    return file.getvalue()


def raw_zip(entries: list[tuple[bytes, bytes, dict[str, int], dict[str, int]]]) -> bytes:
    """A zip whose headers say what they are told to: (name, content, changes of the local header, of the directory).

    Fields: `flags`, `method`, `crc`, `packed`, `size`, and `at` of the directory.
    """
    body, directory = b"", b""
    for name_, content, local, central in entries:
        plain = {"flags": 0, "method": 0, "crc": zlib.crc32(content), "packed": len(content), "size": len(content)}
        first, second = plain | local, plain | {"at": len(body)} | central
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\x01\x02", 20, 20, second["flags"], second["method"], 0, 0, second["crc"],
            second["packed"], second["size"], len(name_), 0, 0, 0, 0, 0, second["at"],
        ) + name_  # fmt: skip
        body += struct.pack(
            "<4s5H3I2H", b"PK\x03\x04", 20, first["flags"], first["method"], 0, 0, first["crc"], first["packed"],
            first["size"], len(name_), 0,
        ) + name_ + content  # fmt: skip
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    return body + directory + end


MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def legacy(tree: object, keys: object = ("0",), storages: bytes | None = None, system: object = None) -> bytes:
    """A file of torch.save before 1.6. `storages` are the bytes after the keys: four floats by default."""
    tail = (4).to_bytes(8, "little") + bytes(16) if storages is None else storages
    keys = list(keys) if isinstance(keys, tuple) else keys
    return b"".join(map(pickle, (MAGIC, 1001, SYSTEM if system is None else system, tree, keys))) + tail


def torch_tar(**members: bytes) -> bytes:
    """A file of torch.save before 0.2, in the format that it used."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key, raw in members.items():
            info = tarfile.TarInfo(key)
            info.size = len(raw)
            info.mtime = 1500000000.25  # as a file's: gives an extended header
            archive.addfile(info, io.BytesIO(raw))
    return file.getvalue()
