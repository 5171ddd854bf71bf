"""What stands behind an instruction in the stream: lengths, numbers and texts, in the ways of six protocols."""

from __future__ import annotations

import re
import struct

from registry.formats.pickles.context import Context, parse_integer
from registry.formats.pickles.sources import Stream

_ESCAPE = re.compile(rb"\\(?:x([0-9A-Fa-f]{2})|([\\'\"abfnrtv])|([0-7]{1,3})|(.?))", re.DOTALL)
_ESCAPED = dict(zip(b"\\'\"abfnrtv", b"\\'\"\a\b\f\n\r\t\v", strict=True))
_SURROGATE = re.compile("[\ud800-\udfff]")


class Operands:
    """Reads the operands of one pickle; each method raises `InvalidInput` where they are none, or over the limits."""

    def __init__(self, stream: Stream, context: Context) -> None:
        self._stream = stream
        self._context = context
        self._limits = context.budget.limits

    def count(self, size: int) -> int:
        """An unsigned number of so many bytes."""
        return int.from_bytes(self._stream.read(size), "little")

    def line(self, limit: int) -> str:
        """A line of ASCII."""
        raw = self._stream.line(limit)
        try:
            return raw.decode("ascii")
        except UnicodeDecodeError:
            raise self._context.invalid("a line of ASCII", "another byte") from None

    def name(self) -> str:
        """A line of UTF-8: module or name of a global."""
        return self._decoded(self._stream.line(self._limits.name_bytes), "utf-8")

    def _decoded(self, raw: bytes, encoding: str) -> str:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            raise self._context.invalid(f"text in {encoding}", "other bytes") from None
        if encoding != "utf-8" and _SURROGATE.search(text):
            raise self._context.invalid("text", "a lone surrogate")
        return text

    def data(self, size: int) -> bytes:
        """Bytes, after their length in so many bytes."""
        return self._stream.read(self.count(size))

    def text(self, size: int) -> str:
        """Text, after its length in so many bytes."""
        length = self.count(size)
        if length > self._limits.text_bytes:
            raise self._context.budget.over(self._limits.text_bytes, "bytes in one text")
        return self._decoded(self._stream.read(length), "utf-8")

    def raw_unicode_line(self) -> str:
        """Text of protocol 0."""
        return self._decoded(self._stream.line(self._limits.text_bytes), "raw-unicode-escape")

    def old_text(self, size: int) -> str | bytes:
        """A `str` of Python 2, after its length."""
        return _old(self.data(size))

    def quoted_line(self) -> str | bytes:
        """A `str` of Python 2 as its repr."""
        raw = self._stream.line(self._limits.text_bytes)
        if len(raw) < 2 or raw[:1] not in (b"'", b'"') or raw[-1:] != raw[:1]:
            raise self._context.invalid("a text in quotes", "none")
        return _old(_ESCAPE.sub(self._unescaped, raw[1:-1]))

    def _unescaped(self, match: re.Match[bytes]) -> bytes:
        hexadecimal, letter, octal, _ = match.groups()
        if hexadecimal:
            return bytes([int(hexadecimal, 16)])
        if letter:
            return bytes([_ESCAPED[letter[0]]])
        if octal:
            return bytes([int(octal, 8) & 0xFF])
        raise self._context.invalid("a text in quotes", "an unknown escape")

    def int4(self) -> int:
        """A signed number of four bytes."""
        return int.from_bytes(self._stream.read(4), "little", signed=True)

    def long(self, size: int) -> int:
        """A signed number, after its length in so many bytes."""
        length = self.count(size)
        if length > self._limits.integer_bytes:
            raise self._context.budget.over(self._limits.integer_bytes, "bytes in one integer")
        return int.from_bytes(self._stream.read(length), "little", signed=True)

    def int_line(self) -> int:
        """A decimal number; `00` and `01` are False and True."""
        text = self.line(4096)
        return {"00": False, "01": True}[text] if text in ("00", "01") else self._decimal(text)

    def long_line(self) -> int:
        """A decimal number with an L behind it."""
        return self._decimal(self.line(4096).removesuffix("L"))

    def _decimal(self, text: str) -> int:
        number = parse_integer(text, self._limits.integer_bytes)
        if number is None:
            raise self._context.invalid("a decimal integer", f"a line of {len(text)} characters that is none")
        return number

    def index_line(self) -> int:
        """A decimal index of the memo."""
        text = self.line(32)
        number = parse_integer(text, 8)
        if number is None or not 0 <= number < 2**63:
            raise self._context.invalid("an index of the memo", f"'{text}'" if text.isprintable() else "none")
        return number

    def float8(self) -> float:
        """A float of eight bytes, big-endian."""
        number = struct.unpack(">d", self._stream.read(8))[0]
        assert isinstance(number, float)
        return number

    def float_line(self) -> float:
        """A decimal float."""
        text = self.line(400)
        try:
            return float(text)
        except ValueError:
            raise self._context.invalid("a number", f"a line of {len(text)} characters that is none") from None


def _old(raw: bytes) -> str | bytes:
    # Text or bytes, nobody knows. torch.load takes it for UTF-8, numpy for bytes.
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw
