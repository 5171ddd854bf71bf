"""Differential tests of our header reader against the Rust library that ships with `safetensors`.

Two claims. What we accept, Rust accepts, and both say the same of it. What Rust accepts and we refuse is refused for
a reason of `STRICTER_THAN_RUST`. Files begin valid and are then changed, mostly at the level of JSON, a few times."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors
from hypothesis import given, settings

from registry.core.errors import MalformedTensors
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec
from registry.core.safetensors_header import Header, build_header, header_length, parse_header

# Every place of the data has bytes of its own, so equal data means equal offsets.
DATA = random.Random(0).randbytes(4096)

# How each entry of STRICTER_THAN_RUST reads; tests/core has one example of each.
KNOWN_DIFFERENCES = (
    "expected a header that begins with `{`",
    "expected one of that name, found two",
    "expected one value, found two",
    "expected an object of strings, found None",
    "expected dtype, shape and data_offsets",
    "expected a header of dtype, shape and data_offsets for each tensor, found deeper JSON",
    "expected a name of plain text",
    "expected plain text, found NUL",
    "expected a shape of whole numbers under 2**53",
)

# Keys and values as they are spelled in JSON, so that a mutation can spell them wrongly.
Entry = list[tuple[str, str]]
Document = list[tuple[str, Entry | str]]


def ours(file: bytes) -> Header:
    size = header_length(file[:8], file_size=len(file), what="fuzz")
    return parse_header(file[:size], file_size=len(file), what="fuzz")


def described(header: Header, file: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    data = file[header.size :]
    return {
        spec.name: (spec.dtype, list(spec.shape), data[begin:end])
        for spec, (begin, end) in zip(header.layout, header.offsets, strict=True)
    }


def rust(file: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        tensors = safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return None
    return {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in tensors}


def compare(file: bytes, scratch: Path) -> str:
    """Holds both claims for one file.

    Returns:
        Who accepted it: `both`, `rust` or `neither`.
    """
    theirs = rust(file)
    try:
        header = ours(file)
    except MalformedTensors as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 1000
        if theirs is None:
            return "neither"
        assert any(reason in message for reason in KNOWN_DIFFERENCES), f"stricter without saying so: {message}"
        return "rust"
    assert described(header, file) == theirs
    assert header.file_size == len(file)
    scratch.write_bytes(file)
    with safetensors.safe_open(scratch, framework="np") as handle:
        assert (handle.metadata() or {}) == header.metadata
        filled = [spec.name for spec in header.layout if spec.elements]
        assert [name for name in handle.offset_keys() if header.layout.by_name[name].elements] == filled
    return "both"


# ---------------------------------------------------------------- valid files

NAMES = st.sampled_from(
    ["a", "b", "layers.0.lora_A.weight", "ü", "日本", "😀", "", 'q"\\/', "a b", "\u2028", "[{]}", "x"]
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tensors = []
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        if DTYPE_BITS[dtype] < 8:
            shape.append(4)
        tensors.append(TensorSpec(name, dtype, tuple(shape)))
    return Layout(tuple(tensors))


METADATA = st.none() | st.dictionaries(st.sampled_from(["format", "é", "\n", '"']), st.text("p{[\n\\é😀", max_size=3))


# ---------------------------------------------------------------- mutations

# fmt: off
NUMBERS = [
    "0", "1", "2", "3", "4", "7", "8", "16", "-0", "-1", "1.0", "4.0", "1e0", "8E0", "01", "+1", "0x4", "1_0", "٣",
    "9007199254740991", "9007199254740992", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "18446744073709551616", "99999999999999999999", "1" * 30, "1" * 5000,
    "NaN", "Infinity", "-Infinity", "null", "true", "false", '"1"', "[1]", "{}", "[]", "[[1]]", "",
]
VALUES = [
    "null", "true", "0", "1.5", "-0", "NaN", '""', '"x"', "[]", "{}", '{"a":1}', "[[]]", '{"a":{"b":{}}}', "1e999",
    "[0,0]", "[0,4]", "[4]", "[0,4,8]", "[0]", '["0","4"]', "[2,2]", "[1,]", "[,1]", "[0, 4 ]", "[\t1\n]",
    *(f'"{dtype}"' for dtype in DTYPE_BITS),
    '{"F32":null}', '{"F32":1}', '{"F32":[]}', '{"F32":null,"F32":null}', '"f32"', '"F\\u00332"', '"F32 "', "F32",
    '"\\ud800"', '"\\x"', "'x'", '"\n"', "[" * 200 + "]" * 200, "[" * 3000, '{"a":' * 3000, "/*c*/1", "1//",
]
KEYS = [
    '"a"', '"b"', '"x"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"\\u0064type"', '""', '"ü"',
    '"\\u0061"', '"\\u0000"', '"\\n"', '"\\u001b[2J"', '"\x7f"', '"\x85"', '"\\ud800"', '"\\udc00\\ud800"',
    '"\\ud83d\\ude00"', '"\\ud83dx"', '"\\ud83d\\u0041"', "1", "null", "a", "'a'", '"\\a"', '"\\u12"', '"\\u+123"',
]
METADATA_TEXTS = [
    "null", "{}", "[]", '""', "1", '{"a":"b"}', '{"a":"b","a":"c"}', '{"a":1}', '{"a":null}', '{"a":{}}', '{"a":[]}',
    '{"a":"\\u0000"}', '{"\\u0000":"a"}', '{"a":"\\ud800"}', '{"\\udfff":"a"}', '{"a":"b",}', '{1:"a"}',
    '{"\\n":"\\u001b\\ud83d\\ude00"}', '{"a":"b","\\u0061":"c"}', '[["a","b"]]', '{"a":true}', '{"a":"\t"}',
]
SPACES = [
    "", " ", "  ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\0", "\xa0", "\ufeff", "\u2003", "x", "{}", ",", "}",
]
BYTES = b'{}[]",:\\0129-+.eEuNatfnsF \t\n\r\x00\x1f\x7f\x80\xbf\xc0\xe2\xed\xa0\xf4\xff'
# fmt: on


def mutate_spelling(draw: st.DrawFn, document: Document) -> None:
    """Writes a number as a lenient reader would still understand it."""
    entry = draw_entry(draw, document)
    at = draw(st.integers(0, len(entry) - 1))
    key, text = entry[at]
    numbers = text.strip("[]").split(",")
    where = draw(st.integers(0, len(numbers) - 1))
    number = numbers[where].strip()
    spellings = ["{}.0", "{}e0", "-{}", '"{}"', "0{}", "[{}]", " {}\t"]
    numbers[where] = draw(st.sampled_from(spellings)).format(number)
    if number in ("0", "1") and draw(st.booleans()):
        numbers[where] = draw(st.sampled_from(["NaN", "null", "-0", "false"] if number == "0" else ["true", "1E-0"]))
    entry[at] = (key, f"[{','.join(numbers)}]" if text.startswith("[") else ",".join(numbers))


def mutate_tensor(draw: st.DrawFn, document: Document) -> None:
    """Adds a tensor behind the others, whose length is right, if rounded, and whose shape may be at a limit."""
    ends = [0] + [end for _, end in offsets_of(document)]
    dtype = draw(st.sampled_from(["U8", "F32", *sorted(DTYPE_BITS), "f32", "F8", "u8"]))
    sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 2**32, 2**53 - 1, 2**53, 2**63, 2**64 - 1, 2**64])
    limits = st.sampled_from([[2**53 - 1, 2**53 - 1, 0], [2**32, 2**32, 0], [0, 2**53 - 1, 2**53 - 1], [2**32, 2**29]])
    shape = draw(st.lists(sizes, max_size=3) | limits)
    length = math.prod(shape) * DTYPE_BITS.get(dtype, 8 * len(dtype)) // 8
    end = max(ends) + (length if length < len(DATA) else 0)
    document.append((draw(st.sampled_from(['"new"', *KEYS])), entry_of(f'"{dtype}"', shape, max(ends), end)))


def mutate_number(draw: st.DrawFn, document: Document) -> None:
    entry = draw_entry(draw, document)
    at = draw(st.integers(0, len(entry) - 1))
    key, text = entry[at]
    numbers = text.strip("[]").split(",")
    where = draw(st.integers(0, len(numbers) - 1))
    if numbers[where].isascii() and numbers[where].isdigit() and draw(st.booleans()):
        numbers[where] = str(int(numbers[where][:30]) + draw(st.sampled_from([-8, -4, -1, 1, 4, 8, 2**32, 2**64])))
    else:
        numbers[where] = draw(st.sampled_from(NUMBERS))
    if draw(st.integers(0, 3)) == 0:
        numbers.insert(where, draw(st.sampled_from(["0", "1", "2"])))
    entry[at] = (key, f"[{','.join(numbers)}]")


def mutate_shift(draw: st.DrawFn, document: Document) -> None:
    """Moves one tensor, or all from one on: gaps, overlaps, holes at the start, data after the end."""
    first = draw(st.integers(0, max(0, len(document) - 1)))
    last = draw(st.sampled_from([first, len(document)]))
    by = draw(st.sampled_from([-8, -4, -1, 1, 4, 8]))
    for _, entry in document[first : last + 1]:
        for at, (key, text) in enumerate(entry if isinstance(entry, list) else []):
            if key == '"data_offsets"' and all(part.isdigit() for part in text.strip("[]").split(",")):
                numbers = [str(max(0, int(part[:30]) + by)) for part in text.strip("[]").split(",")]
                entry[at] = (key, f"[{','.join(numbers)}]")


def mutate_value(draw: st.DrawFn, document: Document) -> None:
    entry = draw_entry(draw, document)
    at = draw(st.integers(0, len(entry) - 1))
    entry[at] = (entry[at][0], draw(st.sampled_from(VALUES)))


def mutate_key(draw: st.DrawFn, document: Document) -> None:
    entry = draw_entry(draw, document)
    at = draw(st.integers(0, len(entry) - 1))
    entry[at] = (draw(st.sampled_from(KEYS)), entry[at][1])


def mutate_fields(draw: st.DrawFn, document: Document) -> None:
    entry = draw_entry(draw, document)
    match draw(st.sampled_from(["twice", "drop", "add", "reorder"])):
        case "twice":
            entry.append(draw(st.sampled_from(entry)))
        case "drop" if len(entry) > 1:
            entry.pop()
        case "add":
            entry.append((draw(st.sampled_from(KEYS)), draw(st.sampled_from(VALUES))))
        case _:
            entry.reverse()


def mutate_tensors(draw: st.DrawFn, document: Document) -> None:
    draw_entry(draw, document)
    at = draw(st.integers(0, len(document) - 1))
    name, entry = document[at]
    match draw(st.sampled_from(["twice", "copy", "drop", "reorder", "rename", "replace", "list"])):
        case "twice":
            document.append(document[at])
        case "copy":
            document.append((draw(st.sampled_from(KEYS)), list(entry) if isinstance(entry, list) else entry))
        case "drop":
            del document[at]
        case "reorder":
            document.reverse()
        case "rename":
            document[at] = (draw(st.sampled_from(KEYS)), entry)
        case "replace":
            document[at] = (name, draw(st.sampled_from(VALUES)))
        case _ if isinstance(entry, list):
            document[at] = (name, f"[{','.join(value for _, value in entry)}]")


def mutate_metadata(draw: st.DrawFn, document: Document) -> None:
    text = draw(st.sampled_from(METADATA_TEXTS))
    key = draw(st.sampled_from(['"__metadata__"', '"__metadata__"', '"\\u005f_metadata__"']))
    document.insert(draw(st.sampled_from([0, len(document)])), (key, text))


MUTATIONS: list[Callable[[st.DrawFn, Document], None]] = [
    mutate_spelling,
    mutate_tensor,
    mutate_number,
    mutate_shift,
    mutate_value,
    mutate_key,
    mutate_fields,
    mutate_tensors,
    mutate_metadata,
]


def entry_of(dtype: str, shape: Sequence[int], begin: int, end: int) -> Entry:
    sizes = ",".join(map(str, shape))
    return [('"dtype"', dtype), ('"shape"', f"[{sizes}]"), ('"data_offsets"', f"[{begin},{end}]")]


def offsets_of(document: Document) -> list[tuple[int, int]]:
    """Those offsets that are whole numbers yet."""
    texts = [text for _, entry in document if isinstance(entry, list) for key, text in entry if key == '"data_offsets"']
    found = [re.fullmatch(r"\[([0-9]{1,4}),([0-9]{1,4})\]", text) for text in texts]
    return [(int(match[1]), int(match[2])) for match in found if match]


def draw_entry(draw: st.DrawFn, document: Document) -> Entry:
    entries = [entry for _, entry in document if isinstance(entry, list) and entry]
    if not entries:
        entries = [[('"dtype"', '"U8"'), ('"shape"', "[0]"), ('"data_offsets"', "[0,0]")]]
        document.append(('"new"', entries[0]))
    return draw(st.sampled_from(entries))


def spell(document: Document, space: str) -> str:
    def fields(pairs: list[tuple[str, str]]) -> str:
        return "{" + ",".join(f"{key}{space}:{value}" for key, value in pairs) + space + "}"

    return fields([(name, fields(entry) if isinstance(entry, list) else entry) for name, entry in document])


@st.composite
def mutated_json(draw: st.DrawFn) -> bytes:
    layout = draw(layouts())
    document: Document = []
    end = 0
    for spec in layout:
        begin, end = end, end + spec.nbytes
        document.append((json.dumps(spec.name), entry_of(f'"{spec.dtype}"', spec.shape, begin, end)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        draw(st.sampled_from(MUTATIONS))(draw, document)
    if draw(st.integers(0, 7)):  # else the data has the old length
        end = min(max([0] + [end for _, end in offsets_of(document)]), len(DATA))
    space = draw(st.sampled_from(["", "", "", "", " ", "\n\t\r", "\x0b", "\xa0"]))
    text = spell(document, space)
    if draw(st.integers(0, 7)) == 0:
        text = draw(st.sampled_from(SPACES)) + text + draw(st.sampled_from(SPACES))
    header = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 15)) == 0:
        end = max(0, end + draw(st.sampled_from([-8, -1, 1, 4, 8])))
    return len(header).to_bytes(8, "little") + header + DATA[:end]


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    layout = draw(layouts())
    file = bytearray(build_header(layout, draw(METADATA)) + DATA[: layout.nbytes])
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, max(0, len(file) - 1)))
        byte = draw(st.sampled_from(BYTES))
        match draw(st.sampled_from(["replace", "flip", "insert", "delete", "cut", "lengthen"])):
            case "replace":
                file[at : at + 1] = bytes([byte])
            case "flip" if file:
                file[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                file.insert(at, byte)
                file[:1] = bytes([(file[0] + 1) % 256])
            case "delete":
                del file[at : at + 1]
                file[:1] = bytes([(file[0] - 1) % 256]) if file else b""
            case "cut":
                del file[at:]
            case _:
                file.append(byte)
    return bytes(file)


def fuzz(files: st.SearchStrategy[bytes], scratch: Path, examples: int) -> Counter[str]:
    accepted: Counter[str] = Counter()

    @settings(max_examples=examples)
    @given(file=files)
    def each(file: bytes) -> None:
        accepted[compare(file, scratch)] += 1

    each()
    return accepted


# ---------------------------------------------------------------- claims


def test_what_we_accept_of_changed_json_rust_accepts_as_the_same(tmp_path: Path) -> None:
    accepted = fuzz(mutated_json(), tmp_path / "fuzz.safetensors", examples=2000)
    assert min(accepted["both"], accepted["rust"], accepted["neither"]) >= 50, "the mutations miss one side"


def test_what_we_accept_of_changed_bytes_rust_accepts_as_the_same(tmp_path: Path) -> None:
    accepted = fuzz(mutated_bytes(), tmp_path / "fuzz.safetensors", examples=700)
    assert min(accepted["both"], accepted["neither"]) >= 20, "the mutations miss one side"


@settings(max_examples=200)
@given(layout=layouts(), metadata=METADATA)
def test_rust_reads_every_header_that_we_build(layout: Layout, metadata: dict[str, str] | None) -> None:
    raw = build_header(layout, metadata)
    file = raw + DATA[: layout.nbytes]
    assert len(raw) % 8 == 0
    assert rust(file) == described(ours(file), file)
    assert ours(file).metadata == (metadata or {})
    assert sorted(ours(file).layout, key=lambda t: t.name) == sorted(layout, key=lambda t: t.name)


@settings(max_examples=200)
@given(length=st.integers(0, 12), rest=st.binary(max_size=24))
def test_what_we_accept_of_random_bytes_rust_accepts_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, length: int, rest: bytes
) -> None:
    compare(length.to_bytes(8, "little") + rest, tmp_path_factory.getbasetemp() / "random.safetensors")
