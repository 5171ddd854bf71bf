"""Reading and writing the header of a safetensors file: bytes in, values out. It exists so that
metadata needs no torch; tensor data goes through `safetensors` itself and never through here.

What is accepted here is accepted by the Rust library (0.8), with the same names, dtypes, shapes and
offsets; `STRICTER_THAN_RUST` lists all that is refused beyond it. Source: the format description in
the README of huggingface/safetensors, and its `tensor.rs` for what that leaves open."""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, BinaryIO

from registry.core.canonical_json import MAX_INTEGER
from registry.core.errors import MalformedTensors
from registry.core.layout import DTYPE_BITS, NOT_IN_A_NAME, Layout, TensorSpec

MAX_HEADER_BYTES = 100_000_000
"""The Rust library's limit for N, the length of the JSON."""

STRICTER_THAN_RUST: dict[str, str] = {
    "start": "whitespace before `{`: the format says that the header begins with `{`",
    "tensor twice": "one name twice: Rust keeps the last, another reader the first",
    "metadata key twice": "the same, within `__metadata__`",
    "unknown field": "a field beside dtype, shape and data_offsets, also twice: Rust drops it, we would lose it",
    "null metadata": "`__metadata__` of null: it must be an object",
    "entry as a list": '`["F32", [1], [0, 4]]` for a tensor: an accident of serde',
    "dtype as an object": '`{"F32": null}` for a dtype: an accident of serde',
    "control character": "C0, DEL or C1 in a tensor's name: it goes to terminals, and PostgreSQL holds no NUL",
    "NUL in metadata": "NUL in a key or value of `__metadata__`: PostgreSQL holds none",
    "dimension": "a size over `MAX_INTEGER`, possible beside a 0: canonical JSON holds none",
}
"""All differences to Rust, by a short name: Rust accepts these, we refuse them. Never the reverse."""

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_USIZE = 2**64 - 1

# Possessive, and an unterminated string runs to the end: one pass over any input, however hostile.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NESTED = re.compile(r"\{[^{}]*\{|\[[^][{}]*[\[{]")
_NOT_TEXT = re.compile(r"[\0\ud800-\udfff]")

_AGAIN = "the file is damaged: download it, or save it with safetensors again"
_TRUNCATED = "the file is truncated: download or save it again"
_RENAME = "rename it and save the file again"
_NOT_SAFETENSORS = {
    b"version ": "it looks like a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"PK\x03\x04": "it looks like a file of torch.save: rename it to .pth, in a folder to .bin",
    b"\x80\x02": "it looks like a pickle: save it with safetensors",
    b"<": "it looks like a web page: download the file itself",
}

_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 80
_shown = _shortener.repr  # the two ends of what is long, and nothing that a terminal obeys


@dataclass(frozen=True)
class Header:
    """What the header of one file says.

    Attributes:
        layout: the tensors in the order of their data; zero-length tensors stand before the tensor
            that begins at the same byte, and among themselves in the header's order (Rust's is random).
        offsets: (begin, end) of each tensor in layout order, in bytes from the start of the data.
        metadata: `__metadata__`, empty where the file has none.
        size: 8 + N, the bytes before the data.
    """

    layout: Layout
    offsets: tuple[tuple[int, int], ...]
    metadata: dict[str, str] = field(hash=False)
    size: int

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.size + (self.offsets[-1][1] if self.offsets else 0)


@dataclass(frozen=True, slots=True)
class _KeyTwice:
    """Stands for a JSON object that names `key` more than once."""

    key: str


@dataclass(frozen=True, slots=True)
class _Literal:
    """Stands for a JSON number that is no u64 (`-0`, `1.0`, `NaN`, 30 digits), as it was written."""

    text: str

    def __repr__(self) -> str:
        return self.text


def header_length(first8: bytes, *, file_size: int, what: str) -> int:
    """Length of a file's header, known to be within the limits before anybody allocates it.

    Args:
        first8: the file's first 8 bytes, fewer where it has fewer.
        file_size: bytes of the whole file.
        what: names the file in errors.

    Returns:
        8 + N, the bytes before the data.

    Raises:
        MalformedTensors: the file is empty, too small, truncated, or of another format.
    """
    if (found := min(file_size, len(first8))) < 8:
        raise _malformed(what, "a file of at least 8 bytes", f"{found} bytes" if found else "an empty one", _TRUNCATED)
    length = int.from_bytes(first8[:8], "little")
    if length > MAX_HEADER_BYTES:
        mend = next((hint for magic, hint in _NOT_SAFETENSORS.items() if first8.startswith(magic)), _AGAIN)
        raise _malformed(what, f"a header of at most {MAX_HEADER_BYTES} bytes", str(length), mend)
    if 8 + length > file_size:
        raise _malformed(what, f"a header of 8 + {length} bytes", f"{file_size} bytes in all", _TRUNCATED)
    return 8 + length


def parse_header(raw: bytes, *, file_size: int, what: str) -> Header:
    """Reads a header and checks it against itself and the length of the file.

    Args:
        raw: the first 8 + N bytes of the file, exactly.
        file_size: bytes of the whole file.
        what: names the file in errors.

    Raises:
        MalformedTensors: a rule of the format is broken; the message is one line and names the
            tensor, what was expected, what was found, and the mend.
    """
    size = header_length(raw[:8], file_size=file_size, what=what)
    if len(raw) != size:
        raise _malformed(what, f"{size} bytes of header", str(len(raw)), _TRUNCATED)
    document = _document(raw[8:], what)
    metadata = _metadata(document.pop(_METADATA, {}), what)
    placed = sorted((_placed(name, entry, what) for name, entry in document.items()), key=itemgetter(0))
    _check_order(placed, what)
    header = Header(Layout(tuple(spec for _, spec in placed)), tuple(at for at, _ in placed), metadata, size)
    if file_size != header.file_size:
        mend = _TRUNCATED if file_size < header.file_size else f"bytes follow the last tensor, {_AGAIN}"
        raise _malformed(what, f"{header.file_size} bytes", str(file_size), mend)
    return header


def read_header(file: BinaryIO, *, file_size: int, what: str) -> tuple[Header, bytes]:
    """Reads the header of a buffered file that stands at its first byte, and leaves it at the data.

    Returns:
        The header, and the bytes that it was read from.

    Raises:
        MalformedTensors: as `parse_header`.
    """
    first8 = file.read(8)
    raw = first8 + file.read(header_length(first8, file_size=file_size, what=what) - 8)
    return parse_header(raw, file_size=file_size, what=what), raw


def build_header(layout: Layout, metadata: Mapping[str, str] | None = None) -> bytes:
    """Header of a file that holds the given tensors one after the other.

    Compact JSON: `__metadata__` first, with sorted keys, then the tensors in layout order, padded with
    spaces so that the data begins at a multiple of 8. `parse_header` reads all that comes from here,
    and so does `safetensors`.

    Args:
        layout: the tensors in the order of their data.
        metadata: for `__metadata__`, which is left out where it would be empty.

    Returns:
        The 8 + N bytes before the data.

    Raises:
        MalformedTensors: safetensors cannot hold such a file.
    """
    what = "header to be written"
    document: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    taken, end = {_METADATA}, 0
    for spec in layout:
        if spec.name in taken:
            raise _malformed(what, "a name of its own", "one that is taken", _RENAME, place=("tensor", spec.name))
        taken.add(spec.name)
        begin, end = end, end + (spec.nbytes if spec.dtype in DTYPE_BITS else 0)
        document[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (begin, end)}
    # A lone surrogate becomes its JSON escape: the parser refuses it, and all else, and names the place.
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    parse_header(raw, file_size=len(raw) + max(end, 0), what=what)
    return raw


def _document(raw: bytes, what: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise _malformed(what, "a header that begins with `{`", _shown(raw[:1]))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed(what, "a header in UTF-8", f"another byte at its offset {error.start}") from None
    # The interpreter's stack is no guard: under a raised recursion limit json.loads dies of a deep header.
    if _NESTED.search(_STRING.sub("", text), 1):
        raise _malformed(what, "a header of dtype, shape and data_offsets for each tensor", "deeper JSON")
    try:
        document: dict[str, Any] | _KeyTwice = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_Literal, parse_constant=_Literal
        )
    except json.JSONDecodeError as error:
        raise _malformed(what, "a header in JSON", f"{error.msg!r} at its character {error.pos}") from None
    if isinstance(document, _KeyTwice):
        raise _malformed(what, "one of that name", "two", place=("entry", document.key))
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _KeyTwice:
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else _KeyTwice(Counter(k for k, _ in pairs).most_common(1)[0][0])


def _integer(text: str) -> int | _Literal:
    return int(text) if text.isdigit() and len(text) <= 20 else _Literal(text)


def _metadata(value: Any, what: str) -> dict[str, str]:
    if isinstance(value, _KeyTwice):
        raise _malformed(what, "one value", "two", place=(_METADATA, value.key))
    if not isinstance(value, dict):
        raise _malformed(what, "an object of strings", _shown(value), place=(_METADATA,))
    for key, text in value.items():
        if not isinstance(text, str):
            raise _malformed(what, "a string", _shown(text), place=(_METADATA, key))
        if _NOT_TEXT.search(key) or _NOT_TEXT.search(text):
            raise _malformed(what, "plain text", "NUL or a lone surrogate", place=(_METADATA, key))
    return value


def _placed(name: str, entry: Any, what: str) -> tuple[tuple[int, int], TensorSpec]:
    """The tensor's (begin, end) and what it is; all that can be checked of one entry alone is checked."""
    refuse = partial(_malformed, what, place=("tensor", name))
    if not name.isprintable() and NOT_IN_A_NAME.search(name):  # the first is fast, and suffices for most
        raise refuse("a name of plain text", "a control character or a lone surrogate", _RENAME)
    if isinstance(entry, _KeyTwice):
        raise refuse(f"one {_shown(entry.key)}", "two")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise refuse("dtype, shape and data_offsets", _shown(list(entry) if isinstance(entry, dict) else entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"a dtype of {', '.join(DTYPE_BITS)}", _shown(dtype), "save it in one of those")
    if not _is_whole(shape) or max(shape, default=0) > MAX_INTEGER:
        raise refuse("a shape of whole numbers under 2**53", _shown(shape))
    elements = 1
    for size in shape:  # [2**40, 2**40, 0] overflows in Rust, [0, 2**40, 2**40] does not
        if (elements := elements * size) > _MAX_USIZE:
            break
    bits = elements * DTYPE_BITS[dtype]
    if bits > _MAX_USIZE or bits % 8:
        raise refuse("whole bytes, less than 2**64 bits", f"{bits} bits of {dtype} {_shown(shape)}", "pad or split it")
    if not _is_whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("data_offsets of begin and end", _shown(offsets))
    begin, end = offsets
    if end - begin != bits // 8:
        raise refuse(f"{bits // 8} bytes for {dtype} {_shown(shape)}", str(end - begin))
    return (begin, end), TensorSpec(name, dtype, tuple(shape))


def _check_order(placed: list[tuple[tuple[int, int], TensorSpec]], what: str) -> None:
    expected, before = 0, None
    for (begin, end), spec in placed:
        if begin != expected:
            fault = "overlaps with" if begin < expected else "leaves a gap after"
            found = f"{begin}: it {fault} {f'tensor {_shown(before.name)}' if before else 'the start of the data'}"
            raise _malformed(what, f"its data at byte {expected}", found, place=("tensor", spec.name))
        expected, before = end, spec


def _is_whole(value: Any) -> bool:
    # By type, because True is an instance of int.
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _malformed(
    what: str, expected: str, found: str, mend: str = _AGAIN, *, place: tuple[str, ...] = ()
) -> MalformedTensors:
    """`place` is the kind and name of what is malformed in the file; it is formatted only here."""
    subject = what if what.isprintable() and len(what) <= 200 else _shown(what)
    if place:
        subject = " ".join((f"{subject}: {place[0]}", *map(_shown, place[1:])))
    return MalformedTensors(f"{subject}: expected {expected}, found {found}; {mend}")
