"""The tar form of a bundle: POSIX.1-2001 (pax), of which one spelling alone is written and read. One set of members has
one sequence of bytes, and nothing that tar can do beside plain files has a way in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from registry.core.errors import InvalidInput
from registry.core.reference import shown

BLOCK = 512
END = bytes(2 * BLOCK)

_NAME_BYTES = 100
_LARGEST_OCTAL = 8**11 - 1
_MAX_RECORDS = 1024
_PAX_NAME = b"././@PaxHeader"
_OCTAL = re.compile(rb"[0-7]{11}\0")
_RECORD = re.compile(rb"([1-9][0-9]{0,3}) (path|size)=([^\n]+)\n")
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"S": "a sparse file",
}


@dataclass(frozen=True, slots=True)
class TarHead:
    """What the header of one member says.

    Attributes:
        blocks: how many blocks it has itself.
    """

    name: str
    size: int
    blocks: int


def tar_head(name: str, size: int) -> bytes:
    """The header of a member: mode 0644, no owner, no time. What is too long for it stands in a pax header before."""
    raw = name.encode("ascii")
    records = b""
    if len(raw) > _NAME_BYTES:
        records += _record(b"path", raw)
    if size > _LARGEST_OCTAL:
        records += _record(b"size", b"%d" % size)
    extended = b""
    if records:
        extended = _block(_PAX_NAME, len(records), b"x") + records + bytes(padding(len(records)))
    return extended + _block(raw[:_NAME_BYTES], size if size <= _LARGEST_OCTAL else 0, b"0")


def padding(size: int) -> int:
    """Bytes from the end of a member to the next block."""
    return -size % BLOCK


def read_tar_head(part: Callable[[int, int], bytes], at: int, what: str) -> TarHead:
    """Reads what `tar_head` wrote, and nothing else.

    Args:
        part: gives so many bytes from that byte of the file.
        at: where the header begins.
        what: names the file in errors.

    Raises:
        InvalidInput
    """
    block = raw = part(at, BLOCK)
    name, size = b"", None
    if block[156:157] == b"x":
        length = _octal(block)
        if length is None or length > _MAX_RECORDS:
            raise _refused(block, what)
        records = part(at + BLOCK, length)
        for match in _RECORD.finditer(records):
            if match[2] == b"path":
                name = match[3]
            elif match[3].isdigit() and len(match[3]) <= 16:
                size = int(match[3])
        raw = part(at, 2 * BLOCK + length + padding(length))
    last = raw[-BLOCK:]
    name = name or last[:_NAME_BYTES].rstrip(b"\0")
    size = _octal(last) if size is None else size
    if size is None or not name.isascii() or tar_head(name.decode("ascii"), size) != raw:
        raise _refused(last, what)
    return TarHead(name.decode("ascii"), size, len(raw) // BLOCK)


def _octal(block: bytes) -> int | None:
    field = block[124:136]
    return int(field[:11], 8) if _OCTAL.fullmatch(field) else None


def _refused(block: bytes, what: str) -> InvalidInput:
    name = shown(block[:_NAME_BYTES].rstrip(b"\0").decode("utf-8", "replace"), 120)
    if block[257:262] != b"ustar":
        return InvalidInput(f"{what} is no tar file of a bundle; 'registry export' makes one")
    kind = _KINDS.get(block[156:157])
    why = f"is {kind}" if kind else "has a header that no bundle has"
    return InvalidInput(f"{what}: '{name}' {why}; export again, or unpack it and import the folder")


def _record(key: bytes, value: bytes) -> bytes:
    """`length key=value`, where the length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest
    while rest + len(b"%d" % length) != length:
        length = rest + len(b"%d" % length)
    return b"%d %s=%s\n" % (length, key, value)


def _block(name: bytes, size: int, kind: bytes) -> bytes:
    fields = (
        (name, 100),
        (b"0000644\0", 8),
        (b"0000000\0", 8),
        (b"0000000\0", 8),
        (b"%011o\0" % size, 12),
        (b"00000000000\0", 12),
        (b" " * 8, 8),
        (kind, 1),
        (b"", 100),
        (b"ustar\0" + b"00", 8),
    )
    block = b"".join(value.ljust(width, b"\0") for value, width in fields).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]
