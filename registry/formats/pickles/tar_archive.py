"""The members of a tar file, as torch before 0.2 wrote it. Nothing is extracted; only regular files count.

Source: POSIX.1-2001, pax and ustar interchange formats."""

from __future__ import annotations

from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.formats.pickles.limits import Budget
from registry.formats.pickles.sources import Source

BLOCK = 512
_REGULAR = b"0\0"
_EXTENDED = b"x"
_MAX_EXTENDED = 64 << 10
_MEND = "it is no tar of torch.save, or damaged: copy or download it again"


def is_tar(head: bytes) -> bool:
    """Whether the first 512 bytes are those of a tar."""
    return head[257:262] == b"ustar"


def read_members(source: Source, budget: Budget) -> dict[str, tuple[int, int]]:
    """(begin, end) of each member in the file, by name.

    Raises:
        InvalidInput: it is truncated, has anything but regular files, or one name twice.
    """
    members: dict[str, tuple[int, int]] = {}
    at = 0
    while at + BLOCK <= source.size:
        block = source.read(at, BLOCK)
        if not block.strip(b"\0"):
            return members
        budget.spend_records(1)
        _check_sum(source, block, at)
        size = _number(source, block[124:136], at)
        begin, kind = at + BLOCK, block[156:157]
        if begin + size > source.size:
            raise _invalid(source, f"a member of {size} bytes at byte {at}", "the end of the file")
        name = (block[:100].split(b"\0")[0]).decode("latin-1").removeprefix("./")
        if kind == _EXTENDED:
            _check_extended(source, source.read(begin, min(size, _MAX_EXTENDED + 1)), at)
        elif kind not in (_REGULAR[:1], _REGULAR[1:]) or block[345:346] != b"\0":
            raise _invalid(source, f"regular files with short names at byte {at}", f"'{shown(name)}' of another kind")
        elif name in members:
            raise _invalid(source, f"one member '{shown(name)}'", "two")
        else:
            members[name] = (begin, begin + size)
        at = begin + -(-size // BLOCK) * BLOCK
    raise _invalid(source, "an empty block after the last member", "the end of the file")


def _check_sum(source: Source, block: bytes, at: int) -> None:
    expected = sum(block) - sum(block[148:156]) + 8 * 32
    if _number(source, block[148:156], at) != expected:
        raise _invalid(source, f"a header with the sum {expected} at byte {at}", "another sum")


def _number(source: Source, field: bytes, at: int) -> int:
    if field[:1] == b"\x80":  # too large for octal digits
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if not digits or digits.strip(b"01234567"):
        raise _invalid(source, f"octal digits in the header at byte {at}", "other bytes")
    return int(digits, 8)


def _check_extended(source: Source, records: bytes, at: int) -> None:
    """An extended header may say when a member was written; not what it is called, or how long it is."""
    place = 0
    while place < len(records):
        length, _, rest = records[place : place + 16].partition(b" ")
        if not length.isdigit() or not rest or len(length) > 6 or not 0 < int(length) <= len(records) - place:
            raise _invalid(source, f"an extended header at byte {at}", "other bytes")
        key = records[place + len(length) + 1 : place + int(length)].partition(b"=")[0]
        if key not in (b"mtime", b"atime", b"ctime", b"uname", b"gname", b"uid", b"gid"):
            raise _invalid(source, f"times in the extended header at byte {at}", f"'{shown(key.decode('latin-1'))}'")
        place += int(length)


def _invalid(source: Source, expected: str, found: str) -> InvalidInput:
    return InvalidInput(f"{source.what}: expected {expected}, found {found}; {_MEND}")
