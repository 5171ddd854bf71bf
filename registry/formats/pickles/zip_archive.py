"""The records of a zip file, as torch.save writes it: stored, never compressed. Two readers of one zip can see
different files in it, so whatever they could disagree about is refused.

Source: PKWARE's APPNOTE.TXT 6.3.9, sections 4.3 and 4.5.3."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.formats.pickles.limits import Budget
from registry.formats.pickles.sources import Source

MAGIC = b"PK\x03\x04"
END_MAGIC = b"PK\x05\x06"

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 0x1, 0x8, 0x800
_MAX_DIRECTORY = 256 << 20
_NOT_A_NAME = re.compile(r"[\x00-\x1f\x7f\\:]|(?:^|/)(?:\.{0,2})(?:/|$)")

_TRUNCATED = "the file is truncated or something was added to it: copy or download it again"
_REPACKED = "it was not written by torch.save, or damaged since: save it again"


@dataclass(frozen=True, slots=True)
class Record:
    """One stored file of the archive.

    Attributes:
        name: with its folders.
        begin: the first byte of its content in the file.
        size: bytes of its content.
    """

    name: str
    begin: int
    size: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the directory says of a record."""

    name: bytes
    flags: int
    crc: int
    size: int
    at: int


def read_records(source: Source, budget: Budget) -> dict[str, Record]:
    """All records of a zip file, by name.

    Raises:
        InvalidInput: it is truncated, compressed, encrypted or ambiguous.
    """
    count, begin, end = _directory(source)
    if end - begin > _MAX_DIRECTORY or count * _CENTRAL.size > end - begin:
        raise _invalid(source, f"a directory of {count} records", f"{end - begin} bytes", _REPACKED)
    budget.spend_records(count)
    directory = source.read(begin, end - begin)
    entries, at = [], 0
    for _ in range(count):
        entry, at = _entry(source, directory, at)
        entries.append(entry)
    if at != len(directory):
        raise _invalid(source, f"{count} records in the directory", "more", _REPACKED)
    records: dict[str, Record] = {}
    free = 0
    for entry in sorted(entries, key=lambda entry: entry.at):
        record = _record(source, entry, begin)
        if entry.at < free:
            raise _invalid(source, f"record '{shown(record.name)}' by itself", "two that overlap", _REPACKED)
        if record.name in records:
            raise _invalid(source, f"one record '{shown(record.name)}'", "two", _REPACKED)
        records[record.name] = record
        free = record.begin + record.size
    return records


def _directory(source: Source) -> tuple[int, int, int]:
    """Number of records, begin and end of the directory."""
    at = source.size - _END.size
    if at < 0:
        raise _invalid(source, "a zip file", f"{source.size} bytes", _TRUNCATED)
    magic, disk, first_disk, here, count, size, begin, comment = _END.unpack(source.read(at, _END.size))
    if magic != END_MAGIC or comment:
        raise _invalid(source, "a zip file that ends with its directory", "other bytes at its end", _TRUNCATED)
    if disk or first_disk or here != count:
        raise _invalid(source, "a zip file of one part", "several", _REPACKED)
    end = at
    at -= _LOCATOR.size
    if at >= 0 and (raw := source.read(at, _LOCATOR.size)).startswith(b"PK\x06\x07"):
        _, disk64, at64, disks = _LOCATOR.unpack(raw)
        end = at - _END64.size
        if disk64 or disks > 1 or at64 != end or end < 0:
            raise _invalid(source, "the zip64 directory before its locator", "another place", _REPACKED)
        magic64, length, _, _, disk64, first64, here64, count64, size64, begin64 = _END64.unpack(
            source.read(end, _END64.size)
        )
        if magic64 != b"PK\x06\x06" or length != _END64.size - 12 or disk64 or first64 or here64 != count64:
            raise _invalid(source, "a zip64 directory", "other bytes", _REPACKED)
        if count not in (count64, _FULL16) or size not in (size64, _FULL32) or begin not in (begin64, _FULL32):
            raise _invalid(source, "one directory", "two that differ (zip and zip64)", _REPACKED)
        count, size, begin = count64, size64, begin64
    if begin + size != end:
        raise _invalid(source, f"the directory before byte {end}", f"{size} bytes at {begin}", _TRUNCATED)
    return count, begin, end


def _entry(source: Source, directory: bytes, at: int) -> tuple[_Entry, int]:
    if at + _CENTRAL.size > len(directory):
        raise _invalid(source, "a record in the directory", "its end", _REPACKED)
    fields = _CENTRAL.unpack_from(directory, at)
    magic, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length, disk = fields[:14]
    offset = fields[16]
    at += _CENTRAL.size
    name = directory[at : at + name_length]
    extra = directory[at + name_length : at + name_length + extra_length]
    at += name_length + extra_length + comment_length
    if magic != b"PK\x01\x02" or at > len(directory) or disk not in (0, _FULL16):
        raise _invalid(source, "a record in the directory", "other bytes", _REPACKED)
    what = shown(name.decode("latin-1"))
    if flags & _ENCRYPTED or flags & ~(_SIZES_FOLLOW | _UTF8):
        raise _invalid(source, f"record '{what}' in plain", f"an encrypted one (flags {flags:#x})", _REPACKED)
    if method:
        raise _invalid(source, f"record '{what}' stored", f"a compressed one (method {method})", _REPACKED)
    size, packed, offset = _wide(source, what, extra, [size, packed, offset])
    if size != packed:
        raise _invalid(source, f"record '{what}' of {size} bytes", f"{packed} bytes stored", _REPACKED)
    return _Entry(name, flags, crc, size, offset), at


def _wide(source: Source, what: str, extra: bytes, values: list[int]) -> list[int]:
    """The values, and those that do not fit into 32 bits from the zip64 field."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
            break
        at += 4 + length
    found = []
    for value in values:
        if value == _FULL32 and len(wide) >= 8:
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        elif value == _FULL32:
            raise _invalid(source, f"the zip64 field of record '{what}'", "none", _REPACKED)
        found.append(value)
    return found


def _record(source: Source, entry: _Entry, directory: int) -> Record:
    what = shown(entry.name.decode("latin-1"))
    try:
        name = entry.name.decode("utf-8" if entry.flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        raise _invalid(source, "record names in UTF-8", f"'{what}'", _REPACKED) from None
    if _NOT_A_NAME.search(name):
        raise _invalid(source, "record names within one folder", f"'{what}'", _REPACKED)
    if entry.at + _LOCAL.size > directory:
        raise _invalid(source, f"record '{what}' before the directory", f"byte {entry.at}", _REPACKED)
    magic, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(
        source.read(entry.at, _LOCAL.size)
    )
    begin = entry.at + _LOCAL.size + name_length + extra_length
    if magic != MAGIC or begin + entry.size > directory:
        raise _invalid(source, f"record '{what}' of {entry.size} bytes", "another place or length", _REPACKED)
    rest = source.read(entry.at + _LOCAL.size, name_length + extra_length)
    if size == _FULL32 or packed == _FULL32:
        size, packed = _wide(source, what, rest[name_length:], [size, packed])
    sizes_follow = bool(flags & _SIZES_FOLLOW)
    same_size = (size, packed) == (entry.size, entry.size) or (sizes_follow and (size, packed) == (0, 0))
    same_sum = crc == entry.crc or (sizes_follow and crc == 0)
    if (rest[:name_length], flags, method) != (entry.name, entry.flags, 0) or not same_size or not same_sum:
        raise _invalid(source, f"record '{what}' as the directory has it", "another header before it", _REPACKED)
    return Record(name, begin, entry.size)


def _invalid(source: Source, expected: str, found: str, mend: str) -> InvalidInput:
    return InvalidInput(f"{source.what}: expected {expected}, found {found}; {mend}")
